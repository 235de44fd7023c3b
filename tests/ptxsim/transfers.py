"""Loads, stores, asynchronous copies and their tensor maps."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tests.ptxsim.memory import PARAM_WINDOW, SHARED_WINDOW
from tests.ptxsim.operands import I32, U16, U32, U64, Op, Operands, braced, integer
from tests.ptxsim.order import ASYNC, GENERIC
from tests.ptxsim.outcome import YIELD
from tests.ptxsim.ptx import Fault, Instruction
from tests.ptxsim.tensormap import TensorMap

_ACCESS = re.compile(r"(ld|st)\.(global|shared|param)(?:\.v([24]))?\.([bus](?:16|32|64)|f32)$")
_KINDS = {"16": U16, "32": U32, "64": U64}
_BULK = re.compile(
    r"cp\.async\.bulk\.tensor\.([1-5])d\.shared::cluster\.global\.tile"
    r"\.mbarrier::complete_tx::bytes(?:\.L2::cache_hint)?$"
)
_CVTA = {"cvta.shared.u64": SHARED_WINDOW, "cvta.param.u64": PARAM_WINDOW}
_TO_SHARED = ("cvta.to.shared.u64", "cvta.to.shared::cluster.u64")

Copies = tuple[Any, ...]  # lanes, shared addresses, global addresses, sizes; the instruction


def build(one: Instruction, operands: Operands) -> Op | None:
    """None where the opcode moves no data."""
    access = _ACCESS.match(one.opcode)
    bulk = _BULK.match(one.opcode)
    if access:
        return _access(one, operands, access)
    if bulk:
        return _bulk_tensor(one, operands, int(bulk[1]))
    if one.opcode in _CVTA or one.opcode in _TO_SHARED:
        return _convert_address(one, operands)
    others = {
        "cp.async.cg.shared.global": _copy_async,
        "cp.async.mbarrier.arrive.noinc.shared.b64": _arrive_noinc,
        "stmatrix.sync.aligned.m8n8.x4.shared.b16": _store_matrices,
        "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16": _store_matrices,
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16": _store_matrices,
        "prefetch.tensormap": _prefetch,
        "fence.proxy.tensormap::generic.acquire.sys": _acquire_tensor_map,
    }
    return others[one.opcode](one, operands) if one.opcode in others else None


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
    address = operands.address(text, U64 if space == "global" else U32)
    size = count * kind.itemsize
    if load:
        return _load(operands, names, address, size, kind, space == "global")
    sources = [operands.source(name, kind) for name in names]

    def store(f: Any) -> None:
        columns = [np.ascontiguousarray(s(f)[f.lanes]).view(np.uint8) for s in sources]
        data = np.stack([c.reshape(len(f.lanes), -1) for c in columns], axis=1)
        data = data.reshape(len(f.lanes), size)
        where = address(f)[f.lanes]
        if space == "global":
            f.warp.cta.memory.write(where, data)
        else:
            f.warp.cta.shared.write(f.threads, where, data)

    return store


def _load(
    operands: Operands, names: list[str], address: Any, size: int, kind: np.dtype, from_global: bool
) -> Op:
    puts = [operands.sink(name, kind) for name in names]

    def load(f: Any) -> None:
        where, cta = address(f)[f.lanes], f.warp.cta
        if from_global:
            data = cta.memory.read(where, size)
        else:
            data = cta.shared.read(f.threads, where, size)
        values = np.zeros((32, len(puts)), kind)
        values[f.lanes] = data.view(kind)
        for i, put in enumerate(puts):
            put(f, values[:, i].copy())

    return load


def _load_parameter(operands: Operands, name: str, text: str, kind: np.dtype) -> Op:
    put, address = operands.sink(name, kind), operands.address(text)

    def load(f: Any) -> None:
        offset = int(address(f)[0])
        data = f.warp.cta.parameters[offset : offset + kind.itemsize]
        put(f, np.full(32, np.frombuffer(data, kind)[0], kind))

    return load


def _convert_address(one: Instruction, operands: Operands) -> Op:
    """Own shared memory has the same addresses as a part of the cluster's."""
    put, source = operands.sink(one.operands[0], U64), operands.source(one.operands[1], U64)
    window = np.uint64(_CVTA.get(one.opcode, SHARED_WINDOW))
    if one.opcode in _CVTA:
        return lambda f: put(f, source(f) + window)
    return lambda f: put(f, source(f) - window)


def _copy_async(one: Instruction, operands: Operands) -> Op:
    """16 bytes a lane, of which the first `size` come from global memory and the rest are zeros."""
    to, source = operands.address(one.operands[0]), operands.address(one.operands[1], U64)
    if integer(one.operands[2]) != 16:
        raise ValueError(f"{one.where()}: cp.async.cg copies 16 bytes")
    size = operands.source(one.operands[3] if len(one.operands) > 3 else "16", U32)

    def copy(f: Any) -> Any:
        where, count = to(f)[f.lanes], size(f)[f.lanes].astype(np.int64)
        if (count > 16).any():
            raise Fault(f"cp.async of {int(count.max())} bytes of 16")
        origin = source(f)[f.lanes]
        f.warp.cta.shared.begin_write(f.threads, where, 16, GENERIC)
        f.warp.copies.append((f.lanes, where, origin, count, one))
        return YIELD

    return copy


def _arrive_noinc(one: Instruction, operands: Operands) -> Op:
    """Arrives for each lane once all copies that it has issued have landed."""
    address = operands.address(one.operands[0])

    def arrive(f: Any) -> Any:
        cta, count = f.warp.cta, len(f.lanes)
        barrier = cta.barrier(f, address(f))
        copies = _take_copies(f)
        clock = cta.order.publish(f.threads)

        def land() -> None:
            for _, where, origin, size, issued in copies:
                with cta.blaming(issued):
                    data = _gathered(cta.memory, origin, size)
                    cta.shared.land(where, data, barrier.agent, barrier.phase + 1)
            cta.completed(barrier, barrier.arrive(count, clock))

        cta.later(land, one)
        return YIELD

    return arrive


def _take_copies(f: Any) -> list[Copies]:
    """The fragment's share of the copies that its warp has issued."""
    mine, kept = [], []
    for *columns, issued in f.warp.copies:
        own = f.active[columns[0]]
        mine.append((*(column[own] for column in columns), issued))
        if not own.all():
            kept.append((*(column[~own] for column in columns), issued))
    f.warp.copies = kept
    return mine


def _gathered(memory: Any, origin: np.ndarray, count: np.ndarray) -> np.ndarray:
    data = np.zeros((len(origin), 16), np.uint8)
    for size in np.unique(count[count > 0]):
        rows = count == size
        if (origin[rows] % 16 != 0).any():
            raise Fault("misaligned cp.async source")
        data[rows, :size] = memory.read_bytes(origin[rows], int(size))
    return data


def _bulk_tensor(one: Instruction, operands: Operands, rank: int) -> Op:
    """A box from global to shared memory, by one thread."""
    to, barrier_at = operands.address(one.operands[0]), operands.address(one.operands[2])
    map_text, _, corner_text = one.operands[1].strip("[]").partition(",")
    map_at = operands.source(map_text.strip(), U64)
    corner = [operands.source(name, I32) for name in braced(corner_text)]
    if len(corner) != rank:
        raise ValueError(f"{one.where()}: {rank} coordinates expected")

    def copy(f: Any) -> Any:
        cta = f.warp.cta
        if len(f.lanes) != 1:
            raise Fault(f"the same bulk copy by {len(f.lanes)} threads")
        lane = f.lanes[0]
        barrier = cta.barrier(f, barrier_at(f))
        if not barrier.visible_to_copies:
            raise Fault(f"mbarrier {barrier.address}: no fence after its init makes copies see it")
        tensor_map = cta.tensor_map(f, int(map_at(f)[lane]))
        if len(tensor_map.dims) != rank:
            raise Fault(f"{rank} coordinates into a tensor map of {len(tensor_map.dims)} dims")
        where = int(to(f)[lane])
        if where % 128:
            raise Fault(f"bulk tensor copy to {where}, which is no multiple of 128")
        targets = tensor_map.targets(where)
        cta.shared.begin_write(f.threads, targets, 16, ASYNC)
        at = [int(c(f)[lane]) for c in corner]

        def land() -> None:
            data = tensor_map.read_box(cta.memory, at)
            cta.shared.land(targets, data, barrier.agent, barrier.phase + 1)
            cta.completed(barrier, barrier.land(tensor_map.box_bytes))

        cta.later(land, one)
        return YIELD

    return copy


def _acquire_tensor_map(one: Instruction, operands: Operands) -> Op:
    address = operands.address(one.operands[0], U64)
    if integer(one.operands[1]) != 128:
        raise ValueError(f"{one.where()}: a tensor map has 128 bytes")

    def acquire(f: Any) -> None:
        for lane in f.lanes:
            f.warp.acquired_maps.add((int(lane), int(address(f)[lane])))

    return acquire


def decode_tensor_map(f: Any, address: int) -> TensorMap:
    """A kernel's parameter, or 128 bytes of global memory that the thread has acquired."""
    cta = f.warp.cta
    if address % 64:
        raise Fault(f"tensor map at {address:#x}, which is no multiple of 64")
    if PARAM_WINDOW <= address < SHARED_WINDOW:
        offset = address - PARAM_WINDOW
        return TensorMap.decode(cta.parameters[offset : offset + 128])
    if (int(f.lanes[0]), address) not in f.warp.acquired_maps:
        raise Fault("tensor map in global memory used without fence.proxy.tensormap")
    return TensorMap.decode(cta.memory.read_bytes(np.array([address]), 128).tobytes())


def _store_matrices(one: Instruction, operands: Operands) -> Op:
    """8x8 matrices of 16 bits; lane i gives the address of row i % 8 of matrix i // 8."""
    address = operands.address(one.operands[0])
    sources = [operands.source(name, U32) for name in braced(one.operands[1])]
    count = 2 if ".x2." in one.opcode else 4
    if len(sources) != count:
        raise ValueError(f"{one.where()}: {count} registers expected")

    def store(f: Any) -> None:
        # register m of lane 4 * row + pair holds columns 2 * pair and 2 * pair + 1 of matrix m
        words = np.ascontiguousarray(np.stack([s(f) for s in sources]))
        matrices = words.view(np.uint16).reshape(count, 8, 8)
        if ".trans." in one.opcode:
            matrices = matrices.transpose(0, 2, 1)
        rows = np.ascontiguousarray(matrices).reshape(count * 8, 8).view(np.uint8)
        f.warp.cta.shared.write(f.threads[: count * 8], address(f)[: count * 8], rows)

    return store


def _prefetch(one: Instruction, operands: Operands) -> Op:
    """Changes no data."""
    operands.source(one.operands[0].strip("[]"), U64)
    return lambda f: None
