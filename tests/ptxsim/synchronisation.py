"""Barriers, collectives of a warp, fences, grids and registers: what orders and what exchanges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptxsim.barriers import MBarrier, NamedBarrier
from tests.ptxsim.operands import (
    ALL,
    LANES,
    U32,
    B,
    Op,
    Operands,
    integer,
    mask_of,
    same,
)
from tests.ptxsim.order import ASYNC, GENERIC, Clock, differ
from tests.ptxsim.outcome import AGAIN, PARKED, WAITING, YIELD
from tests.ptxsim.ptx import Fault, Instruction

_COLLECTIVES = (
    "elect.sync", "shfl.sync", "vote.sync", "match.", "redux.sync", "bar.warp.sync", "bar.sync",
    "bar.arrive", "stmatrix.sync", "wgmma.", "setmaxnreg.",
)  # fmt: skip


def is_collective(opcode: str) -> bool:
    """Whether all lanes of a warp must execute it together."""
    return opcode.startswith(_COLLECTIVES) or ".aligned" in opcode


def build(one: Instruction, operands: Operands) -> Op | None:
    """None where the opcode orders and exchanges nothing."""
    builders: dict[str, Callable[[Instruction, Operands], Op]] = {
        "elect.sync": _elect,
        "shfl.sync.idx.b32": _shuffle,
        "shfl.sync.up.b32": _shuffle,
        "shfl.sync.bfly.b32": _shuffle,
        "vote.sync.ballot.b32": _ballot,
        "match.any.sync.b32": _match,
        "redux.sync.add.s32": _reduce,
        "redux.sync.max.u32": _reduce,
        "redux.sync.min.u32": _reduce,
        "bar.warp.sync": _warp_barrier,
        "bar.sync": _named_barrier,
        "bar.arrive": _named_barrier,
        "barrier.cluster.arrive": _cluster_arrive,
        "barrier.cluster.arrive.aligned": _cluster_arrive,
        "barrier.cluster.arrive.relaxed": _cluster_arrive,
        "barrier.cluster.arrive.relaxed.aligned": _cluster_arrive,
        "barrier.cluster.wait": lambda *_: _cluster_wait,
        "barrier.cluster.wait.aligned": lambda *_: _cluster_wait,
        "mbarrier.init.shared.b64": _init,
        "mbarrier.arrive.shared.b64": _arrive,
        "mbarrier.arrive.expect_tx.shared.b64": _arrive,
        "mbarrier.arrive.shared::cluster.b64": _arrive,
        "mapa.shared::cluster.u32": _map_address,
        "mbarrier.try_wait.parity.shared.b64": _try_wait,
        "fence.mbarrier_init.release.cluster": lambda *_: _fence_init,
        "fence.proxy.async.shared::cta": lambda *_: _fence_proxy,
        "griddepcontrol.launch_dependents": lambda *_: _launch_dependents,
        "griddepcontrol.wait": lambda *_: _wait_for_grid,
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
        leader = f.warp.cta.cluster.schedule.leader
        put_lane(f, same(leader))
        put(f, leader == LANES)

    return elect


def _shuffle(one: Instruction, operands: Operands) -> Op:
    _whole_warp(one, one.operands[4])
    hand = operands.partial_sink(one.operands[0], U32)
    handed = operands.partial(one.operands[1], U32)
    by, bound = operands.source(one.operands[2], U32), integer(one.operands[3])
    segment, clamp = bound >> 8 & 31, bound & 31
    first = LANES & segment
    up, butterfly = ".up." in one.opcode, ".bfly." in one.opcode

    def shuffle(f: Any) -> None:
        step = (by(f) & np.uint32(31)).astype(np.int64)
        if up:
            lane = LANES - step
            lane = np.where(lane >= (first | clamp & ~segment), lane, LANES)
        else:
            last = first | clamp & ~segment
            lane = LANES ^ step if butterfly else first | step & ~segment
            lane = np.where(lane <= last, lane, LANES)
        value, valid = handed(f)
        hand(f, value[lane], valid if valid == ALL else mask_of(valid >> lane & 1 == 1))

    return shuffle


def _ballot(one: Instruction, operands: Operands) -> Op:
    _whole_warp(one, one.operands[2])
    put, predicate = operands.sink(one.operands[0], U32), operands.source(one.operands[1], B)

    def ballot(f: Any) -> None:
        put(f, same(mask_of(predicate(f))))

    return ballot


def _match(one: Instruction, operands: Operands) -> Op:
    _whole_warp(one, one.operands[2])
    put, value = operands.sink(one.operands[0], U32), operands.source(one.operands[1], U32)

    def match(f: Any) -> None:
        same = value(f)[:, None] == value(f)
        put(f, np.packbits(same, axis=1, bitorder="little").view(np.uint32)[:, 0])

    return match


def _reduce(one: Instruction, operands: Operands) -> Op:
    """Its membermask may be a register."""
    put, value = operands.sink(one.operands[0], U32), operands.source(one.operands[1], U32)
    mask = operands.source(one.operands[2], U32)
    function = {"add": np.sum, "max": np.max, "min": np.min}[one.opcode.split(".")[2]]

    def reduce(f: Any) -> None:
        if (mask(f) != ALL).any():
            raise Fault(f"membermask {int(mask(f).min()):#x}, only whole warps are modelled")
        put(f, np.full(32, function(value(f)), np.uint32))

    return reduce


def _warp_barrier(one: Instruction, operands: Operands) -> Op:
    _whole_warp(one, one.operands[0])

    def sync(f: Any) -> Any:
        f.warp.cta.order.join(f.threads)
        return YIELD

    return sync


def _named_barrier(one: Instruction, operands: Operands) -> Op:
    number = operands.source(one.operands[0], U32)
    count = operands.source(
        one.operands[1] if len(one.operands) > 1 else str(operands.program.threads), U32
    )
    waits = one.opcode == "bar.sync"

    def come(f: Any) -> Any:
        cta, name = f.warp.cta, int(number(f)[0])
        if name > 15:
            raise Fault(f"barrier {name} of 0 to 15")
        barrier = cta.named.setdefault(name, NamedBarrier(cta.order))
        if waits:
            f.state, f.waits_for = WAITING, f"bar.sync {name}"
        released = barrier.arrive(f, int(count(f)[0]), waits)
        parked = waits and not released
        cta.cluster.release(released)
        return PARKED if parked else YIELD

    return come


def _cluster_arrive(one: Instruction, operands: Operands) -> Op:
    relaxed = ".relaxed" in one.opcode

    def arrive(f: Any) -> Any:
        cta = f.warp.cta
        clock = _relaxed_clock(f) if relaxed else cta.order.publish(f.threads)
        cta.cluster.release(cta.cluster.barrier.arrive(f.threads, clock))
        return YIELD

    return arrive


def _relaxed_clock(f: Any) -> Clock:
    """What fences of the threads have released: mbarriers' inits, and all before an acq_rel."""
    cta = f.warp.cta
    clocks = [cta.order.behind_fences(thread, everywhere=False) for thread in f.threads.tolist()]
    clock = np.max(clocks, axis=0)
    for barrier in cta.barriers.values():
        if barrier.creator in f.threads and barrier.visible_to_copies:
            clock[GENERIC, barrier.agent] = max(clock[GENERIC, barrier.agent], 1)
    return clock


def _cluster_wait(f: Any) -> Any:
    barrier = f.warp.cta.cluster.barrier
    if barrier.wait(f.threads):
        return YIELD
    f.state, f.waits_for = WAITING, "barrier.cluster.wait"
    barrier.waiters.append(f)
    return AGAIN


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
        warp, lane = divmod(barrier.creator, 32)
        if warp == f.warp.index and f.active[lane]:
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
        cta, where = f.warp.cta, address(f)[f.own]
        numbers = number(f)[f.own].astype(np.int64)
        for at in sorted(set(where.tolist())):
            own = where == at
            threads, count = f.threads[own], int(numbers[own].sum())
            _, barrier = cta.barrier_at(threads, at)
            if expects:
                barrier.expect(count)
                count = len(threads)
            complete = barrier.arrive(count, cta.order.publish(threads))
            cta.cluster.completed(barrier, complete)
        return YIELD

    return arrive


def _map_address(one: Instruction, operands: Operands) -> Op:
    put = operands.sink(one.operands[0], U32)
    address, rank = (operands.source(text, U32) for text in one.operands[1:])

    def map_address(f: Any) -> None:
        put(f, f.warp.cta.cluster.address(address(f), rank(f)))

    return map_address


def _try_wait(one: Instruction, operands: Operands) -> Op:
    """Waits, or gives up for once, as the hardware may."""
    put, address = operands.sink(one.operands[0], B), operands.address(one.operands[1])
    parity = operands.source(one.operands[2], U32)

    def wait(f: Any) -> Any:
        cta = f.warp.cta
        barrier = cta.barrier(f, address(f))
        wanted = parity(f)[f.own]
        if differ(wanted):
            raise Fault("lanes wait for different parities at once")
        if barrier.wait(f.threads, int(wanted[0])):
            put(f, same(True, B))
            return YIELD
        if cta.cluster.schedule.gives_up():
            put(f, same(False, B))
            return YIELD
        f.state, f.waits_for = WAITING, f"parity {wanted[0]} of {barrier.state()}"
        barrier.waiters.append(f)
        return AGAIN

    return wait


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
        cta.cluster.release(cta.wanting_registers)
        return YIELD

    return change


def _launch_dependents(f: Any) -> Any:
    """Unless allowed, not before this grid's own wait: what starts then may read what the grid
    before writes."""
    cta = f.warp.cta
    if cta.access(f.threads).early and not cta.grid.launch.triggers_at_once:
        raise Fault("griddepcontrol.launch_dependents before griddepcontrol.wait")
    cta.grid.trigger(cta)
    return YIELD


def _wait_for_grid(f: Any) -> Any:
    """All that the grid before has done is known then, to all proxies."""
    order, before = f.warp.cta.order, f.warp.cta.grid.before
    if before is None:
        return YIELD
    if not before.done:
        f.state, f.waits_for = WAITING, "the grid before to end"
        before.waiters.append(f)
        return AGAIN
    threads = np.concatenate([cta.threads for cluster in before.clusters for cta in cluster.ctas])
    clock = order.known[:, threads].max(axis=1)
    clock[ASYNC] = clock[GENERIC]
    clock[GENERIC, order.grid_before] = 1
    order.acquire(f.threads, clock)
    return YIELD
