"""Who may know what: happens-before as vector clocks, in the generic and in the async proxy.

Agents are the threads of a CTA, the WGMMA queues of its warps and its mbarriers. An access is
stamped with its agent's time; thread t knows it when known[0, t, agent] >= stamp. known[1] holds
what a proxy fence has made good for the async proxy as well. A release publishes what a thread
knows, an acquire takes it over.
"""

from __future__ import annotations

import numpy as np

BARRIERS = 64  # mbarriers of a CTA
NEVER = np.int32(2**31 - 1)  # stamp of an asynchronous write that has not landed
GENERIC, ASYNC = 0, 1
Threads = np.ndarray  # numbers of threads of one CTA


class Order:
    def __init__(self, threads: int):
        self.threads, self.warps = threads, threads // 32
        self.agents = threads + self.warps + BARRIERS
        self.known = np.zeros((2, threads, self.agents), np.int32)
        self.ticks = np.zeros(self.warps, np.int32)
        self.barriers = 0
        self.everyone = np.arange(threads)
        for warp in range(self.warps):
            self._tick(warp)

    def queue(self, warp: int) -> int:
        """Agent of a warp's WGMMAs; its time counts them."""
        return self.threads + warp

    def new_barrier(self) -> int:
        """Agent of an mbarrier; its time is the number of phases completed."""
        self.barriers += 1
        if self.barriers > BARRIERS:
            raise ValueError(f"more than {BARRIERS} mbarriers in a CTA")
        return self.threads + self.warps + self.barriers - 1

    def _tick(self, warp: int) -> None:
        """What the warp's threads do from now on is later than what they have published."""
        self.ticks[warp] += 1
        own = self.everyone[warp * 32 : warp * 32 + 32]
        self.known[GENERIC, own, own] = self.ticks[warp]

    def publish(self, threads: Threads) -> np.ndarray:
        """A release by threads of one warp: what they know together, [2, agents]."""
        clock = self.known[:, threads].max(axis=1)
        self._tick(threads[0] // 32)
        return clock

    def acquire(self, threads: Threads, clock: np.ndarray) -> None:
        self.known[:, threads] = np.maximum(self.known[:, threads], clock[:, None])

    def join(self, threads: Threads) -> None:
        """All of them learn what any of them knows."""
        self.acquire(threads, self.known[:, threads].max(axis=1))
        for warp in np.unique(threads // 32):
            self._tick(warp)

    def fence_async(self, threads: Threads) -> None:
        """fence.proxy.async: what is known becomes good for the async proxy."""
        self.known[ASYNC, threads] = self.known[GENERIC, threads]
        self._tick(threads[0] // 32)
