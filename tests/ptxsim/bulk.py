"""Bulk copies: boxes of tensor maps and plain bytes, to shared memory and from it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.ptxsim.operands import I32, U16, U32, U64, Op, Operands, Source, braced, integer
from tests.ptxsim.order import ASYNC, GENERIC, Threads
from tests.ptxsim.ordered import OFFSET, PARAM_WINDOW, SHARED_WINDOW, Places, places
from tests.ptxsim.outcome import YIELD
from tests.ptxsim.ptx import Fault, Instruction
from tests.ptxsim.tensormap import TensorMap

_LOAD = re.compile(
    r"cp\.async\.bulk(?:\.tensor\.([1-5])d)?\.shared::cluster\.global(\.tile)?"
    r"\.mbarrier::complete_tx::bytes(\.multicast::cluster)?(?:\.L2::cache_hint)?$"
)
_STORE = re.compile(
    r"cp\.async\.bulk(?:\.tensor\.([1-5])d)?\.global\.shared::cta(\.tile)?\.bulk_group$"
)


def build(one: Instruction, operands: Operands) -> Op | None:
    """None where the opcode is no bulk copy's."""
    for pattern, make in ((_LOAD, _load), (_STORE, _store)):
        match = pattern.match(one.opcode)
        if match and bool(match[1]) == bool(match[2]):
            return make(one, operands, int(match[1] or 0))
    others: dict[str, Callable[[Instruction, Operands], Op]] = {
        "cp.async.bulk.commit_group": lambda *_: _commit,
        "cp.async.bulk.wait_group": _wait_group,
        "cp.async.bulk.wait_group.read": _wait_group,
        "fence.proxy.tensormap::generic.acquire.sys": _acquire_tensor_map,
        "prefetch.tensormap": _prefetch_tensor_map,
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32": _store_async,
    }
    return others[one.opcode](one, operands) if one.opcode in others else None


@dataclass
class _Box:
    """The operand [map, {coordinates}]."""

    map_at: Source
    corner: list[Source]

    @classmethod
    def parse(cls, one: Instruction, operands: Operands, text: str, rank: int) -> _Box:
        map_text, _, corner_text = text.strip("[]").partition(",")
        corner = [operands.source(name, I32) for name in braced(corner_text)]
        if len(corner) != rank:
            raise ValueError(f"{one.where()}: {rank} coordinates expected")
        return cls(operands.source(map_text.strip(), U64), corner)

    def at(self, f: Any, lane: int) -> tuple[TensorMap, list[int]]:
        tensor_map = _decode_tensor_map(f, lane, int(self.map_at(f)[lane]))
        if len(tensor_map.dims) != len(self.corner):
            raise Fault(
                f"{len(self.corner)} coordinates into a tensor map of {len(tensor_map.dims)} dims"
            )
        return tensor_map, [int(c(f)[lane]) for c in self.corner]


def _linear(address: int, size: int) -> np.ndarray:
    """Addresses of the 16-byte chunks of plain bytes."""
    if address % 16 or size % 16 or not size:
        raise Fault(f"bulk copy of {size} bytes at {address:#x}: no multiples of 16 above 0")
    return address + 16 * np.arange(size // 16)


def _one_lane(f: Any) -> int:
    if len(f.lanes) != 1:
        raise Fault(f"the same bulk copy by {len(f.lanes)} threads")
    return int(f.lanes[0])


def _load(one: Instruction, operands: Operands, rank: int) -> Op:
    """From global to shared memory, by one thread: of one CTA, or of all in a multicast's mask, at
    the same place, with the bytes counted by each one's own mbarrier. rank: 0 for plain bytes."""
    to, rest = operands.address(one.operands[0]), one.operands[2:]
    if rank:
        box = _Box.parse(one, operands, one.operands[1], rank)
    else:
        origin, size = operands.address(one.operands[1], U64), operands.source(rest.pop(0), U32)
    barrier_at = operands.address(rest.pop(0))
    mask = operands.source(rest.pop(0), U16) if ".multicast" in one.opcode else None
    if ".L2::cache_hint" in one.opcode:
        rest.pop()  # changes no data
    if rest:
        raise ValueError(f"{one.where()}: operands {rest}")

    def source(f: Any, lane: int, where: int) -> tuple[Places, Callable[[], np.ndarray]]:
        """-> the chunks of shared memory that are written, what reads the bytes."""
        memory, by = f.warp.cta.cluster.memory, f.access()
        if rank:
            if where % 128:
                raise Fault(f"bulk tensor copy to {where}, which is no multiple of 128")
            tensor_map, corner = box.at(f, lane)
            written = places(tensor_map.targets(where), 16)
            return written, lambda: tensor_map.read_box(memory, by, corner)
        start, count = int(origin(f)[lane]), int(size(f)[lane])
        read = _linear(start, count)
        return places(_linear(where, count), 16), lambda: memory.read_bytes(by, read, 16)

    def copy(f: Any) -> Any:
        cluster, lane = f.warp.cta.cluster, _one_lane(f)
        where, arrives = int(to(f)[lane]), int(barrier_at(f)[lane])
        places = [(where, arrives)]
        if mask is not None:
            ranks = np.flatnonzero(int(mask(f)[lane]) >> np.arange(16) & 1).tolist()
            places = [(cluster.address(where, r), cluster.address(arrives, r)) for r in ranks]
        for place, barrier_place in places:
            owner, barrier = f.warp.cta.barrier_at(f.threads, barrier_place)
            target, offset = f.warp.cta.owner(f.threads, place)
            if target is not owner:
                raise Fault("bulk copy to one CTA, its mbarrier in another")
            if not barrier.visible_to_copies:
                raise Fault(
                    f"mbarrier {barrier.address}: no fence after its init makes copies see it"
                )
            written, read = source(f, lane, offset)
            target.shared.begin_write(f.threads, written, ASYNC)
            cluster.later(_landing(target, barrier, written, read, ASYNC), one, target)
        return YIELD

    return copy


def _landing(
    target: Any, barrier: Any, written: Places, read: Callable[[], np.ndarray], proxy: int
) -> Callable[[], None]:
    def land() -> None:
        target.shared.land(written, read(), barrier.agent, barrier.next_time, proxy)
        target.cluster.completed(barrier, barrier.land(16 * len(written.numbers)))

    return land


def _store_async(one: Instruction, operands: Operands) -> Op:
    """16 bytes a lane to a CTA's shared memory, counted by an mbarrier there."""
    to, barrier_at = operands.address(one.operands[0]), operands.address(one.operands[2])
    sources = [operands.source(name, U32) for name in braced(one.operands[1])]
    if len(sources) != 4:
        raise ValueError(f"{one.where()}: 4 registers expected")

    def store(f: Any) -> Any:
        cta, where, arrives = f.warp.cta, to(f)[f.lanes], barrier_at(f)[f.lanes]
        words = np.stack([source(f)[f.lanes] for source in sources], axis=1)
        data = np.ascontiguousarray(words).view(np.uint8).reshape(len(f.lanes), 16)
        for place in np.unique(arrives):
            own = arrives == place
            owner, barrier = cta.barrier_at(f.threads[own], int(place))
            targets = {cta.owner(f.threads[own], int(address))[0] for address in where[own]}
            if targets != {owner}:
                raise Fault("st.async to one CTA, its mbarrier in another")
            written = places(where[own] & OFFSET, 16)
            owner.shared.begin_write(f.threads[own], written, GENERIC)
            arrived = _landing(owner, barrier, written, lambda part=data[own]: part, GENERIC)
            cta.cluster.later(arrived, one, owner)
        return YIELD

    return store


@dataclass
class Stores:
    """Of one thread: what its bulk stores read, by group."""

    open: list[Places] = field(default_factory=list)
    groups: list[list[Places]] = field(default_factory=list)

    @property
    def reading(self) -> bool:
        return bool(self.open) or any(self.groups)


def _store(one: Instruction, operands: Operands, rank: int) -> Op:
    """From shared to global memory, by each lane. rank: 0 for plain bytes."""
    if rank:
        box = _Box.parse(one, operands, one.operands[0], rank)
    else:
        to, size = operands.address(one.operands[0], U64), operands.source(one.operands[2], U32)
    origin = operands.address(one.operands[1])

    def store(f: Any) -> Any:
        cta, by = f.warp.cta, f.access()
        memory = cta.cluster.memory
        for lane, thread in zip(f.lanes.tolist(), f.threads, strict=True):
            own, where = np.array([thread]), int(origin(f)[lane])
            if rank:
                if where % 128:
                    raise Fault(f"bulk tensor copy from {where}, which is no multiple of 128")
                tensor_map, corner = box.at(f, lane)
                read = places(tensor_map.targets(where), 16)
                tensor_map.write_box(memory, by, corner, cta.shared.begin_store(own, read))
            else:
                start, count = int(to(f)[lane]), int(size(f)[lane])
                read = places(_linear(where, count), 16)
                data = cta.shared.begin_store(own, read)
                memory.write_bytes(by, _linear(start, count), data)
            f.warp.stores.setdefault(lane, Stores()).open.append(read)
        return YIELD

    return store


def _own_stores(f: Any) -> list[tuple[Threads, Stores]]:
    stores, lanes = f.warp.stores, zip(f.lanes.tolist(), f.threads, strict=True)
    return [(np.array([thread]), stores[lane]) for lane, thread in lanes if lane in stores]


def _commit(f: Any) -> None:
    for _, stores in _own_stores(f):
        stores.groups.append(stores.open)
        stores.open = []


def _wait_group(one: Instruction, operands: Operands) -> Op:
    """With or without .read: nobody may touch what bulk stores write before the grid has ended."""
    remaining = integer(one.operands[0])

    def wait(f: Any) -> Any:
        for thread, stores in _own_stores(f):
            while len(stores.groups) > remaining:
                for read in stores.groups.pop(0):
                    f.warp.cta.shared.end_store(thread, read)
        return YIELD

    return wait


def _acquire_tensor_map(one: Instruction, operands: Operands) -> Op:
    address = operands.address(one.operands[0], U64)
    if integer(one.operands[1]) != 128:
        raise ValueError(f"{one.where()}: a tensor map has 128 bytes")

    def acquire(f: Any) -> None:
        for lane in f.lanes:
            f.warp.acquired_maps.add((int(lane), int(address(f)[lane])))

    return acquire


def _prefetch_tensor_map(one: Instruction, operands: Operands) -> Op:
    address = operands.address(one.operands[0], U64)

    def prefetch(f: Any) -> None:
        for lane in f.lanes:
            _decode_tensor_map(f, int(lane), int(address(f)[lane]))

    return prefetch


def _decode_tensor_map(f: Any, lane: int, address: int) -> TensorMap:
    """A kernel's parameter, or 128 bytes of global memory that the thread has acquired."""
    cta = f.warp.cta
    if address % 64:
        raise Fault(f"tensor map at {address:#x}, which is no multiple of 64")
    if PARAM_WINDOW <= address < SHARED_WINDOW:
        offset = address - PARAM_WINDOW
        return TensorMap.decode(cta.parameters[offset : offset + 128])
    if (lane, address) not in f.warp.acquired_maps:
        raise Fault("tensor map in global memory used without fence.proxy.tensormap")
    data = cta.cluster.memory.read_bytes(f.access(), np.array([address]), 128)
    return TensorMap.decode(data.tobytes())
