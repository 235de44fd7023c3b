"""Which config serves a call: from a table of what was measured, else an estimate. No GPU asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from math import ceil
from typing import Any

from cutlass_moe.choose import tuned
from emitters.spec.arch import SM90
from emitters.spec.config_sm90 import GemmSm90Config, GemmSwapSm90Config, Schedule
from emitters.spec.gemm import GemmProblem
from emitters.spec.layer_steps import (
    MAX_ROW,
    CombineProblem,
    QuantizeProblem,
    RouteLogitsProblem,
    RouteProblem,
    StepConfig,
    TopkProblem,
)
from emitters.spec.registry import Config, GemmConfig, Problem, as_gemm, why_illegal

GPU = "NVIDIA H200"  # what calls are planned for where no GPU is asked

# Measured on an H200 (perf/README.md), at powers of two: the limits lie between them.
_SWAP_ROWS = ((2.5, 8), (10, 16), (20, 32), (40, 48))  # at most so many an expert: tiles of so many
_LONG_ROW_BYTES = 4096  # of K: tiles of 16 rows that take so long are better narrow than wide
_ONE_TILE_ROWS = 90  # an expert: one 128-row tile holds them, where many need two of 64 rows
_MANY_ROWS = {192: 180, 256: 768}  # an expert, by tile_n: above, pairs of CTAs share weights
FEW_PAIRS = 1024  # that 256 threads route faster than 1024 do
# threads of a CTA that quantises rows of at most so many elements
_ROW_THREADS = ((8192, 128), (16_384, 256), (MAX_ROW, 512))
_EVICT_FIRST_BYTES = 300e6  # of active weights: more of them would only evict one another


def _first_legal(problem: GemmProblem, *configs: GemmConfig) -> tuple[GemmConfig, ...]:
    """The first of them that can be built, or nothing."""
    return tuple(c for c in configs if why_illegal(problem, c) is None)[:1]


@lru_cache(maxsize=4096)
def _swap(
    problem: GemmProblem, tile_m: int, tile_n: int, evict_first: bool
) -> tuple[GemmConfig, ...]:
    """Two CTAs an SM, with about 128 kB of weights on their way, but no more than a tile's: more
    delay the rows of x."""
    wide = GemmSwapSm90Config(
        tile_m, 128, k_boxes=2, stages=2, ctas_per_sm=2, evict_first=evict_first
    )
    stages = 4 if tile_m <= 16 and wide.k_stages(problem) > 3 else 3
    narrow = replace(wide, tile_n=64, stages=stages)
    # of gate and up of N-major weights only the wide one is legal
    return _first_legal(problem, *((wide, narrow) if tile_n == 128 else (narrow, wide)))


@lru_cache(maxsize=1024)
def _one_wave(problem: GemmProblem) -> tuple[tuple[GemmConfig, ...], tuple[GemmConfig, ...]]:
    """For tiles that fill at most a quarter, and at most all, of the SMs."""
    shared = GemmSwapSm90Config(
        8, 64, k_boxes=2, split_k=4, stages=4, ctas_per_sm=2, evict_first=True
    )
    alone = GemmSwapSm90Config(8, 64, k_boxes=4, stages=4, evict_first=True)
    others = _swap(problem, 8, 64, True)
    return _first_legal(problem, shared, alone, *others), _first_legal(problem, alone, *others)


@lru_cache(maxsize=1024)
def _one_tile(problem: GemmProblem) -> tuple[GemmConfig, ...]:
    """With 128 rows, which hold an expert's."""
    return _widest(problem, 128, 128, pingpong=True, group_m=16) or _some_rows(problem)


@lru_cache(maxsize=1024)
def _some_rows(problem: GemmProblem) -> tuple[GemmConfig, ...]:
    wide = _widest(problem, 64, _wide(problem), pingpong=True, group_m=16)
    return wide or _widest(problem, 64, 128)


@lru_cache(maxsize=1024)
def _many_rows(problem: GemmProblem) -> tuple[GemmConfig, ...]:
    """With weights that pairs of CTAs share."""
    pairs = _widest(problem, 64, _wide(problem), pingpong=True, group_m=16, cluster_m=2)
    return pairs or _some_rows(problem)


def _wide(problem: GemmProblem) -> int:
    """Columns of wide tiles: a last tile that is partly empty costs more than its share."""
    # gate and up take 128 together
    return 192 if problem.n % 256 and problem.n % 192 == 0 and not problem.gated else 256


def _widest(
    problem: GemmProblem, tile_m: int, tile_n: int, **options: Any
) -> tuple[GemmConfig, ...]:
    """The widest legal config up to tile_n, none wider than N asks for."""
    multiple = 128 if problem.gated else 64
    widths = [n for n in (256, 192, 128, 64) if n <= tile_n and n < problem.n + multiple]
    return _first_legal(
        problem, *(GemmSm90Config(tile_m, n, **options) for n in widths or [multiple])
    )


def every_config(problem: Problem) -> tuple[Config, ...]:
    """That calls of this problem may take: what a build compiles."""
    gemm = as_gemm(problem)
    if gemm is not None:
        return candidates(gemm)
    return tuple(dict.fromkeys((step_config(problem), step_config(problem, few=True))))


def candidates(problem: GemmProblem) -> tuple[GemmConfig, ...]:
    """Every config that `choose` may return for this problem."""
    return tuple(dict.fromkeys((*tuned.configs(problem), *_estimates(problem))))


def _estimates(problem: GemmProblem) -> tuple[GemmConfig, ...]:
    """Every config that `estimate` may return."""
    found = [*_one_wave(problem), _swap(problem, 8, 64, True), _swap(problem, 8, 64, False)]
    every = _evict_first(problem, problem.num_experts)
    for rows in (*(rows for rows, _ in _SWAP_ROWS[1:]), _swap_rows(problem)):
        found.append(_swap(problem, *_swap_tile(problem, rows), every))
    found += [_one_tile(problem), _some_rows(problem), _many_rows(problem)]
    return tuple(dict.fromkeys(config for family in found for config in family))


def step_config(problem: Problem, few: bool = False) -> StepConfig:
    """Of a layer's other kernels. few: for at most FEW_PAIRS of a RouteProblem."""
    return StepConfig(_THREADS[problem.op](problem, few))


# of a CTA, by op
_THREADS: dict[str, Callable[[Any, bool], int]] = {
    RouteProblem.op: lambda p, few: max(256, -(-p.num_experts // 32) * 32) if few else 1024,
    RouteLogitsProblem.op: lambda p, few: 512,
    TopkProblem.op: lambda p, few: 128,
    QuantizeProblem.op: lambda p, few: next(t for k, t in _ROW_THREADS if p.k <= k),
    CombineProblem.op: lambda p, few: 128,
}


def choose(
    problem: GemmProblem,
    num_tokens: int,
    rows_per_expert: float,
    schedule: str | None = None,
    gpu: str = GPU,
) -> GemmConfig:
    """The config for a call: a tuning table's where one knows GPU and problem, else an estimate.

    num_tokens: rows of x. rows_per_expert: mean, or the caller's hint. schedule: the caller's;
    where swap-AB was chosen, which has one only, the template for many rows serves the call, and a
    dynamic schedule has no clusters. Raises ValueError, with the reason, where no config is legal.
    """
    config = tuned.lookup(problem, gpu, rows_per_expert)
    config = config or estimate(problem, num_tokens, rows_per_expert)
    if schedule is None:
        return config
    scheduled = config.scheduled(Schedule(schedule))
    if scheduled is None:
        (config,) = _some_rows(problem)
        scheduled = config.scheduled(Schedule(schedule))
        assert scheduled is not None
    return scheduled


def origin(problem: GemmProblem, rows_per_expert: float, gpu: str) -> str:
    """Where `choose` takes a config from: "tuning table" or "estimate"."""
    return "tuning table" if tuned.lookup(problem, gpu, rows_per_expert) else "estimate"


def estimate(problem: GemmProblem, num_tokens: int, rows_per_expert: float) -> GemmConfig:
    """What `choose` returns where there is no table."""
    family = _family(problem, rows_per_expert) or _estimates(problem)[-1:]
    if not family:
        raise ValueError(why_illegal(problem) or f"no config of any template fits {problem}")
    return family[0]


def _family(problem: GemmProblem, rows_per_expert: float) -> tuple[GemmConfig, ...]:
    experts = problem.num_experts
    if rows_per_expert > _swap_rows(problem):
        if rows_per_expert <= _ONE_TILE_ROWS:
            return _one_tile(problem)
        many = rows_per_expert > _MANY_ROWS[_wide(problem)]
        return _many_rows(problem) if many else _some_rows(problem)
    if rows_per_expert > _SWAP_ROWS[0][0]:
        tile = _swap_tile(problem, rows_per_expert)
        return _swap(problem, *tile, _evict_first(problem, experts))
    rows = rows_per_expert * experts
    tiles = min(experts, rows) * -(-problem.n // 64)
    quarter, whole = _one_wave(problem)
    if tiles <= SM90.sms:
        return quarter if tiles <= SM90.sms / 4 else whole
    active = experts * (1 - (1 - 1 / experts) ** rows)  # of a balanced routing
    return _swap(problem, 8, 64, _evict_first(problem, active))


def _swap_rows(problem: GemmProblem) -> float:
    """Rows an expert that swap-AB is for: more where 256 columns a tile would leave SMs idle."""
    idle = problem.num_experts * -(-problem.n // 256) <= SM90.sms
    return _SWAP_ROWS[-1][0] * (2 if idle else 1)


def _swap_tile(problem: GemmProblem, rows_per_expert: float) -> tuple[int, int]:
    """Rows and columns of a tile: 128 columns, but 64 where the wide ones would all run at once,
    the last alone. The rest of a crowded expert's rows is then a wave of its own, which costs less
    where tiles have 32 rows than where they have 48."""
    tile_m = next((m for rows, m in _SWAP_ROWS if rows_per_expert <= rows), _SWAP_ROWS[-1][1])
    tiles = problem.num_experts * ceil(rows_per_expert / tile_m) * -(-problem.n // 128)
    if tiles <= 2 * SM90.sms:
        return min(tile_m, 32), 64
    long_rows = problem.k * problem.x.bytes >= _LONG_ROW_BYTES
    return tile_m, 64 if tile_m == 16 and long_rows else 128


def _evict_first(problem: GemmProblem, experts: float) -> bool:
    weight_bytes = experts * problem.n * problem.k * problem.x.bytes
    return weight_bytes <= _EVICT_FIRST_BYTES
