"""Which config serves a problem: a pure function, no measuring and no host sync."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from cutlass_moe import tuned
from emitters.config import Config, GemmSm90Config, Schedule, why_illegal
from emitters.problem import GemmProblem

GPU = "NVIDIA H200"  # what calls are planned for where no GPU is asked

# Measured on an H200 (perf/NOTES.md).
_SMS = 132
_FEW_ROWS = 32  # an expert: two CTAs an SM, as many loads in flight as can be: weights are the cost
_MANY_ROWS = 768  # an expert: pairs of CTAs have M tiles enough to share weights


@lru_cache(maxsize=1024)
def _families(problem: GemmProblem) -> tuple[Config, ...]:
    """For less than a tile an SM, few, some and many rows an expert; () where nothing is legal."""
    found = (
        _widest(problem, 128),
        _widest(problem, 128, ctas_per_sm=2),
        _widest(problem, 256, pingpong=True, group_m=16),
        _widest(problem, 256, pingpong=True, group_m=16, cluster_m=2),
    )
    legal = [config for config in found if config is not None]
    return tuple(config or legal[0] for config in found) if legal else ()


def _widest(problem: GemmProblem, tile_n: int, **options: Any) -> Config | None:
    """Of 64-row tiles the widest legal one up to tile_n, none wider than N asks for."""
    widths = [n for n in (256, 192, 128, 64) if n <= tile_n and n < problem.n + 64]
    configs = (GemmSm90Config(64, n, **options) for n in widths or [64])
    return next((c for c in configs if why_illegal(problem, c) is None), None)


def candidates(problem: GemmProblem) -> tuple[Config, ...]:
    """Every config that `choose` may return for this problem: what a build compiles."""
    return tuple(dict.fromkeys((*tuned.configs(problem), *_families(problem))))


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
    families = _families(problem)
    if not families:
        raise ValueError(why_illegal(problem) or f"no config of the SM90 template fits {problem}")
    lone, few, some, many = families
    if rows_per_expert > _FEW_ROWS:
        return some if rows_per_expert <= _MANY_ROWS else many
    experts = min(problem.num_experts, rows_per_expert * problem.num_experts)
    return lone if experts * lone.n_tiles(problem) <= _SMS else few
