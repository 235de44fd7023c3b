"""Loads, stores and cp.async."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptxsim.memory import Access
from tests.ptxsim.operands import ALL, U16, U32, U64, Op, Operands, braced, integer, same
from tests.ptxsim.order import GENERIC, some
from tests.ptxsim.ordered import OFFSET, PARAM_WINDOW, RANK_BIT, SHARED_WINDOW, places
from tests.ptxsim.outcome import YIELD
from tests.ptxsim.ptx import Fault, Instruction

_ACCESS = re.compile(
    r"(ld|st)\.(global|shared|shared::cluster|param)(?:\.v([24]))?\.([bus](?:16|32|64)|f32)$"
)
_KINDS = {"16": U16, "32": U32, "64": U64}
_CVTA = {"cvta.shared.u64": SHARED_WINDOW, "cvta.param.u64": PARAM_WINDOW}
_TO_SHARED = ("cvta.to.shared.u64", "cvta.to.shared::cluster.u64")


@dataclass
class Copies:
    """One cp.async: arrays of its lanes, where to in shared memory, where from, how many bytes,
    and the lane's group, -1 while that is open."""

    lanes: np.ndarray
    to: np.ndarray
    origin: np.ndarray
    count: np.ndarray
    group: np.ndarray
    by: Access
    issued: Instruction

    def part(self, of: np.ndarray) -> Copies:
        lanes, to, origin = self.lanes[of], self.to[of], self.origin[of]
        return Copies(lanes, to, origin, self.count[of], self.group[of], self.by, self.issued)


def build(one: Instruction, operands: Operands) -> Op | None:
    """None where the opcode moves no data."""
    access = _ACCESS.match(one.opcode)
    if access:
        return _access(one, operands, access)
    if one.opcode in _CVTA or one.opcode in _TO_SHARED:
        return _convert_address(one, operands)
    others = {
        "cp.async.cg.shared.global": _copy_async,
        "cp.async.ca.shared.global": _copy_async,
        "cp.async.mbarrier.arrive.noinc.shared.b64": _arrive_noinc,
        "cp.async.commit_group": lambda *_: _commit,
        "cp.async.wait_group": _wait_group,
        "cp.async.wait_all": _wait_group,
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16": _load_matrices,
        "stmatrix.sync.aligned.m8n8.x4.shared.b16": _store_matrices,
        "stmatrix.sync.aligned.m8n8.x1.trans.shared.b16": _store_matrices,
        "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16": _store_matrices,
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16": _store_matrices,
    }
    return others[one.opcode](one, operands) if one.opcode in others else None


def is_narrow(opcode: str) -> bool:
    """Whether an instruction accesses 2 bytes of shared memory."""
    access = _ACCESS.match(opcode)
    if access is None:
        return False
    _, space, vector, kind = access.groups()
    return space.startswith("shared") and vector is None and kind.endswith("16")


def _access(one: Instruction, operands: Operands, match: re.Match[str]) -> Op:
    verb, space, vector, kind_name = match.groups()
    kind = _KINDS[re.sub(r"\D", "", kind_name)]
    count = int(vector or 1)
    load = verb == "ld"
    names = braced(one.operands[0 if load else 1])
    if len(names) != count:
        raise ValueError(f"{one.where()}: {count} registers expected")
    text = one.operands[1 if load else 0]
    if space == "param" and (not load or count > 1):
        raise ValueError(f"{one.where()}: unknown instruction {one.opcode}")
    if space == "param":
        return _load_parameter(operands, names[0], text, kind)
    size = count * kind.itemsize
    address = operands.address(text, U64 if space == "global" else U32)
    if load:
        return _load(operands, names, address, size, kind, space)
    sources = [operands.stored(name, kind) for name in names]

    def store(f: Any) -> None:
        values = np.empty((len(f.lanes), count), kind)
        for i, source in enumerate(sources):
            values[:, i] = source(f)[f.own]
        data, where = values.view(np.uint8), address(f)[f.own]
        if space == "global":
            f.warp.cta.cluster.memory.write(f.access(), where, data)
        elif space == "shared":
            f.warp.cta.shared.write(f.threads, places(where, size), data)
        else:
            for owner, own, offsets in _owners(f, where):
                owner.shared.write(f.threads[own], places(offsets, size), data[own])

    return store


def _owners(f: Any, where: np.ndarray) -> list[tuple[Any, np.ndarray, np.ndarray]]:
    """CTAs of the cluster, which of the fragment's lanes address them, and where in them."""
    rank = where >> RANK_BIT
    found = []
    for one in np.unique(rank):
        own = rank == one
        owner, _ = f.warp.cta.owner(f.threads[own], int(where[own][0]))
        found.append((owner, own, where[own] & OFFSET))
    return found


def _load(
    operands: Operands, names: list[str], address: Any, size: int, kind: np.dtype, space: str
) -> Op:
    puts = [operands.sink(name, kind) for name in names]

    def load(f: Any) -> None:
        where, cta = address(f)[f.own], f.warp.cta
        if space == "global":
            data = cta.cluster.memory.read(f.access(), where, size)
        elif space == "shared":
            data = cta.shared.read(f.threads, places(where, size))
        else:
            data = np.zeros((len(where), size), np.uint8)
            for owner, own, offsets in _owners(f, where):
                data[own] = owner.shared.read(f.threads[own], places(offsets, size))
        values = data.view(kind)
        if f.mask != ALL:
            values = np.zeros((32, len(puts)), kind)
            values[f.own] = data.view(kind)
        for put, column in zip(puts, values.T, strict=True):
            put(f, column)

    return load


def _load_parameter(operands: Operands, name: str, text: str, kind: np.dtype) -> Op:
    put, address = operands.sink(name, kind), operands.address(text)

    def load(f: Any) -> None:
        offset = int(address(f)[0])
        data = f.warp.cta.parameters[offset : offset + kind.itemsize]
        put(f, same(int.from_bytes(data, "little"), kind))

    return load


def _convert_address(one: Instruction, operands: Operands) -> Op:
    """Own shared memory has the same addresses as a part of the cluster's."""
    put, source = operands.sink(one.operands[0], U64), operands.source(one.operands[1], U64)
    window = np.uint64(_CVTA.get(one.opcode, SHARED_WINDOW))
    if one.opcode in _CVTA:
        return lambda f: put(f, source(f) + window)
    return lambda f: put(f, source(f) - window)


def _copy_async(one: Instruction, operands: Operands) -> Op:
    """16 bytes a lane (.ca: or 4 or 8), of which the first `size` come from global memory and the
    rest are zeros."""
    to, source = operands.address(one.operands[0]), operands.address(one.operands[1], U64)
    width = integer(one.operands[2])
    if width not in ((16,) if ".cg." in one.opcode else (4, 8, 16)):
        raise ValueError(f"{one.where()}: cp.async can't copy {width} bytes")
    size = operands.source(one.operands[3] if len(one.operands) > 3 else str(width), U32)

    def copy(f: Any) -> Any:
        where, count = to(f)[f.own], size(f)[f.own]
        if some(count > width):
            raise Fault(f"cp.async of {int(count.max())} bytes of {width}")
        origin = source(f)[f.own]
        f.warp.cta.shared.begin_write(f.threads, places(where, width), GENERIC)
        none = np.full(len(where), -1)
        f.warp.copies.append(Copies(f.lanes, where, origin, count, none, f.access(), one))
        return YIELD

    return copy


def _arrive_noinc(one: Instruction, operands: Operands) -> Op:
    """Arrives for each lane once all copies that it has issued have landed."""
    address = operands.address(one.operands[0])

    def arrive(f: Any) -> Any:
        cta, count = f.warp.cta, len(f.lanes)
        barrier = cta.barrier(f, address(f))
        taken = _take(f.warp, lambda copies: f.active[copies.lanes])
        clock = cta.order.publish(f.threads)

        def land() -> None:
            for copies in taken:
                _land(cta, copies, barrier.agent, barrier.next_time)
            cta.cluster.completed(barrier, barrier.arrive(count, clock))

        cta.cluster.later(land, one, cta)
        return YIELD

    return arrive


def _take(warp: Any, which: Callable[[Copies], np.ndarray]) -> list[Copies]:
    """Those of the warp's copies that `which` selects, which are the warp's no longer."""
    taken, kept = [], []
    for copies in warp.copies:
        own = which(copies)
        count = np.count_nonzero(own)
        if count:
            taken.append(copies if count == len(own) else copies.part(own))
        if count < len(own):
            kept.append(copies.part(~own) if count else copies)
    warp.copies = kept
    return taken


def _commit(f: Any) -> None:
    """Each lane's copies so far are a group, be they none."""
    warp = f.warp
    for copies in warp.copies:
        fresh = f.active[copies.lanes] & (copies.group < 0)
        copies.group = np.where(fresh, warp.groups[copies.lanes], copies.group)
    warp.groups[f.lanes] += 1


def _wait_group(one: Instruction, operands: Operands) -> Op:
    """Copies land for their own thread at its wait; for others once that is ordered before."""
    every = one.opcode.endswith("wait_all")
    remaining = 0 if every else integer(one.operands[0])

    def wait(f: Any) -> Any:
        warp, cta = f.warp, f.warp.cta
        if every:
            _commit(f)

        def due(copies: Copies) -> np.ndarray:
            old = copies.group < warp.groups[copies.lanes] - remaining
            return f.active[copies.lanes] & (copies.group >= 0) & old

        for copies in _take(warp, due):
            threads = (copies.lanes + 32 * warp.index)[:, None]
            _land(cta, copies, threads, int(cta.order.ticks[warp.index]))
        return YIELD

    return wait


def _land(cta: Any, copies: Copies, agent: int | np.ndarray, time: int) -> None:
    """Their bytes arrive."""
    with cta.cluster.blaming(copies.issued):
        width, memory = integer(copies.issued.operands[2]), cta.cluster.memory
        data = np.zeros((len(copies.to), width), np.uint8)
        for size in sorted(set(copies.count.tolist()) - {0}):
            rows = copies.count == size
            if some(copies.origin[rows] % width != 0):
                raise Fault("misaligned cp.async source")
            data[rows, :size] = memory.read_bytes(copies.by, copies.origin[rows], size)
        cta.shared.land(places(copies.to, width), data, agent, time, GENERIC)


def _load_matrices(one: Instruction, operands: Operands) -> Op:
    """The reverse of `_store_matrices`."""
    address = operands.address(one.operands[1])
    puts = [operands.sink(name, U32) for name in braced(one.operands[0])]
    count = int(one.opcode[len("ldmatrix.sync.aligned.m8n8.x")])
    if len(puts) != count:
        raise ValueError(f"{one.where()}: {count} registers expected")

    def load(f: Any) -> None:
        at = places(address(f)[: count * 8], 16)
        rows = f.warp.cta.shared.read(f.threads[: count * 8], at)
        for put, matrix in zip(puts, rows.view(U32).reshape(count, 32), strict=True):
            put(f, matrix)

    return load


def _store_matrices(one: Instruction, operands: Operands) -> Op:
    """8x8 matrices of 16 bits; lane i gives the address of row i % 8 of matrix i // 8."""
    address = operands.address(one.operands[0])
    sources = [operands.source(name, U32) for name in braced(one.operands[1])]
    count = int(one.opcode[len("stmatrix.sync.aligned.m8n8.x")])
    if len(sources) != count:
        raise ValueError(f"{one.where()}: {count} registers expected")

    def store(f: Any) -> None:
        # register m of lane 4 * row + pair holds columns 2 * pair and 2 * pair + 1 of matrix m
        words = np.array([source(f) for source in sources])
        matrices = words.view(np.uint16).reshape(count, 8, 8)
        if ".trans." in one.opcode:
            matrices = matrices.transpose(0, 2, 1)
        rows = np.ascontiguousarray(matrices).reshape(count * 8, 8).view(np.uint8)
        to = places(address(f)[: count * 8], 16)
        f.warp.cta.shared.write(f.threads[: count * 8], to, rows)

    return store
