"""Warps and their lanes: a program as functions, and who executes the next of them.

A warp is a set of fragments: lanes that execute together. A branch parts a fragment; an
instruction that needs the whole warp waits until its lanes have met again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from tests.ptxsim import alu, atomics, bulk, synchronisation, transfers, wgmma
from tests.ptxsim.memory import Access
from tests.ptxsim.operands import ALL, LANES, B, Op, Operands, Source, mask_of
from tests.ptxsim.order import consecutive
from tests.ptxsim.outcome import AGAIN, DONE, GATHERING, READY, State
from tests.ptxsim.ptx import Fault, Instruction, Program
from tests.ptxsim.wgmma import Queue

Trace = Callable[[str], None]


class Code:
    """A program as Python functions. Raises ValueError, naming it, for what is not modelled."""

    def __init__(self, program: Program):
        self.program, self.instructions = program, program.instructions
        self.operands = Operands(program, *wgmma.registers(program))
        self.ops = [self._op(one) for one in self.instructions]
        narrow = any(transfers.is_narrow(one.opcode) for one in self.instructions)
        self.grain = 2 if narrow else 4  # bytes by which accesses of shared memory are told apart
        self.guards = [self._guard(one) for one in self.instructions]
        self.plain = [
            op is not None and not synchronisation.is_collective(one.opcode)
            for one, op in zip(self.instructions, self.ops, strict=True)
        ]

    def _op(self, one: Instruction) -> Op | None:
        """None: a branch or an exit, which the warp executes itself."""
        if one.opcode in ("bra", "bra.uni", "ret"):
            return None
        for kind in (alu, transfers, bulk, atomics, synchronisation, wgmma):
            try:
                op = kind.build(one, self.operands)
            except (IndexError, KeyError) as error:
                raise ValueError(f"{one.where()}: operands not understood ({error!r})") from error
            if op is not None:
                return op if one.guard is None else self._guarded(one, op)
        raise ValueError(f"{one.where()}: unknown instruction {one.opcode}")

    def _guarded(self, one: Instruction, op: Op) -> Op:
        """What only those lanes do whose guard is true."""
        if synchronisation.is_collective(one.opcode):
            raise ValueError(f"{one.where()}: a guard on a collective instruction")
        guard = self.operands.source(one.guard or "", B)

        def guarded(f: Fragment) -> Any:
            whole, taken = f.mask, f.mask & _chosen(f, one, guard)
            if not taken:
                return None
            f.become(taken)
            outcome = op(f)
            f.become(whole)
            return outcome

        return guarded

    def _guard(self, one: Instruction) -> Source | None:
        return None if one.guard is None else self.operands.source(one.guard, B)


@lru_cache(maxsize=4096)
def _lanes(mask: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | slice]:
    active = (mask >> LANES & 1) == 1
    lanes = np.flatnonzero(active)
    return active, lanes, consecutive(lanes)


def _chosen(f: Fragment, one: Instruction, guard: Source) -> int:
    """The lanes, as a mask, for which a guard is true."""
    bits = mask_of(guard(f))
    return ~bits if one.negated else bits


class Fragment:
    """Lanes of one warp at one instruction. own: the lanes, to take them out of an array of 32;
    threads: their numbers in the order."""

    def __init__(self, warp: Warp, mask: int, pc: int):
        self.warp, self.pc = warp, pc
        self.state: State = READY
        self.waits_for = ""
        self.become(mask)

    def become(self, mask: int) -> None:
        self.mask = mask
        self.active, self.lanes, self.own = _lanes(mask)
        self.threads = self.lanes + 32 * self.warp.index

    def access(self) -> Access:
        """Of global memory."""
        return self.warp.cta.access(self.threads)

    def where(self) -> str:
        code = self.warp.cta.code
        lanes = "" if self.mask == ALL else f", lanes {self.lanes.tolist()}"
        at = code.instructions[min(self.pc, len(code.instructions) - 1)].where()
        return f"{self.warp.cta}, warp {self.warp.number}{lanes}, {at}"


class Warp:
    """number: in its CTA; index: in the order that the CTA shares with others."""

    def __init__(self, cta: Any, number: int, index: int, registers: int):
        self.cta, self.number, self.index, self.registers = cta, number, index, registers
        self.tid = (LANES + 32 * number).astype(np.uint32)
        count = len(cta.code.program.kinds)
        self.values: list[np.ndarray | None] = [None] * count
        self.valid = [0] * count
        self.queue = Queue()
        self.copies: list[transfers.Copies] = []  # cp.async that nobody has waited for
        self.groups = np.zeros(32, np.int64)  # of cp.async committed, by lane
        self.stores: dict[int, bulk.Stores] = {}  # by lane
        self.acquired_maps: set[tuple[int, int]] = set()
        self.multiplies = 0
        self.seen: dict[tuple[int, int], np.ndarray] = {}  # by atomic loads, by place and lanes
        self.polls = 0  # of them in turn that found nothing new
        self.fragments = [Fragment(self, ALL, 0)]

    @property
    def ready(self) -> bool:
        return READY in [f.state for f in self.fragments]

    @property
    def done(self) -> bool:
        return all(f.state is DONE for f in self.fragments)

    def check_alike(self, one: Instruction, operands: tuple) -> None:
        """The warps of a warpgroup must issue the same WGMMAs."""
        log = self.cta.multiplies.setdefault(self.number // 4, [])
        if self.multiplies == len(log):
            log.append((one, operands))
        elif log[self.multiplies] != (one, operands):
            other = log[self.multiplies][0].where()
            raise Fault(f"the warps of a warpgroup issue different WGMMAs; another one: {other}")
        self.multiplies += 1

    def run(self) -> None:
        """One fragment, for some instructions."""
        schedule = self.cta.cluster.schedule
        ready = [f for f in self.fragments if f.state is READY]
        if len(ready) > 1:
            ready.sort(key=lambda f: f.pc)
        f = ready[0] if schedule.together else schedule.random.choice(ready)
        self.cta.cluster.running = f
        budget = schedule.quantum()
        while budget > 0 and f.state is READY:
            budget -= self._straight(f) if self.cta.code.plain[f.pc] else self._other(f)
            if len(self.fragments) > 1 and schedule.together:
                self._merge(f)
                if f.pc > min(o.pc for o in self.fragments if o.state is READY or o is f):
                    return

    def _straight(self, f: Fragment) -> int:
        """Plain instructions up to the next that is not, or where other lanes may be met."""
        code = self.cta.code
        ops, plain, trace = code.ops, code.plain, self.cta.cluster.trace
        meet = code.program.labels if len(self.fragments) > 1 else ()
        start = f.pc
        while plain[f.pc]:
            if trace:
                trace(f.where())
            outcome = ops[f.pc](f)
            if outcome is None:
                f.pc += 1
                if f.pc in meet:
                    break
                continue
            if outcome is not AGAIN:
                f.pc += 1
            return 1 + 2 * (f.pc - start)
        return f.pc - start

    def _other(self, f: Fragment) -> int:
        """A branch, a guarded or a collective instruction."""
        code, trace = self.cta.code, self.cta.cluster.trace
        one, op, guard = code.instructions[f.pc], code.ops[f.pc], code.guards[f.pc]
        if trace:
            trace(f.where())
        if op is None:
            self._branch(f, one, guard)
            return 1
        if f.mask != ALL:
            self._gather(f)
            return 1
        outcome = op(f)
        if outcome is not AGAIN:
            f.pc += 1
        return 1 if outcome is None else 20

    def _branch(self, f: Fragment, one: Instruction, guard: Source | None) -> None:
        taken = f.mask
        if guard is not None:
            taken &= _chosen(f, one, guard)
        if one.opcode == "bra.uni" and taken not in (0, f.mask):
            raise Fault("lanes part at bra.uni")
        rest = f.mask & ~taken
        if taken and rest:
            other = Fragment(self, rest, f.pc + 1)
            self.fragments.append(other)
            f.become(taken)
        if not taken:
            f.pc += 1
        elif one.opcode == "ret":
            self._exit(f)
        else:
            f.pc = one.target

    def _exit(self, f: Fragment) -> None:
        if self.queue.groups or self.queue.open:
            raise Fault("a warp exits with WGMMAs that no wait_group covered")
        if any(f.active[copy.lanes].any() for copy in self.copies):
            raise Fault("a thread exits with cp.async that nobody waits for")
        if any(lane in self.stores and self.stores[lane].reading for lane in f.lanes.tolist()):
            raise Fault("a thread exits with bulk stores that may still read its shared memory")
        f.state = DONE
        waiting = [other for other in self.fragments if other.state is GATHERING]
        if waiting and all(other.state in (GATHERING, DONE) for other in self.fragments):
            raise Fault(f"divergent: these lanes exit, others wait at {waiting[0].where()}")
        self.cta.exits(f.threads)

    def _gather(self, f: Fragment) -> None:
        """Waits for the warp's other lanes, and goes on with all of them."""
        f.state, f.waits_for = GATHERING, "the other lanes of the warp"
        if any(other.state not in (GATHERING, DONE) for other in self.fragments):
            return
        for other in self.fragments:
            if other.pc != f.pc or other.state is DONE:
                raise Fault(f"divergent: other lanes are at {other.where()} ({other.state.value})")
        self.fragments = [f]
        f.become(ALL)
        f.state = READY

    def _merge(self, f: Fragment) -> None:
        """Lanes that meet at an instruction go on together."""
        if f.state is not READY:
            return
        same = [o for o in self.fragments if o is not f and o.state is READY and o.pc == f.pc]
        for other in same:
            f.become(f.mask | other.mask)
            self.fragments.remove(other)
