"""Which config serves a problem: a pure function, no measuring and no host sync."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
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
def _swap(problem: GemmProblem, tile_m: int, evict_first: bool) -> tuple[Config, ...]:
    """Two CTAs an SM, with about 128 kB of weights on their way: more delay the rows of x."""
    narrow = GemmSwapSm90Config(
        tile_m, 64, k_boxes=2, stages=4, ctas_per_sm=2, evict_first=evict_first
    )
    wide = GemmSwapSm90Config(
        tile_m, 128, k_boxes=2, stages=2, ctas_per_sm=2, evict_first=evict_first
    )
    return _first_legal(problem, *((narrow,) if tile_m == 8 else (wide, narrow)))


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
    found = [*_one_wave(problem), _swap(problem, 8, True), _swap(problem, 8, False)]
    every = _weight_bytes(problem, problem.num_experts)
    found += [_swap(problem, m, every <= _EVICT_FIRST_BYTES) for _, m in _SWAP_ROWS[1:]]
    found += [_some_rows(problem), _many_rows(problem)]
    return tuple(dict.fromkeys(config for family in found for config in family))


def choose(
    problem: GemmProblem, num_tokens: int, rows_per_expert: float, schedule: str | None = None
) -> Config:
    """The config for a call. num_tokens: rows of x. rows_per_expert: mean, or the caller's hint.

    schedule: the caller's; only the template for many rows has a choice, so that it serves such a
    call, whatever its rows, and a dynamic schedule has no clusters. Raises ValueError, with the
    reason, where the problem has no legal config.
    """
    if schedule is None:
        family = _family(problem, rows_per_expert) or candidates(problem)[-1:]
    else:
        family = _scheduled(problem, rows_per_expert, Schedule(schedule))
    if not family:
        raise ValueError(why_illegal(problem) or f"no config of any template fits {problem}")
    return family[0]


def _scheduled(
    problem: GemmProblem, rows_per_expert: float, schedule: Schedule
) -> tuple[Config, ...]:
    clusters = schedule is not Schedule.DYNAMIC and rows_per_expert > _MANY_ROWS
    family = _many_rows(problem) if clusters else _some_rows(problem)
    return tuple(replace(c, schedule=schedule) for c in family if isinstance(c, GemmSm90Config))


def _family(problem: GemmProblem, rows_per_expert: float) -> tuple[Config, ...]:
    if rows_per_expert > _SWAP_ROWS[-1][0]:
        many = rows_per_expert > _MANY_ROWS
        return _many_rows(problem) if many else _some_rows(problem)
    tile_m = next(m for rows, m in _SWAP_ROWS if rows_per_expert <= rows)
    experts = problem.num_experts
    if tile_m > 8:
        return _swap(problem, tile_m, _weight_bytes(problem, experts) <= _EVICT_FIRST_BYTES)
    rows = rows_per_expert * experts
    tiles = min(experts, rows) * -(-problem.n // 64)
    quarter, half = _one_wave(problem)
    if tiles <= _SMS / 2:
        return quarter if tiles <= _SMS / 4 else half
    active = experts * (1 - (1 - 1 / experts) ** rows)  # of a balanced routing
    return _swap(problem, 8, _weight_bytes(problem, active) <= _EVICT_FIRST_BYTES)


def _weight_bytes(problem: GemmProblem, experts: float) -> float:
    return experts * problem.n * problem.k * problem.operand.bytes
