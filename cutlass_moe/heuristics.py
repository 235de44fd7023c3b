"""Which config serves a problem: a pure function, no measuring and no host sync."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import ceil
from typing import Any

from emitters.config import Config, GemmSm90Config, GemmSwapSm90Config, Schedule, why_illegal
from emitters.problem import GemmProblem

# Measured on an H200 (perf/NOTES.md).
_SMS = 132
_SWAP_ROWS = ((4, 8), (10, 16), (20, 32), (40, 48))  # at most so many an expert: tiles of so many
_MANY_ROWS = 768  # an expert: pairs of CTAs have M tiles enough to share weights
_EVICT_FIRST_BYTES = 300e6  # of active weights: more of them would only evict one another


def _first_legal(problem: GemmProblem, *configs: Config) -> tuple[Config, ...]:
    """The first of them that can be built, or nothing."""
    return tuple(c for c in configs if why_illegal(problem, c) is None)[:1]


@lru_cache(maxsize=4096)
def _swap(problem: GemmProblem, tile_m: int, tile_n: int, evict_first: bool) -> tuple[Config, ...]:
    """Two CTAs an SM, with about 128 kB of weights on their way: more delay the rows of x."""
    narrow = GemmSwapSm90Config(
        tile_m,
        64,
        k_boxes=2,
        stages=4 if tile_m == 8 else 3,
        ctas_per_sm=2,
        evict_first=evict_first,
    )
    wide = replace(narrow, tile_n=128, stages=2)
    return _first_legal(problem, *((wide, narrow) if tile_n == 128 else (narrow,)))


@lru_cache(maxsize=1024)
def _one_wave(problem: GemmProblem) -> tuple[tuple[Config, ...], tuple[Config, ...]]:
    """For tiles that fill at most a quarter, and half, of the SMs."""
    shared = GemmSwapSm90Config(
        8, 64, k_boxes=2, split_k=4, stages=4, ctas_per_sm=2, evict_first=True
    )
    alone = GemmSwapSm90Config(8, 64, k_boxes=4, stages=4, evict_first=True)
    return _first_legal(problem, shared, alone), _first_legal(problem, alone)


@lru_cache(maxsize=1024)
def _some_rows(problem: GemmProblem) -> tuple[Config, ...]:
    return _widest(problem, 256, pingpong=True, group_m=16) or _widest(problem, 128)


@lru_cache(maxsize=1024)
def _many_rows(problem: GemmProblem) -> tuple[Config, ...]:
    """With weights that pairs of CTAs share."""
    pairs = _widest(problem, 256, pingpong=True, group_m=16, cluster_m=2)
    return pairs or _some_rows(problem)


def _widest(problem: GemmProblem, tile_n: int, **options: Any) -> tuple[Config, ...]:
    """Of 64-row tiles the widest legal one up to tile_n, none wider than N asks for."""
    widths = [n for n in (256, 192, 128, 64) if n <= tile_n and n < problem.n + 64]
    return _first_legal(problem, *(GemmSm90Config(64, n, **options) for n in widths or [64]))


def candidates(problem: GemmProblem) -> tuple[Config, ...]:
    """Every config that `choose` may return for this problem: what a build compiles."""
    found = [*_one_wave(problem), _swap(problem, 8, 64, True), _swap(problem, 8, 64, False)]
    every = _evict_first(problem, problem.num_experts)
    for rows, tile_m in (*_SWAP_ROWS[1:], (_swap_rows(problem), _SWAP_ROWS[-1][1])):
        found.append(_swap(problem, tile_m, _swap_columns(problem, tile_m, rows), every))
    found += [_some_rows(problem), _many_rows(problem)]
    return tuple(dict.fromkeys(config for family in found for config in family))


def choose(
    problem: GemmProblem, num_tokens: int, rows_per_expert: float, schedule: str | None = None
) -> Config:
    """The config for a call. num_tokens: rows of x. rows_per_expert: mean, or the caller's hint.

    schedule: the caller's; where it is not the chosen config's, the template for many rows serves
    the call, and a dynamic schedule has no clusters. Raises ValueError, with the reason, where the
    problem has no legal config.
    """
    family = _family(problem, rows_per_expert) or candidates(problem)[-1:]
    if not family:
        raise ValueError(why_illegal(problem) or f"no config of any template fits {problem}")
    config = family[0]
    if schedule is None or config.schedule == schedule:
        return config
    clusters = rows_per_expert > _MANY_ROWS and schedule != Schedule.DYNAMIC
    (config,) = _many_rows(problem) if clusters else _some_rows(problem)
    assert isinstance(config, GemmSm90Config)
    return replace(config, schedule=Schedule(schedule))


def _family(problem: GemmProblem, rows_per_expert: float) -> tuple[Config, ...]:
    experts = problem.num_experts
    if rows_per_expert > _swap_rows(problem):
        many = rows_per_expert > _MANY_ROWS
        return _many_rows(problem) if many else _some_rows(problem)
    tile_m = next((m for rows, m in _SWAP_ROWS if rows_per_expert <= rows), _SWAP_ROWS[-1][1])
    if tile_m > 8:
        columns = _swap_columns(problem, tile_m, rows_per_expert)
        return _swap(problem, tile_m, columns, _evict_first(problem, experts))
    rows = rows_per_expert * experts
    tiles = min(experts, rows) * -(-problem.n // 64)
    quarter, half = _one_wave(problem)
    if tiles <= _SMS / 2:
        return quarter if tiles <= _SMS / 4 else half
    active = experts * (1 - (1 - 1 / experts) ** rows)  # of a balanced routing
    return _swap(problem, 8, 64, _evict_first(problem, active))


def _swap_rows(problem: GemmProblem) -> float:
    """Rows an expert that swap-AB is for: more where 256 columns a tile would leave SMs idle."""
    idle = problem.num_experts * -(-problem.n // 256) <= _SMS
    return _SWAP_ROWS[-1][0] * (2 if idle else 1)


def _swap_columns(problem: GemmProblem, tile_m: int, rows_per_expert: float) -> int:
    """Columns of a tile: 128, but 64 where the wide ones would all run at once, the last alone."""
    tiles = problem.num_experts * ceil(rows_per_expert / tile_m) * -(-problem.n // 128)
    return 64 if tiles <= 2 * _SMS else 128


def _evict_first(problem: GemmProblem, experts: float) -> bool:
    weight_bytes = experts * problem.n * problem.k * problem.operand.bytes
    return weight_bytes <= _EVICT_FIRST_BYTES
