"""mbarriers with phases, arrivals and bytes; barriers of a CTA by name; barriers of a cluster."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptxsim.order import GENERIC, Clock, Order, Threads, consecutive
from tests.ptxsim.ptx import Fault

_MAX_COUNT = 2**20 - 1


class MBarrier:
    def __init__(self, address: int, count: int, order: Order, threads: Threads):
        if not 1 <= count <= _MAX_COUNT:
            raise Fault(f"mbarrier count {count}")
        self.address, self.count, self.pending = address, count, count
        self.order, self.agent = order, order.new_barrier()
        self.bytes = 0  # expected minus arrived
        self.phase = 0  # number of completed phases
        self.clock = np.zeros((2, order.agents), np.int32)  # of this phase's arrivals
        self.done = self.clock.copy()  # what a waiter for a completed phase learns
        self.waited = np.full(order.threads, -2, np.int64)  # last phase waited for, by thread
        self.waiters: list[Any] = []
        self.creator = int(threads[0])
        order.known[GENERIC, self.creator, self.agent] = 1
        self.visible_to_copies = False  # fence.mbarrier_init, or a proxy fence, by its creator

    def check_created(self, threads: Threads) -> None:
        if 0 in self.order.known[GENERIC, consecutive(threads), self.agent].tolist():
            raise Fault(f"mbarrier {self.address} used: nothing orders that after its init")

    @property
    def next_time(self) -> int:
        """Of its agent, once the phase has completed."""
        return self.phase + 2

    def arrive(self, count: int, clock: Clock) -> bool:
        """True where that completes the phase. clock: what the arriving threads publish."""
        np.maximum(self.clock, clock, out=self.clock)
        self.pending -= count
        if self.pending < 0:
            raise Fault(
                f"over-arrival: mbarrier {self.address} counts {self.count}, "
                f"phase {self.phase} had {self.count - self.pending} arrivals"
            )
        return self._complete()

    def expect(self, count: int) -> None:
        self.bytes += count
        self._check_bytes()

    def land(self, count: int) -> bool:
        """complete_tx of `count` bytes; True where that completes the phase."""
        self.bytes -= count
        self._check_bytes()
        return self._complete()

    def _check_bytes(self) -> None:
        if abs(self.bytes) > _MAX_COUNT:
            raise Fault(f"mbarrier {self.address}: transaction count {self.bytes}")

    def _complete(self) -> bool:
        if self.pending or self.bytes:
            return False
        np.maximum(self.done, self.clock, out=self.done)
        self.done[GENERIC, self.agent] = self.next_time
        self.phase += 1
        self.pending = self.count
        return True

    def wait(self, threads: Threads, parity: int) -> bool:
        """Whether the phase of that parity has completed: of the last one that a thread knows to
        have, and the next, the one that it means. No phase may be waited for twice, nor one left
        out that the thread does not know to have completed. The phase "before" phase 0 has."""
        if parity not in (0, 1):
            raise Fault(f"parity {parity}")
        which = consecutive(threads)
        known = self.order.known[GENERIC, which, self.agent] - 1
        target = known - ((known & 1) ^ parity)
        pairs = set(zip(target.tolist(), self.waited[which].tolist(), strict=True))
        for phase, last in pairs:
            if phase <= last:
                raise Fault(
                    f"phase waited for twice, or left out: mbarrier {self.address}, "
                    f"parity {parity}, last waited for phase {last}"
                )
        complete = self.phase % 2 != parity
        first = min(pairs)[0]
        if any((self.phase > phase) != complete for phase, _ in pairs):
            raise Fault(
                f"phase missed: mbarrier {self.address} is in phase {self.phase}, "
                f"a wait for phase {first} sees its parity again"
            )
        if complete:
            self.waited[which] = target
            self.order.acquire(threads, self.done)
        return complete

    def state(self) -> str:
        return (
            f"mbarrier {self.address}: phase {self.phase}, {self.pending} of {self.count} arrivals "
            f"and {self.bytes} bytes missing"
        )


class NamedBarrier:
    """bar.sync and bar.arrive: warps that have come, until they are as many threads as expected."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self._clear()

    def _clear(self) -> None:
        self.expected = 0
        self.came: set[int] = set()  # warps
        self.clock = np.zeros((2, self.order.agents), np.int32)
        self.parked: list[Any] = []

    def arrive(self, fragment: Any, expected: int, waits: bool) -> list[Any]:
        """The fragments that may go on; empty while some are missing, or none waits."""
        if self.came and expected != self.expected:
            raise Fault(f"barrier of {expected} threads, others expect {self.expected}")
        if expected % 32:
            raise Fault(f"barrier of {expected} threads: no multiple of a warp")
        if fragment.warp.index in self.came:
            raise Fault("a warp comes to a barrier for the second time before it completes")
        self.expected = expected
        self.came.add(fragment.warp.index)
        np.maximum(self.clock, self.order.publish(fragment.threads), out=self.clock)
        if waits:
            self.parked.append(fragment)
        count = 32 * len(self.came)
        if count > expected:
            raise Fault(f"barrier of {expected} threads met by {count}")
        if count < expected:
            return []
        released, clock = self.parked, self.clock
        self._clear()
        for other in released:
            self.order.acquire(other.threads, clock)
        return released


_AWAY, _ARRIVED, _FREE = range(3)


class ClusterBarrier:
    """barrier.cluster: every thread of the cluster that has not exited arrives, then waits."""

    def __init__(self, order: Order, threads: Threads):
        self.order, self.first = order, int(threads[0])
        self.state = np.full(len(threads), _AWAY, np.int8)
        self.exited = np.zeros(len(threads), np.bool_)
        self.clock = np.zeros((2, order.agents), np.int32)
        self.done = self.clock.copy()
        self.waiters: list[Any] = []

    def arrive(self, threads: Threads, clock: Clock) -> list[Any]:
        """The fragments that may go on."""
        own = threads - self.first
        if (self.state[own] != _AWAY).any():
            raise Fault("barrier.cluster.arrive for the second time, without a wait in between")
        self.state[own] = _ARRIVED
        np.maximum(self.clock, clock, out=self.clock)
        return self._complete()

    def exit(self, threads: Threads) -> list[Any]:
        """The same of threads that will never come."""
        self.exited[threads - self.first] = True
        return self._complete()

    def _complete(self) -> list[Any]:
        here = self.state == _ARRIVED
        if not here.any() or not (here | self.exited).all():
            return []
        self.state[here] = _FREE
        self.done, self.clock = self.clock, np.zeros_like(self.clock)
        return self.waiters

    def wait(self, threads: Threads) -> bool:
        """Whether all have arrived."""
        own = threads - self.first
        if (self.state[own] == _AWAY).any():
            raise Fault("barrier.cluster.wait without an arrive")
        if (self.state[own] == _ARRIVED).any():
            return False
        self.state[own] = _AWAY
        self.order.acquire(threads, self.done)
        return True
