"""Which config serves a problem: a pure function, no measuring and no host sync."""

from __future__ import annotations

import math
from functools import lru_cache

from emitters.config import Config, GemmSm90Config, why_illegal
from emitters.problem import GemmProblem

# Rows an expert up to which a family of tiles serves (measured on an H200, perf/NOTES.md):
_FEW_ROWS = 32  # 64-row tiles, two CTAs an SM: the weights' bytes are the cost
_SOME_ROWS = 128  # one 128-row tile holds most experts: more CTAs than wide tiles would give

_FAMILIES: tuple[tuple[float, tuple[GemmSm90Config, ...]], ...] = (  # the first legal one is taken
    (_FEW_ROWS, tuple(GemmSm90Config(tile_m=64, tile_n=n, ctas_per_sm=2) for n in (128, 64))),
    (_SOME_ROWS, tuple(GemmSm90Config(tile_m=128, tile_n=n) for n in (128, 64))),
    (math.inf, tuple(GemmSm90Config(tile_m=128, tile_n=n) for n in (256, 128, 64))),
)


@lru_cache(maxsize=1024)
def _by_rows(problem: GemmProblem) -> tuple[tuple[float, Config], ...]:
    """(rows an expert up to which it serves, config) in ascending order; empty if none is legal."""
    legal = (
        (up_to, next((c for c in family if why_illegal(problem, c) is None), None))
        for up_to, family in _FAMILIES
    )
    return tuple((up_to, config) for up_to, config in legal if config is not None)


def candidates(problem: GemmProblem) -> tuple[Config, ...]:
    """Every config that `choose` may return for this problem: what a build compiles."""
    return tuple(dict.fromkeys(config for _, config in _by_rows(problem)))


def choose(problem: GemmProblem, num_tokens: int, rows_per_expert: float) -> Config:
    """The config for a call. num_tokens: rows of x. rows_per_expert: mean, or the caller's hint.

    Raises ValueError, with the reason, where the problem has no legal config.
    """
    for up_to, config in _by_rows(problem):
        if rows_per_expert <= up_to:
            return config
    raise ValueError(why_illegal(problem) or f"no config of the SM90 template fits {problem}")
