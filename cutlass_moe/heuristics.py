"""Which config serves a call: from a table of what was measured, else an estimate. No GPU asked."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from cutlass_moe import tuned
from emitters.config import Config, GemmSm90Config, Schedule, why_illegal
from emitters.problem import GemmProblem

GPU = "NVIDIA H200"  # what calls are planned for where no GPU is asked

# Measured on an H200 (perf/NOTES.md), at powers of two: the limits lie between them.
_SMS = 132
_FEW_ROWS = 45  # an expert: two CTAs an SM, as many loads in flight as can be: weights are the cost
_ONE_TILE_ROWS = 90  # an expert: one 128-row tile holds them, where many need two of 64 rows
_SOME_ROWS = {192: 180, 256: 768}  # an expert, by tile_n: above, pairs of M tiles share weights


class _Families(NamedTuple):
    lone: Config  # less than a tile an SM
    few: Config  # rows an expert, and so on
    one_tile: Config
    some: Config
    many: Config


@lru_cache(maxsize=1024)
def _families(problem: GemmProblem) -> _Families | None:
    """None where nothing is legal."""
    found = (
        _widest(problem, 64, 128),
        _widest(problem, 64, 128, ctas_per_sm=2),
        _widest(problem, 128, 128, pingpong=True, group_m=16),
        _widest(problem, 64, _wide(problem), pingpong=True, group_m=16),
        _widest(problem, 64, _wide(problem), pingpong=True, group_m=16, cluster_m=2),
    )
    legal = [config for config in found if config is not None]
    return _Families(*(config or legal[0] for config in found)) if legal else None


def _wide(problem: GemmProblem) -> int:
    """Columns of wide tiles: a last tile that is partly empty costs more than its share."""
    return 192 if problem.n % 256 and problem.n % 192 == 0 else 256


def _widest(problem: GemmProblem, tile_m: int, tile_n: int, **options: Any) -> Config | None:
    """The widest legal config up to tile_n, none wider than N asks for."""
    widths = [n for n in (256, 192, 128, 64) if n <= tile_n and n < problem.n + 64]
    configs = (GemmSm90Config(tile_m, n, **options) for n in widths or [64])
    return next((c for c in configs if why_illegal(problem, c) is None), None)


def candidates(problem: GemmProblem) -> tuple[Config, ...]:
    """Every config that `choose` may return for this problem: what a build compiles."""
    return tuple(dict.fromkeys((*tuned.configs(problem), *(_families(problem) or ()))))


def choose(
    problem: GemmProblem,
    num_tokens: int,
    rows_per_expert: float,
    schedule: str | None = None,
    gpu: str = GPU,
) -> Config:
    """The config for a call: a tuning table's where one knows GPU and problem, else an estimate.

    num_tokens: rows of x. rows_per_expert: mean, or the caller's hint. schedule: the caller's; all
    else stays, but that a dynamic one has no clusters. Raises ValueError, with the reason, where
    the problem has no legal config.
    """
    config = tuned.lookup(problem, gpu, rows_per_expert)
    config = config or estimate(problem, num_tokens, rows_per_expert)
    if schedule is None:
        return config
    cluster_m = 1 if schedule == Schedule.DYNAMIC else config.cluster_m
    return replace(config, schedule=Schedule(schedule), cluster_m=cluster_m)


def estimate(problem: GemmProblem, num_tokens: int, rows_per_expert: float) -> Config:
    """What `choose` returns where there is no table."""
    found = _families(problem)
    if found is None:
        raise ValueError(why_illegal(problem) or f"no config of the SM90 template fits {problem}")
    if rows_per_expert <= _FEW_ROWS:
        experts = min(problem.num_experts, rows_per_expert * problem.num_experts)
        return found.lone if experts * found.lone.n_tiles(problem) <= _SMS else found.few
    if rows_per_expert <= _ONE_TILE_ROWS:
        return found.one_tile
    return found.some if rows_per_expert <= _SOME_ROWS[_wide(problem)] else found.many
