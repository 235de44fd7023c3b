"""CTAs, warps and lanes that execute a program, one scheduling decision at a time.

A warp is a set of fragments: lanes that execute together. A branch parts a fragment; an
instruction that needs the whole warp waits until its lanes have met again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tests.ptxsim import alu, synchronisation, transfers
from tests.ptxsim.barriers import MBarrier, NamedBarrier
from tests.ptxsim.memory import GlobalMemory, SharedMemory
from tests.ptxsim.operands import ALL, LANES, B, Op, Operands, Source
from tests.ptxsim.order import Order
from tests.ptxsim.outcome import AGAIN, DONE, GATHERING, READY, State
from tests.ptxsim.ptx import Fault, Instruction, Program
from tests.ptxsim.schedule import Schedule
from tests.ptxsim.tensormap import TensorMap
from tests.ptxsim.wgmma import Queue

Trace = Callable[[str], None]


class Code:
    """A program as Python functions. Raises ValueError, naming it, for what is not modelled."""

    def __init__(self, program: Program):
        self.program, self.instructions = program, program.instructions
        accumulators = {
            program.registers[name.strip()]
            for one in program.instructions
            if one.opcode.startswith("wgmma.mma_async")
            for name in one.operands[0].strip("{}").split(",")
        }
        self.operands = Operands(program, accumulators)
        self.ops = [self._op(one) for one in self.instructions]
        self.guards = [self._guard(one) for one in self.instructions]
        self.plain = [
            op is not None and not one.opcode.startswith(synchronisation.COLLECTIVES)
            for one, op in zip(self.instructions, self.ops, strict=True)
        ]

    def _op(self, one: Instruction) -> Op | None:
        """None: a branch or an exit, which the warp executes itself."""
        if one.opcode in ("bra", "bra.uni", "ret"):
            return None
        for kind in (alu, transfers, synchronisation):
            try:
                op = kind.build(one, self.operands)
            except (IndexError, KeyError) as error:
                raise ValueError(f"{one.where()}: operands not understood ({error!r})") from error
            if op is not None and one.guard is not None:
                raise ValueError(f"{one.where()}: a guard on anything but a branch")
            if op is not None:
                return op
        raise ValueError(f"{one.where()}: unknown instruction {one.opcode}")

    def _guard(self, one: Instruction) -> Source | None:
        return None if one.guard is None else self.operands.source(one.guard, B)


@lru_cache(maxsize=4096)
def _lanes(mask: int) -> tuple[np.ndarray, np.ndarray]:
    active = (mask >> LANES & 1) == 1
    return active, np.flatnonzero(active)


class Fragment:
    """Lanes of one warp at one instruction."""

    def __init__(self, warp: Warp, mask: int, pc: int):
        self.warp, self.pc = warp, pc
        self.state: State = READY
        self.waits_for = ""
        self.become(mask)

    def become(self, mask: int) -> None:
        self.mask = mask
        self.active, self.lanes = _lanes(mask)
        self.threads = self.lanes + 32 * self.warp.number

    def where(self) -> str:
        code = self.warp.cta.code
        lanes = "" if self.mask == ALL else f", lanes {self.lanes.tolist()}"
        at = code.instructions[min(self.pc, len(code.instructions) - 1)].where()
        return f"CTA {int(self.warp.cta.ctaid[0])}, warp {self.warp.number}{lanes}, {at}"


class Warp:
    def __init__(self, cta: Cta, number: int, registers: int):
        self.cta, self.number, self.registers = cta, number, registers
        self.tid = (LANES + 32 * number).astype(np.uint32)
        count = len(cta.code.program.kinds)
        self.values: list[np.ndarray | None] = [None] * count
        self.valid = [0] * count
        self.queue = Queue()
        self.copies: list[tuple] = []  # cp.async that no arrive has taken up
        self.acquired_maps: set[tuple[int, int]] = set()
        self.multiplies = 0
        self.fragments = [Fragment(self, ALL, 0)]

    @property
    def ready(self) -> bool:
        return any(f.state is READY for f in self.fragments)

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
        schedule = self.cta.schedule
        ready = [f for f in self.fragments if f.state is READY]
        if len(ready) > 1:
            ready.sort(key=lambda f: f.pc)
        f = ready[0] if schedule.together else schedule.random.choice(ready)
        self.cta.running = f
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
        ops, plain, trace = code.ops, code.plain, self.cta.trace
        meet = code.program.labels if len(self.fragments) > 1 else ()
        start = f.pc
        while plain[f.pc]:
            if trace:
                trace(f.where())
            outcome = ops[f.pc](f)  # type: ignore[misc]
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
        code = self.cta.code
        one, op, guard = code.instructions[f.pc], code.ops[f.pc], code.guards[f.pc]
        if self.cta.trace:
            self.cta.trace(f.where())
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
            bits = int(np.packbits(guard(f), bitorder="little").view(np.uint32)[0])
            taken &= ~bits if one.negated else bits
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
        if any(f.active[lanes].any() for lanes, *_ in self.copies):
            raise Fault("a thread exits with cp.async that nobody waits for")
        f.state = DONE
        waiting = [other for other in self.fragments if other.state is GATHERING]
        if waiting and all(other.state in (GATHERING, DONE) for other in self.fragments):
            raise Fault(f"divergent: these lanes exit, others wait at {waiting[0].where()}")

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


@dataclass(frozen=True)
class Launch:
    """What a host gives to a kernel; registers: of a thread, at launch."""

    grid: int
    shared_bytes: int
    registers: int
    parameters: bytes
    memory: GlobalMemory


class Cta:
    def __init__(
        self, code: Code, launch: Launch, ctaid: int, schedule: Schedule, trace: Trace | None
    ):
        self.code, self.parameters, self.memory = code, launch.parameters, launch.memory
        self.schedule, self.trace, self.leader = schedule, trace, schedule.leader
        self.ctaid = np.full(32, ctaid, np.uint32)
        self.nctaid = np.full(32, launch.grid, np.uint32)
        self.order = Order(code.program.threads)
        self.shared = SharedMemory(launch.shared_bytes, self.order)
        self.barriers: dict[int, MBarrier] = {}
        self.named: dict[int, NamedBarrier] = {}
        self.multiplies: dict[int, list] = {}
        self.events: list[tuple[Callable[[], None], Instruction]] = []
        self.free_registers = 0
        self.wanting_registers: list[Fragment] = []
        self.running: Fragment | None = None
        self.blamed: Instruction | None = None
        self.warps = [Warp(self, i, launch.registers) for i in range(self.order.warps)]

    def barrier(self, f: Fragment, addresses: np.ndarray) -> MBarrier:
        """The mbarrier that all lanes of a fragment name."""
        own = addresses[f.lanes]
        if (own != own[0]).any():
            raise Fault("lanes name different mbarriers")
        if int(own[0]) not in self.barriers:
            raise Fault(f"no mbarrier was initialised at {int(own[0])}")
        barrier = self.barriers[int(own[0])]
        barrier.check_created(f.threads)
        return barrier

    def completed(self, barrier: MBarrier, complete: bool) -> None:
        if complete:
            for f in barrier.waiters:
                f.state = READY
            barrier.waiters.clear()

    def tensor_map(self, f: Fragment, address: int) -> TensorMap:
        return transfers.decode_tensor_map(f, address)

    def later(self, land: Callable[[], None], issued: Instruction) -> None:
        self.events.append((land, issued))

    @contextmanager
    def blaming(self, one: Instruction) -> Iterator[None]:
        """A fault inside belongs to an instruction issued before."""
        outer, self.blamed = self.blamed, one
        yield
        self.blamed = outer

    def step(self) -> bool:
        """One warp for a while, or one landing; False once the CTA has finished."""
        ready = [warp for warp in self.warps if warp.ready]
        if self.schedule.lands(len(self.events), len(ready)):
            land, issued = self.events.pop(self.schedule.random.randrange(len(self.events)))
            if self.trace:
                self.trace(f"CTA {int(self.ctaid[0])} lands {issued.where()}")
            with self.blaming(issued):
                land()
        elif ready:
            self.schedule.warp(ready).run()
        elif all(warp.done for warp in self.warps):
            return False
        else:
            raise Fault("deadlock\n" + "\n".join(self._waiting()))
        self._check_exit()
        return True

    def _check_exit(self) -> None:
        if self.events and all(warp.done for warp in self.warps):
            issued = self.events[0][1]
            raise Fault(f"the CTA exits before a copy has landed, {issued.where()}")

    def _waiting(self) -> Iterator[str]:
        for warp in self.warps:
            for f in warp.fragments:
                if f.state is not DONE:
                    yield f"  {f.where()} waits for {f.waits_for}"


class Machine:
    """A grid of CTAs that share global memory."""

    def __init__(self, code: Code, launch: Launch, schedule: Schedule, trace: Trace | None = None):
        self.schedule = schedule
        self.ctas = [Cta(code, launch, i, schedule, trace) for i in range(launch.grid)]

    def run(self) -> None:
        """Raises Fault, with its place, at the first defect."""
        active = list(self.ctas)
        with np.errstate(all="ignore"):
            while active:
                cta = self.schedule.random.choice(active)
                try:
                    if not cta.step():
                        active.remove(cta)
                except Fault as fault:
                    raise Fault(f"{fault}\n  {_place(cta)}\n  {self.schedule}") from None


def _place(cta: Cta) -> str:
    if cta.blamed is not None:
        return f"CTA {int(cta.ctaid[0])}, as it lands: {cta.blamed.where()}"
    return cta.running.where() if cta.running else "before the first instruction"
