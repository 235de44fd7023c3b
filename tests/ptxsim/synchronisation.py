"""Barriers, collectives of a warp, fences, WGMMA and registers: what orders and what exchanges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptxsim.barriers import MBarrier, NamedBarrier
from tests.ptxsim.operands import ALL, LANES, U32, U64, B, Op, Operands, integer
from tests.ptxsim.outcome import AGAIN, PARKED, READY, WAITING, YIELD
from tests.ptxsim.ptx import Fault, Instruction
from tests.ptxsim.wgmma import BUSY, Multiply, Shape

COLLECTIVES = (
    "elect.sync", "shfl.sync", "vote.sync", "bar.warp.sync", "bar.sync", "stmatrix.sync",
    "wgmma.", "setmaxnreg.",
)  # fmt: skip


def build(one: Instruction, operands: Operands) -> Op | None:
    if one.opcode.startswith("wgmma.mma_async"):
        return _multiply(one, operands)
    builders: dict[str, Callable[[Instruction, Operands], Op]] = {
        "elect.sync": _elect,
        "shfl.sync.idx.b32": _shuffle,
        "shfl.sync.up.b32": _shuffle,
        "vote.sync.ballot.b32": _ballot,
        "bar.warp.sync": _warp_barrier,
        "bar.sync": _named_barrier,
        "mbarrier.init.shared.b64": _init,
        "mbarrier.arrive.shared.b64": _arrive,
        "mbarrier.arrive.expect_tx.shared.b64": _arrive,
        "mbarrier.try_wait.parity.shared.b64": _try_wait,
        "fence.mbarrier_init.release.cluster": lambda *_: _fence_init,
        "fence.proxy.async.shared::cta": lambda *_: _fence_proxy,
        "wgmma.fence.sync.aligned": lambda *_: _fence_registers,
        "wgmma.commit_group.sync.aligned": lambda *_: _commit,
        "wgmma.wait_group.sync.aligned": _wait_group,
        "setmaxnreg.inc.sync.aligned.u32": _set_registers,
        "setmaxnreg.dec.sync.aligned.u32": _set_registers,
    }
    return builders[one.opcode](one, operands) if one.opcode in builders else None


def _whole_warp(one: Instruction, mask: str) -> None:
    if integer(mask) & ALL != ALL:
        raise ValueError(f"{one.where()}: membermask {mask}, only whole warps are modelled")


def _elect(one: Instruction, operands: Operands) -> Op:
    """PTX promises the same leader each time, not which."""
    _whole_warp(one, one.operands[1])
    lane_name, predicate_name = one.operands[0].split("|")
    put_lane, put = operands.sink(lane_name, U32), operands.sink(predicate_name, B)

    def elect(f: Any) -> None:
        leader = f.warp.cta.leader
        put_lane(f, np.full(32, leader, np.uint32))
        put(f, leader == LANES)

    return elect


def _shuffle(one: Instruction, operands: Operands) -> Op:
    _whole_warp(one, one.operands[4])
    put, value = operands.sink(one.operands[0], U32), operands.source(one.operands[1], U32)
    by, bound = operands.source(one.operands[2], U32), integer(one.operands[3])
    segment, clamp = bound >> 8 & 31, bound & 31
    first = LANES & segment
    up = ".up." in one.opcode

    def shuffle(f: Any) -> None:
        step = (by(f) & np.uint32(31)).astype(np.int64)
        if up:
            lane = LANES - step
            lane = np.where(lane >= (first | clamp & ~segment), lane, LANES)
        else:
            last = first | clamp & ~segment
            lane = first | step & ~segment
            lane = np.where(lane <= last, lane, LANES)
        put(f, value(f)[lane])

    return shuffle


def _ballot(one: Instruction, operands: Operands) -> Op:
    _whole_warp(one, one.operands[2])
    put, predicate = operands.sink(one.operands[0], U32), operands.source(one.operands[1], B)

    def ballot(f: Any) -> None:
        bits = int(np.packbits(predicate(f), bitorder="little").view(np.uint32)[0])
        put(f, np.full(32, bits, np.uint32))

    return ballot


def _warp_barrier(one: Instruction, operands: Operands) -> Op:
    _whole_warp(one, one.operands[0])

    def sync(f: Any) -> Any:
        f.warp.cta.order.join(f.threads)
        return YIELD

    return sync


def _named_barrier(one: Instruction, operands: Operands) -> Op:
    number = operands.source(one.operands[0], U32)
    count = integer(one.operands[1]) if len(one.operands) > 1 else operands.program.threads

    def sync(f: Any) -> Any:
        cta = f.warp.cta
        barrier = cta.named.setdefault(int(number(f)[0]), NamedBarrier())
        f.state, f.waits_for = WAITING, f"bar.sync {int(number(f)[0])}"
        released = barrier.arrive(f, count)
        if released:
            cta.order.join(np.concatenate([other.threads for other in released]))
        for other in released:
            other.state = READY
        return YIELD if released else PARKED

    return sync


def _init(one: Instruction, operands: Operands) -> Op:
    address, count = operands.address(one.operands[0]), operands.source(one.operands[1], U32)

    def init(f: Any) -> None:
        cta = f.warp.cta
        if len(f.lanes) != 1:
            raise Fault(f"mbarrier.init by {len(f.lanes)} threads")
        at = int(address(f)[f.lanes[0]])
        if at in cta.barriers:
            raise Fault(f"second mbarrier.init at {at}")
        cta.shared.take_for_barrier(at)
        cta.barriers[at] = MBarrier(at, int(count(f)[f.lanes[0]]), cta.order, f.threads)

    return init


def _fence_init(f: Any) -> None:
    for barrier in f.warp.cta.barriers.values():
        if barrier.creator in f.threads:
            barrier.visible_to_copies = True


def _fence_proxy(f: Any) -> None:
    f.warp.cta.order.fence_async(f.threads)
    _fence_init(f)


def _arrive(one: Instruction, operands: Operands) -> Op:
    """Each lane arrives; expect_tx: with bytes to come, else with a count."""
    address = operands.address(one.operands[1])
    number = operands.source(one.operands[2] if len(one.operands) > 2 else "1", U32)
    expects = "expect_tx" in one.opcode

    def arrive(f: Any) -> Any:
        cta = f.warp.cta
        barrier = cta.barrier(f, address(f))
        each = number(f)[f.lanes].astype(np.int64)
        if expects:
            barrier.expect(int(each.sum()))
        count = len(f.lanes) if expects else int(each.sum())
        cta.completed(barrier, barrier.arrive(count, cta.order.publish(f.threads)))
        return YIELD

    return arrive


def _try_wait(one: Instruction, operands: Operands) -> Op:
    """Waits, or gives up for once, as the hardware may."""
    put, address = operands.sink(one.operands[0], B), operands.address(one.operands[1])
    parity = operands.source(one.operands[2], U32)

    def wait(f: Any) -> Any:
        cta = f.warp.cta
        barrier = cta.barrier(f, address(f))
        wanted = parity(f)[f.lanes]
        if (wanted != wanted[0]).any():
            raise Fault("lanes wait for different parities at once")
        if barrier.wait(f.threads, int(wanted[0])):
            put(f, np.ones(32, np.bool_))
            return YIELD
        if cta.schedule.gives_up():
            put(f, np.zeros(32, np.bool_))
            return YIELD
        f.state, f.waits_for = WAITING, f"parity {wanted[0]} of {barrier.state()}"
        barrier.waiters.append(f)
        return AGAIN

    return wait


def _multiply(one: Instruction, operands: Operands) -> Op:
    shape = Shape.parse(one.opcode)
    registers = operands.numbers(one.operands[0])
    a, b = (operands.source(name, U64) for name in one.operands[1:3])
    accumulate = operands.source(one.operands[3], B)
    if len(registers) != shape.n // 2:
        raise ValueError(f"{one.where()}: {shape.n // 2} accumulators expected")
    rest = one.operands[4:]
    expected = [] if shape.integer else ["1", "1"] + (["0", "0"] if "16" in shape.a else [])
    if rest != expected:
        raise ValueError(f"{one.where()}: scales and transpositions {rest}, modelled: {expected}")

    def multiply(f: Any) -> Any:
        warp = f.warp
        first = (int(a(f)[0]), int(b(f)[0]), bool(accumulate(f)[0]))
        for source, value in zip((a, b, accumulate), first, strict=True):
            if (source(f) != value).any():
                raise Fault("operands differ among the lanes of a warp")
        warp.check_alike(one, first)
        part = Multiply(shape, warp.number % 4, *first, registers)
        _own(warp, part)
        queue = warp.queue
        queue.issued += 1
        part.number = queue.issued
        for chunks in part.chunks():
            warp.cta.shared.queue_read(warp.number, part.number, chunks)
        queue.open.append(part)
        if warp.cta.schedule.reads_early():
            part.fetch(warp.cta.shared)
        return YIELD

    return multiply


def _own(warp: Any, part: Multiply) -> None:
    """The accumulators belong to the WGMMA until a wait_group covers it."""
    queue = warp.queue
    if not queue.fenced:
        raise Fault("WGMMA before the first wgmma.fence")
    touched = queue.touched.intersection(part.registers)
    if touched:
        raise Fault("accumulators touched since the last wgmma.fence")
    for number in part.registers:
        if part.accumulate and not queue.owned.get(number) and warp.valid[number] != ALL:
            raise Fault("accumulators added to before they have values")
        queue.owned[number] = queue.owned.get(number, 0) + 1
        warp.valid[number] = BUSY


def _fence_registers(f: Any) -> None:
    f.warp.queue.touched.clear()
    f.warp.queue.fenced = True


def _commit(f: Any) -> None:
    queue = f.warp.queue
    queue.groups.append(queue.open)
    queue.open = []


def _wait_group(one: Instruction, operands: Operands) -> Op:
    remaining = integer(one.operands[0])

    def wait(f: Any) -> Any:
        warp, queue = f.warp, f.warp.queue
        while len(queue.groups) > remaining:
            for part in queue.groups.pop(0):
                _retire(warp, part)
        return YIELD

    return wait


def _retire(warp: Any, part: Multiply) -> None:
    cta, queue = warp.cta, warp.queue
    part.fetch(cta.shared)
    values = part.result([warp.values[n] for n in part.registers] if part.accumulate else [])
    for number, value in zip(part.registers, values, strict=True):
        warp.values[number] = value
        queue.owned[number] -= 1
        if not queue.owned[number]:
            warp.valid[number] = ALL
    threads = cta.order.everyone[warp.number * 32 : warp.number * 32 + 32]
    cta.order.known[0, threads, cta.order.queue(warp.number)] = part.number


def _set_registers(one: Instruction, operands: Operands) -> Op:
    count = integer(one.operands[0])
    more = ".inc." in one.opcode
    if count % 8 or not 24 <= count <= 256:
        raise ValueError(f"{one.where()}: a multiple of 8 from 24 to 256")

    def change(f: Any) -> Any:
        warp, cta = f.warp, f.warp.cta
        if count != warp.registers and (count > warp.registers) != more:
            raise Fault(f"{one.opcode} {count} of a warp with {warp.registers} registers a thread")
        needed = 32 * (count - warp.registers)
        if needed > cta.free_registers:
            f.state, f.waits_for = WAITING, f"{needed} registers, {cta.free_registers} are free"
            cta.wanting_registers.append(f)
            return AGAIN
        cta.free_registers -= needed
        warp.registers = count
        for other in cta.wanting_registers:
            other.state = READY
        cta.wanting_registers.clear()
        return YIELD

    return change
