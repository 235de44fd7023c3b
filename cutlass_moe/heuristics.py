"""Which config serves a problem: a pure function, no measuring and no host sync."""

from __future__ import annotations

from functools import lru_cache

from emitters.config import Config, GemmSm90Config, Raster, why_illegal
from emitters.problem import GemmProblem

_WIDE_WEIGHT = (
    24 << 20
)  # bytes of one expert's weights beyond which its tiles run along M: see NOTES.md
_FEW_ROWS = 64  # rows an expert up to which one 64-row tile holds them


@lru_cache(maxsize=1024)
def candidates(problem: GemmProblem) -> tuple[Config, ...]:
    """Every config that `choose` may return for this problem: what a build compiles."""
    few = (GemmSm90Config(tile_m=64, tile_n=n, ctas_per_sm=2) for n in (128, 64))
    raster = Raster.ALONG_N
    if problem.n * problem.k * problem.operand.bytes > _WIDE_WEIGHT:
        raster = Raster.ALONG_M
    many = (GemmSm90Config(tile_m=128, tile_n=n, raster=raster) for n in (256, 128, 64))
    chosen = []
    for family in (few, many):
        legal = (config for config in family if why_illegal(problem, config) is None)
        chosen.extend([config] if (config := next(legal, None)) else [])
    return tuple(chosen)


def choose(problem: GemmProblem, num_tokens: int, rows_per_expert: float) -> Config:
    """The config for a call. num_tokens: rows of x. rows_per_expert: mean, or the caller's hint.

    Raises ValueError where the problem has no legal config.
    """
    configs = candidates(problem)
    if not configs:
        raise ValueError(why_illegal(problem) or f"no legal config for {problem}")
    return configs[0] if rows_per_expert <= _FEW_ROWS else configs[-1]
