"""CTAs, clusters and grids that execute programs, one scheduling decision at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.ptxsim.barriers import ClusterBarrier, MBarrier, NamedBarrier
from tests.ptxsim.memory import Access, GlobalMemory
from tests.ptxsim.order import GENERIC, Order, Threads, differ
from tests.ptxsim.ordered import OFFSET, RANK_BIT, shared_memory
from tests.ptxsim.outcome import DONE, READY
from tests.ptxsim.ptx import Fault, Instruction
from tests.ptxsim.schedule import Schedule
from tests.ptxsim.warp import Code, Fragment, Trace, Warp


@dataclass(frozen=True)
class Launch:
    """What a host gives to a kernel.

    grid, cluster: CTAs; registers: of a thread, at launch. triggers_at_once: it may let the next
    grid start before it has waited for the one before; what that reads then is the host's to know.
    """

    code: Code
    grid: int
    shared_bytes: int
    registers: int
    parameters: bytes
    cluster: int = 1
    triggers_at_once: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.cluster <= 8 or self.grid % self.cluster:
            raise ValueError(f"a grid of {self.grid} CTAs in clusters of {self.cluster}")
        required = self.code.program.cluster
        if required not in (None, self.cluster):
            raise ValueError(f"clusters of {self.cluster}, the PTX wants {required}")


class Cta:
    """number: in its grid; rank: in its cluster; first: its first thread in the order."""

    def __init__(self, cluster: Cluster, number: int, rank: int, first: int):
        self.cluster, self.number, self.rank, self.grid = cluster, number, rank, cluster.grid
        launch = cluster.grid.launch
        self.code, self.parameters, self.order = launch.code, launch.parameters, cluster.order
        self.shared = shared_memory(launch.shared_bytes, self.order, launch.code.grain)
        self.barriers: dict[int, MBarrier] = {}
        self.named: dict[int, NamedBarrier] = {}
        self.multiplies: dict[int, list] = {}
        self.free_registers = 0
        self.wanting_registers: list[Fragment] = []
        self.threads = np.arange(first, first + self.code.program.threads)
        self.visits = np.zeros(self.order.threads, np.int32)  # latest access by other CTAs' threads
        self.done = False
        self.warps = [
            Warp(self, i, first // 32 + i, launch.registers)
            for i in range(self.code.program.threads // 32)
        ]

    def __str__(self) -> str:
        return f"{self.grid}CTA {self.number}"

    def access(self, threads: Threads) -> Access:
        if self.grid.before is None:
            return Access(threads)
        waited = self.order.known[GENERIC, threads, self.order.grid_before]
        return Access(threads, self.grid.number, not waited.all())

    def owner(self, threads: Threads, address: int) -> tuple[Cta, int]:
        """Whose shared memory a shared::cluster address is in, and where; it is touched now."""
        rank, offset = address >> RANK_BIT, address & OFFSET
        cta = self if rank == 0 else self.cluster.cta(rank - 1)
        if cta is not self:
            cta.visited(threads)
        return cta, offset

    def visited(self, threads: Threads) -> None:
        """By another CTA of the cluster."""
        if self.done:
            raise Fault(f"access to the shared memory of {self}, which has exited")
        self.visits[threads] = self.order.ticks[threads // 32]

    def exits(self, threads: Threads) -> None:
        """After the last thread nobody may touch the CTA's shared memory."""
        self.cluster.release(self.cluster.barrier.exit(threads))
        self.done = all(warp.done for warp in self.warps)
        if not self.done:
            return
        known = self.order.known[GENERIC, self.threads, : self.order.threads].max(axis=0)
        late = np.flatnonzero(self.visits > known)
        if len(late):
            raise Fault(
                f"{self} exits: nothing orders that after the access to its shared memory by "
                f"{self.order.name(int(late[0]))} of its cluster"
            )
        for event in self.cluster.events:
            if event.target is self:
                raise Fault(f"{self} exits before a copy has landed, {event.issued.where()}")
        self.grid.trigger(self)

    def barrier(self, f: Fragment, addresses: np.ndarray) -> MBarrier:
        """The CTA's mbarrier that all lanes of a fragment name."""
        own = addresses[f.own]
        if differ(own):
            raise Fault("lanes name different mbarriers")
        owner, barrier = self.barrier_at(f.threads, int(own[0]))
        if owner is not self:
            raise Fault("the mbarrier is another CTA's")
        return barrier

    def barrier_at(self, threads: Threads, address: int) -> tuple[Cta, MBarrier]:
        owner, offset = self.owner(threads, address)
        if offset not in owner.barriers:
            raise Fault(f"no mbarrier was initialised at {offset} of {owner}")
        barrier = owner.barriers[offset]
        barrier.check_created(threads)
        return owner, barrier


@dataclass
class Event:
    """A copy that will land in target's shared memory."""

    land: Callable[[], None]
    issued: Instruction
    target: Cta


class Cluster:
    """CTAs that see each other's shared memory. first: its first thread in the order."""

    def __init__(self, grid: Grid, number: int, order: Order, first: int):
        self.grid, self.number, self.order = grid, number, order
        self.schedule, self.trace, self.memory = grid.schedule, grid.trace, grid.memory
        self.events: list[Event] = []
        self.running: Fragment | None = None
        self.blamed: Instruction | None = None
        size, threads = grid.launch.cluster, grid.launch.code.program.threads
        self.barrier = ClusterBarrier(order, np.arange(first, first + size * threads))
        self.ctas = [
            Cta(self, number * size + rank, rank, first + rank * threads) for rank in range(size)
        ]
        self.warps = [warp for cta in self.ctas for warp in cta.warps]

    def cta(self, rank: int) -> Cta:
        if rank >= len(self.ctas):
            raise Fault(f"CTA {rank} of a cluster of {len(self.ctas)}")
        return self.ctas[rank]

    def address(self, address: Any, rank: Any) -> Any:
        """shared::cluster address of the same place in a CTA of the cluster. It may be asked for
        where there is no such CTA; only its use is a fault."""
        return (address & OFFSET) | (rank + 1) << RANK_BIT

    @property
    def done(self) -> bool:
        return all(cta.done for cta in self.ctas)

    @property
    def idle(self) -> bool:
        """Nothing to do but to look again whether others have done something."""
        return not self.events and all(warp.polls for warp in self.warps if warp.ready)

    def later(self, land: Callable[[], None], issued: Instruction, target: Cta) -> None:
        self.events.append(Event(land, issued, target))

    def release(self, fragments: list[Fragment]) -> None:
        for f in fragments:
            f.state = READY
        fragments.clear()

    def completed(self, barrier: MBarrier, complete: bool) -> None:
        if complete:
            self.release(barrier.waiters)

    @contextmanager
    def blaming(self, one: Instruction) -> Iterator[None]:
        """A fault inside belongs to an instruction issued before."""
        outer, self.blamed = self.blamed, one
        yield
        self.blamed = outer

    def step(self) -> bool:
        """One warp for a while, or one landing; False where there is neither."""
        ready = [warp for warp in self.warps if warp.ready]
        if self.schedule.lands(len(self.events), len(ready)):
            event = self.events.pop(self.schedule.random.randrange(len(self.events)))
            if self.trace:
                self.trace(f"{event.target} lands {event.issued.where()}")
            with self.blaming(event.issued):
                event.land()
        elif ready:
            self.schedule.warp(ready).run()
        else:
            return False
        return True

    def waiting(self) -> Iterator[str]:
        for warp in self.warps:
            for f in warp.fragments:
                if f.state is not DONE:
                    yield f"  {f.where()} waits for {f.waits_for}"

    def place(self) -> str:
        if self.blamed is not None:
            return f"as it lands: {self.blamed.where()}"
        return self.running.where() if self.running else "before the first instruction"


class Grid:
    """One launch. before: the grid that griddepcontrol.wait waits for."""

    def __init__(
        self, launch: Launch, number: int, before: Grid | None, memory: GlobalMemory,
        schedule: Schedule, trace: Trace | None,
    ):  # fmt: skip
        self.launch, self.number, self.before = launch, number, before
        self.memory, self.schedule, self.trace = memory, schedule, trace
        self.clusters: list[Cluster] = []
        self.triggered: set[int] = set()
        self.waiters: list[Fragment] = []  # of the grid after

    def __str__(self) -> str:
        return f"grid {self.number}, " if self.number or self.before else ""

    def trigger(self, cta: Cta) -> None:
        self.triggered.add(cta.number)

    @property
    def next_may_start(self) -> bool:
        return len(self.triggered) == self.launch.grid

    @property
    def done(self) -> bool:
        return all(cluster.done for cluster in self.clusters)


class Machine:
    """One grid, or two of which the second may start before the first has ended."""

    def __init__(
        self, memory: GlobalMemory, launches: Sequence[Launch], schedule: Schedule,
        trace: Trace | None = None,
    ):  # fmt: skip
        self.schedule = schedule
        self.grids: list[Grid] = []
        for number, launch in enumerate(launches):
            before = self.grids[-1] if self.grids else None
            self.grids.append(Grid(launch, number, before, memory, schedule, trace))
        threads = [launch.grid * launch.code.program.threads for launch in launches]
        together = len(launches) > 1 or bool(memory.workspaces)
        order = Order(sum(threads), sum(launch.grid for launch in launches)) if together else None
        if order:
            memory.attach(order)
        first = 0
        for grid in self.grids:
            launch = grid.launch
            size = launch.cluster * launch.code.program.threads
            for i in range(launch.grid // launch.cluster):
                own = order or Order(size, launch.cluster)
                grid.clusters.append(Cluster(grid, i, own, first if order else 0))
                first += size

    def run(self) -> None:
        """Raises Fault, with its place, at the first defect."""
        current = self.grids[0]
        active, stuck = list(current.clusters), list[Cluster]()
        with np.errstate(all="ignore"):
            while active or stuck:
                if not active:
                    lines = [line for cluster in stuck for line in cluster.waiting()]
                    raise Fault("deadlock\n" + "\n".join([*lines, f"  {self.schedule}"]))
                cluster = self.schedule.cluster(active)
                try:
                    moved = cluster.step()
                except Fault as fault:
                    place = f"{fault}\n  {cluster.place()}\n  {self.schedule}"
                    raise Fault(place) from None
                if not moved:
                    active.remove(cluster)
                    if not cluster.done:
                        stuck.append(cluster)
                    elif cluster.grid.done and cluster.grid.waiters:
                        cluster.release(cluster.grid.waiters)
                        active, stuck = active + stuck, []
                if current is not self.grids[-1] and current.next_may_start:
                    current = self.grids[current.number + 1]
                    active += current.clusters
