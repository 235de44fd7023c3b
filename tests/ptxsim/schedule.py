"""Who runs next and when asynchronous work lands: seeded, and as unkind as its mode says."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from os import environ
from typing import Any

MODES = {
    "random": "warps, lanes and copies in any order",
    "late_copies": "copies land when nothing else can run",
    "early_copies": "copies land at once, WGMMAs read their operands at once",
    "slow_producer": "the first warpgroup runs when no other warp can",
    "slow_consumer": "the first warpgroup runs whenever it can",
    "starved_warp": "one warp runs when no other can",
    "starved_cta": "one CTA runs when no other can",
    "apart": "lanes that a branch parts stay apart until a .sync brings them together",
}
SCHEDULES = int(environ.get("PTXSIM_SCHEDULES") or 0)  # of each run; 0: what its test says


class Schedule:
    def __init__(self, seed: int, mode: str = "random"):
        if mode not in MODES:
            raise ValueError(f"mode {mode!r}: one of {', '.join(MODES)}")
        self.seed, self.mode = seed, mode
        self.random = random.Random(f"{mode} {seed}")
        self.leader = self.random.randrange(32)
        self.starved = self.random.randrange(64)
        self.together = mode != "apart"

    def __str__(self) -> str:
        return f"seed {self.seed}, mode {self.mode}"

    def gives_up(self) -> bool:
        """Whether an mbarrier.try_wait returns false before its time."""
        return self.random.random() < 0.05

    def reads_early(self) -> bool:
        """Whether a WGMMA reads its operands when it is issued, else when it is waited for."""
        return self.mode == "early_copies" or self.random.random() < 0.3

    def lands(self, pending: int, ready: int) -> bool:
        """Whether a pending copy lands now, rather than a warp running."""
        if not pending or not ready:
            return pending > 0
        if self.mode == "late_copies":
            return False
        return self.mode == "early_copies" or self.random.random() < 0.3

    def cluster(self, active: Sequence[Any]) -> Any:
        if self.mode != "starved_cta" or len(active) == 1:
            return self.random.choice(active)
        starved = self.starved % len(active[0].grid.clusters)
        preferred = [c for c in active if c.number != starved and not c.idle]
        return self.random.choice(preferred or active)

    def warp(self, ready: Sequence[Any]) -> Any:
        busy = [warp for warp in ready if not warp.polls] or ready
        preferred = [warp for warp in busy if not self._last(warp)]
        return self.random.choice(preferred or busy)

    def _last(self, warp: Any) -> bool:
        if self.mode == "slow_producer":
            return warp.number < 4
        if self.mode == "slow_consumer":
            return warp.number >= 4
        if self.mode == "starved_cta":
            return warp.cta.rank == self.starved % len(warp.cta.cluster.ctas)
        return self.mode == "starved_warp" and warp.number == self.starved % len(warp.cta.warps)

    def quantum(self) -> int:
        """Instructions until another warp may run."""
        return self.random.choice((3, 30, 300))


def in_turn(runs: Iterable[str], name: str, schedules: int = 1) -> list[Schedule]:
    """Of one of some runs, which take the modes in turn; so many schedules, or SCHEDULES."""
    count, modes = SCHEDULES or schedules, list(MODES)
    first = count * list(runs).index(name)
    return [Schedule(seed, modes[seed % len(modes)]) for seed in range(first, first + count)]
