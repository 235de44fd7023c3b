"""mbarriers: phases, pending arrivals, transaction bytes, and who has waited for what."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptxsim.order import GENERIC, Order, Threads
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
        self.creator, self.created = int(threads[0]), int(order.ticks[threads[0] // 32])
        self.visible_to_copies = False  # fence.mbarrier_init, or a proxy fence, by its creator

    def check_created(self, threads: Threads) -> None:
        known = self.order.known[GENERIC, threads, self.creator] >= self.created
        if not known.all():
            raise Fault(f"mbarrier {self.address} used: nothing orders that after its init")

    def arrive(self, count: int, clock: np.ndarray | None) -> bool:
        """True where that completes the phase. clock: what the arriving threads publish."""
        if clock is not None:
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
        self.phase += 1
        self.pending = self.count
        np.maximum(self.done, self.clock, out=self.done)
        self.done[GENERIC, self.agent] = self.phase
        return True

    def wait(self, threads: Threads, parity: int) -> bool:
        """Whether the phase of that parity has completed. A thread must wait for every phase, in
        turn; its first may be the one "before" phase 0."""
        self.check_created(threads)
        if parity not in (0, 1):
            raise Fault(f"parity {parity}")
        last = self.waited[threads]
        target = np.where(last == -2, -parity, last + 1)
        if (target % 2 != parity).any():
            raise Fault(
                f"phase waited for twice, or left out: mbarrier {self.address}, parity {parity}, "
                f"last waited for phase {int(last[target % 2 != parity][0])}"
            )
        complete = self.phase % 2 != parity
        if ((self.phase > target) != complete).any():
            raise Fault(
                f"phase missed: mbarrier {self.address} is in phase {self.phase}, "
                f"a wait for phase {int(target.min())} sees its parity again"
            )
        if complete:
            self.waited[threads] = target
            self.order.acquire(threads, self.done)
        return complete

    def state(self) -> str:
        return (
            f"mbarrier {self.address}: phase {self.phase}, {self.pending} of {self.count} arrivals "
            f"and {self.bytes} bytes missing"
        )


class NamedBarrier:
    """bar.sync: warps that have arrived, until they are as many threads as expected."""

    def __init__(self) -> None:
        self.expected = 0
        self.parked: list[Any] = []

    def arrive(self, fragment: Any, expected: int) -> list[Any]:
        """The fragments that may go on; empty while some are missing."""
        if self.parked and expected != self.expected:
            raise Fault(f"bar.sync of {expected} threads, others expect {self.expected}")
        self.expected = expected
        self.parked.append(fragment)
        count = 32 * len(self.parked)
        if count > expected:
            raise Fault(f"bar.sync of {expected} threads met by {count}")
        if count < expected:
            return []
        released, self.parked = self.parked, []
        return released
