"""Who may know what: happens-before as vector clocks, in the generic and in the async proxy.

Agents are threads, the WGMMA queues of warps, mbarriers, and the end of the grid before. An access
is stamped with its agent's time; thread t knows it when known[0, t, agent] >= stamp. known[1] holds
what a proxy fence has made good for the async proxy as well. A release publishes what a thread
knows, an acquire takes it over.

An Order is shared by the CTAs of a cluster; by all CTAs where workspaces or a second grid make
them meet in global memory. Threads and warps are numbered through all of its CTAs.
"""

from __future__ import annotations

import numpy as np

BARRIERS = 64  # mbarriers of a CTA
NEVER = np.int32(2**31 - 1)  # stamp of an asynchronous write that has not landed
GENERIC, ASYNC = 0, 1
Threads = np.ndarray  # numbers of threads, ascending
Clock = np.ndarray  # int32 [2, agents]


def consecutive(numbers: np.ndarray) -> np.ndarray | slice:
    """Ascending numbers as a slice, where they are one: rows of an array without a copy."""
    first, end = int(numbers[0]), int(numbers[-1]) + 1
    return slice(first, end) if end - first == len(numbers) else numbers


def some(bools: np.ndarray) -> bool:
    """Whether any is true. Of so few, bytes are searched much faster than arrays."""
    return 1 in bools.tobytes()


def differ(integers: np.ndarray) -> bool:
    """Whether not all are the same."""
    data = integers.tobytes()
    return data != data[: integers.itemsize] * integers.size


class Order:
    def __init__(self, threads: int, ctas: int):
        """threads: of all the CTAs."""
        self.threads, self.warps, self.barriers = threads, threads // 32, 0
        self.most_barriers = BARRIERS * ctas
        self.agents = threads + self.warps + self.most_barriers + 1
        self.grid_before = self.agents - 1  # its time is 1 once griddepcontrol.wait has returned
        self.known = np.zeros((2, threads, self.agents), np.int32)
        self._own = self.known[GENERIC].reshape(-1)[: threads * (self.agents + 1) : self.agents + 1]
        self.ticks = np.zeros(self.warps, np.int32)
        self.everyone = np.arange(threads)
        self.fenced: dict[tuple[int, bool], Clock] = {}  # by thread, and whether all CTAs heard it
        self.observed: dict[int, Clock] = {}  # what relaxed reads of a thread have seen released
        for warp in range(self.warps):
            self._tick(warp)

    def of_warp(self, warp: int) -> Threads:
        return self.everyone[warp * 32 : warp * 32 + 32]

    def queue(self, warp: int) -> int:
        """Agent of a warp's WGMMAs; its time counts them."""
        return self.threads + warp

    def new_barrier(self) -> int:
        """Agent of an mbarrier; its time is 1 more than the number of phases completed."""
        self.barriers += 1
        if self.barriers > self.most_barriers:
            raise ValueError(f"more than {BARRIERS} mbarriers in a CTA")
        return self.threads + self.warps + self.barriers - 1

    def name(self, agent: int) -> str:
        if agent < self.threads:
            return f"thread {agent % 32} of warp {agent // 32}"
        return f"a copy that completes on mbarrier {agent - self.threads - self.warps}"

    def _tick(self, warp: int) -> None:
        """What the warp's threads do from now on is later than what they have published."""
        self.ticks[warp] += 1
        self._own[warp * 32 : warp * 32 + 32] = self.ticks[warp]

    def publish(self, threads: Threads) -> Clock:
        """A release by threads of one warp: what they know together."""
        clock = self.known[:, consecutive(threads)].max(axis=1)
        self._tick(threads[0] // 32)
        return clock

    def acquire(self, threads: Threads, clock: Clock) -> None:
        which = consecutive(threads)
        known = self.known[:, which]
        np.maximum(known, clock[:, None], out=known)
        if not isinstance(which, slice):  # then it was a copy
            self.known[:, which] = known

    def join(self, threads: Threads) -> None:
        """All threads, of one warp, learn what any of them knows."""
        self.acquire(threads, self.publish(threads))

    def fence_async(self, threads: Threads) -> None:
        """fence.proxy.async: what is known becomes good for the async proxy."""
        which = consecutive(threads)
        self.known[ASYNC, which] = self.known[GENERIC, which]
        self._tick(threads[0] // 32)

    def fence(self, threads: Threads, everywhere: bool) -> None:
        """fence.acq_rel: acquires what relaxed reads have seen; relaxed writes from now on release
        what is known here. everywhere: also to other clusters."""
        for thread in threads.tolist():
            seen = self.observed.pop(thread, None)
            if seen is not None:
                self.acquire(np.array([thread]), seen)
            self.fenced[thread, everywhere] = self.known[:, thread].copy()
        self._tick(threads[0] // 32)

    def observe(self, thread: int, clock: Clock) -> None:
        """A relaxed read of what `clock` was released with: a later fence acquires it."""
        seen = self.observed.get(thread)
        self.observed[thread] = clock.copy() if seen is None else np.maximum(seen, clock)

    def behind_fences(self, thread: int, everywhere: bool) -> Clock:
        """What a relaxed write of a thread releases. everywhere: to those in other clusters."""
        clocks = [self.fenced.get((thread, True))]
        clocks += [] if everywhere else [self.fenced.get((thread, False))]
        kept = [clock for clock in clocks if clock is not None]
        return np.max(kept, axis=0) if kept else np.zeros((2, self.agents), np.int32)
