"""Atomic accesses, of global and of shared memory, and the order that they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptxsim.operands import F32, I32, U32, U64, Op, Operands
from tests.ptxsim.ordered import Location, OrderedMemory
from tests.ptxsim.outcome import YIELD
from tests.ptxsim.ptx import Fault, Instruction

_ORDERS = ("relaxed", "acquire", "release", "acq_rel")
_SCOPES = ("cta", "cluster", "gpu", "sys")
_SPACES = ("global", "shared", "shared::cta", "shared::cluster")
_KINDS = {"u32": U32, "s32": I32, "b32": U32, "f32": F32}
Change = Callable[..., Any]  # old value, operands -> new value
_CHANGES: dict[str, Change] = {
    "add": lambda old, by: old + by,
    "min": min,
    "max": max,
    "and": lambda old, by: old & by,
    "or": lambda old, by: old | by,
    "exch": lambda old, new: new,
    "cas": lambda old, expected, new: new if old == expected else old,
}
_BY_KIND = {
    "u32": ("add", "min", "max"),
    "s32": ("add", "min", "max"),
    "f32": ("add",),
    "b32": ("and", "or", "exch", "cas"),
}
_MOST_POLLS = 20_000


def build(one: Instruction, operands: Operands) -> Op | None:
    """None where the opcode is no atomic access."""
    verb, *words = one.opcode.split(".")
    if one.opcode in ("fence.acq_rel.cluster", "fence.acq_rel.gpu", "fence.acq_rel.sys"):
        return _fence(everywhere=words[1] != "cluster")
    order, scope, space, rest = _modifiers(words)
    if verb in ("atom", "red") and len(rest) == 2 and rest[0] in _BY_KIND.get(rest[1], ()):
        return _change(one, operands, order or "relaxed", scope or "gpu", space, *rest)
    if verb in ("ld", "st") and order and scope and len(rest) == 1 and rest[0] in _KINDS:
        return _access(one, operands, order, scope, space, rest[0])
    return None


def _modifiers(words: list[str]) -> tuple[str, str, str, list[str]]:
    """-> order, scope, space, each "" where it is not given; what is left."""
    found = []
    for known in (_ORDERS, _SCOPES, _SPACES):
        own = [word for word in words if word in known]
        found.append(own[0] if len(own) == 1 else "")
        words = [word for word in words if word not in own[:1]]
    return found[0], found[1], found[2], words


def _fence(everywhere: bool) -> Op:
    def fence(f: Any) -> Any:
        f.warp.cta.order.fence(f.threads, everywhere)
        return YIELD

    return fence


class _Word:
    """What one lane accesses."""

    def __init__(self, f: Any, thread: int, address: int, space: str, reads: bool, writes: bool):
        self.order, self.thread, cta = f.warp.cta.order, thread, f.warp.cta
        self.memory: OrderedMemory
        if space == "global":
            self.memory, self.offset = cta.cluster.memory.workspace(address)
        else:
            owner, self.offset = cta.owner(np.array([thread]), address)
            self.memory = owner.shared
        self.location: Location = self.memory.location(thread, self.offset, reads, writes)

    def check_scope(self, cta: Any, scope: str) -> None:
        """Accesses of one word exclude each other within the narrowest scope of any of them."""
        location = self.location
        location.scope = min(location.scope, scope, key=_SCOPES.index)
        location.ctas.add((id(cta.cluster), cta.number))
        if location.scope == "cta" and len(location.ctas) > 1:
            raise Fault(f"scope .cta at {self.offset}, used by several CTAs")
        if location.scope == "cluster" and len({cluster for cluster, _ in location.ctas}) > 1:
            raise Fault(f"scope .cluster at {self.offset}, used by several clusters")

    def acquire(self, order: str) -> None:
        if order in ("acquire", "acq_rel"):
            self.order.acquire(np.array([self.thread]), self.location.clock)
        else:
            self.order.observe(self.thread, self.location.clock)

    def release(self, order: str, scope: str, replace: bool) -> None:
        """replace: a store ends what was released here before; a change goes on with it."""
        if order in ("release", "acq_rel"):
            clock = self.order.publish(np.array([self.thread]))
        else:
            clock = self.order.behind_fences(self.thread, scope in ("gpu", "sys"))
        location = self.location
        location.clock = clock if replace else np.maximum(location.clock, clock)

    def get(self, kind: np.dtype) -> Any:
        return self.memory.data[self.offset : self.offset + 4].view(kind)[0]

    def put(self, value: Any, kind: np.dtype) -> None:
        self.memory.data[self.offset : self.offset + 4].view(kind)[0] = value


def _shuffled(f: Any) -> list[tuple[int, int]]:
    """The fragment's lanes and threads, in any order."""
    pairs = list(zip(f.lanes.tolist(), f.threads.tolist(), strict=True))
    f.warp.cta.cluster.schedule.random.shuffle(pairs)
    return pairs


def _change(
    one: Instruction, operands: Operands, order: str, scope: str, space: str, name: str, kind: str
) -> Op:  # fmt: skip
    dtype, change = _KINDS[kind], _CHANGES[name]
    returns = one.opcode.startswith("atom")
    put = operands.sink(one.operands[0] if returns else "_", dtype)
    where, *rest = one.operands[1:] if returns else one.operands
    address, by = _address(operands, where, space), [operands.source(text, dtype) for text in rest]
    if len(by) != (2 if name == "cas" else 1):
        raise ValueError(f"{one.where()}: operands {one.operands}")

    def access(f: Any) -> Any:
        old = np.zeros(32, dtype)
        for lane, thread in _shuffled(f):
            word = _Word(f, thread, int(address(f)[lane]), space, reads=True, writes=True)
            word.check_scope(f.warp.cta, scope)
            old[lane] = word.get(dtype)
            word.acquire(order)
            word.release(order, scope, replace=False)
            word.put(change(old[lane], *(source(f)[lane] for source in by)), dtype)
        put(f, old)
        return YIELD

    return access


def _address(operands: Operands, text: str, space: str) -> Any:
    return operands.address(text, U64 if space == "global" else U32)


def _access(
    one: Instruction, operands: Operands, order: str, scope: str, space: str, kind: str
) -> Op:
    """ld and st that say in which order and for whom."""
    dtype, load = _KINDS[kind], one.opcode.startswith("ld")
    address = _address(operands, one.operands[1 if load else 0], space)
    if order not in (("relaxed", "acquire") if load else ("relaxed", "release")):
        raise ValueError(f"{one.where()}: unknown instruction {one.opcode}")
    if load:
        return _load(operands, one.operands[0], address, (order, scope, space), dtype)
    source = operands.source(one.operands[1], dtype)

    def store(f: Any) -> Any:
        for lane, thread in _shuffled(f):
            word = _Word(f, thread, int(address(f)[lane]), space, reads=False, writes=True)
            word.check_scope(f.warp.cta, scope)
            word.release(order, scope, replace=True)
            word.put(source(f)[lane], dtype)
        return YIELD

    return store


def _load(
    operands: Operands, name: str, address: Any, how: tuple[str, str, str], dtype: np.dtype
) -> Op:
    put = operands.sink(name, dtype)
    order, scope, space = how

    def load(f: Any) -> Any:
        values = np.zeros(32, dtype)
        for lane, thread in _shuffled(f):
            word = _Word(f, thread, int(address(f)[lane]), space, reads=True, writes=False)
            word.check_scope(f.warp.cta, scope)
            values[lane] = word.get(dtype)
            word.acquire(order)
        before = f.warp.seen.get((f.pc, f.mask))
        f.warp.seen[f.pc, f.mask] = values
        same = before is not None and (before == values).all()
        f.warp.polls = f.warp.polls + 1 if same else 0
        if f.warp.polls > _MOST_POLLS:
            raise Fault(f"deadlock: {f.warp.polls} loads in turn of a value that nobody changes")
        put(f, values)
        return YIELD

    return load
