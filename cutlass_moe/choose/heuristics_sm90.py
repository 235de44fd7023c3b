"""The choice of a config for a call: from a tuning table, else an estimate.

Estimates were made on an H200. For another GPU they follow its number of SMs, its L2 and how many
operations it does per byte, which nobody has measured; what they give is still one of the configs
that are built for an H200, so that the same images serve every GPU of an architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from math import ceil
from typing import Any

from cutlass_moe.choose import packed_sm90, tuned, waves_sm90
from cutlass_moe.choose.gpus import gpu_of
from cutlass_moe.choose.weight_grads_sm90 import weight_grad_configs
from emitters.spec.arch import H200, Gpu
from emitters.spec.config_sm90 import GemmSm90Config
from emitters.spec.config_swap_sm90 import GemmSwapSm90Config
from emitters.spec.gemm import GemmProblem, Major
from emitters.spec.layer_steps import (
    MAX_ROW,
    ActivateBackwardProblem,
    ActivateProblem,
    CombineProblem,
    GatherSumProblem,
    QuantizeGroupsProblem,
    QuantizeProblem,
    RouteLogitsProblem,
    RouteProblem,
    StepConfig,
    TopkProblem,
)
from emitters.spec.registry import Config, GemmConfig, Problem, as_gemm, why_illegal
from emitters.spec.staged_sm90 import K_TILE_BYTES, Schedule
from emitters.spec.weight_grad import WeightGradProblem

GPU = H200.name  # the GPU to choose for where none is named, as in a build

# Measured on an H200 (perf/README.md) at powers of two; the limits lie between them.
_SWAP_ROWS = ((2.5, 8), (10, 16), (20, 32), (40, 48))  # (rows per expert up to, tile_m)
_LONG_ROW_BYTES = 4096  # from this many bytes of K on, tiles of 16 rows are faster if narrow
# From this K on, training's products with N dense, and its up projections that store two outputs,
# are faster in pairs of shared tiles: by 3 to 5%, by 11% at K 28,672, and not yet at 2,048.
_LONG_SUM = 4096
_ONE_TILE_ROWS = 90  # up to this many rows per expert, one tile of 128 rows beats two of 64
# Two-level sums of gathered rows: between these numbers of rows per expert one tile of 192 rows
# beats two of 128, by 5 to 19%; with sums as short as this and more rows than that, by 14%.
_THREE_ROWS, _SHORT_SUM, _THREE_SHORT_ROWS = 180, 1024, 400
_MANY_ROWS = {192: 180, 256: 768}  # by tile_n: with more rows per expert, CTA pairs share weights
FEW_PAIRS = 1024  # up to this many pairs, 256 threads route faster than 1024
# (elements per row up to, threads per CTA) for quantisation
_ROW_THREADS = ((8192, 128), (16_384, 256), (MAX_ROW, 512))
_EVICT_FIRST_BYTES = 300e6  # with more active weights, an H200's L2 had them evict one another

Family = tuple[GemmConfig, ...]


def _first_legal(problem: GemmProblem, *configs: GemmConfig) -> tuple[GemmConfig, ...]:
    """The first of the configs that can be built, or nothing."""
    found = (tuned.with_loads(problem, config) for config in configs)
    return tuple(c for c in found if why_illegal(problem, c) is None)[:1]


@lru_cache(maxsize=4096)
def _swap(
    problem: GemmProblem, tile_m: int, tile_n: int, evict_first: bool
) -> tuple[GemmConfig, ...]:
    """A swap-AB config with two CTAs per SM and about 128 kB of weights in flight.

    In flight are at most the weights of one tile, because more would delay the rows of x.
    """
    if tile_m == 8 and problem.k * problem.x.bytes <= K_TILE_BYTES:
        # a tile is one stage: a third CTA hides what comes before and after it
        short = GemmSwapSm90Config(tile_m, 128, stages=2, ctas_per_sm=3, evict_first=evict_first)
        found = _first_legal(problem, short)
        if found:
            return found
    wide = GemmSwapSm90Config(
        tile_m, 128, k_boxes=2, stages=2, ctas_per_sm=2, evict_first=evict_first
    )
    stages = 4 if tile_m <= 16 and wide.k_stages(problem) > 3 else 3
    narrow = replace(wide, tile_n=64, stages=stages)
    # for gated N-major weights only the wide one is legal
    return _first_legal(problem, *((wide, narrow) if tile_n == 128 else (narrow, wide)))


@lru_cache(maxsize=1024)
def _one_wave(problem: GemmProblem) -> tuple[tuple[GemmConfig, ...], tuple[GemmConfig, ...]]:
    """The configs if all tiles fill at most a quarter of the SMs, and if they fill at most all."""
    shared = GemmSwapSm90Config(
        8, 64, k_boxes=2, split_k=4, stages=4, ctas_per_sm=2, evict_first=True
    )
    alone = GemmSwapSm90Config(8, 64, k_boxes=4, stages=4, evict_first=True)
    others = _swap(problem, 8, 64, True)
    return _first_legal(problem, shared, alone, *others), _first_legal(problem, alone, *others)


@lru_cache(maxsize=1024)
def _one_tile(problem: GemmProblem) -> tuple[GemmConfig, ...]:
    """A config with tiles of 128 rows, for experts whose rows fit in one."""
    if problem.two_level:
        return _some_rows(problem)
    return _widest(problem, 128, 128, pingpong=True, group_m=16) or _some_rows(problem)


@lru_cache(maxsize=1024)
def _some_rows(problem: GemmProblem) -> tuple[GemmConfig, ...]:
    """A config with tiles of 64 rows; for two-level accumulation of 128, which consumers share.

    In ping-pong the tensor core would wait for each consumer's additions; consumers that share a
    tile add in turn.
    """
    if problem.two_level:
        return _widest(problem, 128, _wide(problem)) or _widest(problem, 64, 128)
    wide = _widest(problem, *_tile_in_turn(problem), pingpong=True, group_m=16)
    return wide or _widest(problem, 64, 128)


@lru_cache(maxsize=1024)
def _three_consumers(problem: GemmProblem) -> tuple[GemmConfig, ...]:
    """A config for two-level accumulation with tiles of 192 rows.

    While one of three consumers adds, the other two keep the tensor core busy. With scales along K
    there is none for gathered rows: the producer's copies would take longer than the products.
    """
    three = _first_legal(problem, GemmSm90Config(192, 128)) if problem.two_level else ()
    return three or _some_rows(problem)


@lru_cache(maxsize=1024)
def _many_rows(problem: GemmProblem) -> tuple[GemmConfig, ...]:
    """A config in which pairs of CTAs share weights."""
    if problem.two_level:
        return _some_rows(problem)  # pairs were slower in all but three of 24 cases
    trained = problem.stored or problem.weight.major is Major.N and problem.sole_output
    if trained and problem.k >= _LONG_SUM and problem.n >= 256:
        shared = _first_legal(problem, GemmSm90Config(128, 256, group_m=16, cluster_m=2))
        if shared:
            return shared
    if _tile_in_turn(problem) == (64, 192) and not problem.gather:
        return _widest(problem, 128, 192) or _some_rows(problem)  # faster than pairs by 5%, a mean
    pairs = _widest(problem, *_tile_in_turn(problem), pingpong=True, group_m=16, cluster_m=2)
    return pairs or _some_rows(problem)


def _tile_in_turn(problem: GemmProblem) -> tuple[int, int]:
    """The tile of consumers that take turns; with an activation's gradient, whose slices take
    memory, a wide one has too few stages."""
    return (64, _wide(problem)) if problem.gradient is None else (128, 128)


def _wide(problem: GemmProblem) -> int:
    """The columns of wide tiles: 192 if N is a multiple of it and not of 256, else 256.

    A partly empty last tile costs more than its share.
    """
    # gated tiles must have a multiple of 128 columns
    return 192 if problem.n % 256 and problem.n % 192 == 0 and not problem.gated else 256


def _widest(
    problem: GemmProblem, tile_m: int, tile_n: int, **options: Any
) -> tuple[GemmConfig, ...]:
    """The widest legal config up to tile_n columns that N can fill."""
    multiple = 128 if problem.gated else 64
    if problem.quantized_out:
        multiple *= 2
    widths = [n for n in (256, 192, 128, 64) if n <= tile_n and n < problem.n + multiple]
    return _first_legal(
        problem, *(GemmSm90Config(tile_m, n, **options) for n in widths or [multiple])
    )


def every_config(problem: Problem) -> tuple[Config, ...]:
    """Every config that a call may choose for this problem: a build compiles them all."""
    gemm = as_gemm(problem)
    if gemm is not None:
        return candidates(gemm)
    if isinstance(problem, WeightGradProblem):
        return weight_grad_configs(problem)
    return tuple(dict.fromkeys((step_config(problem), step_config(problem, few=True))))


def candidates(problem: GemmProblem) -> tuple[GemmConfig, ...]:
    """Every config that `choose` may return for this problem."""
    found = (*tuned.configs(problem), *_estimates(problem))
    copied = (_copied(problem, config) for config in found if problem.block_rows)
    return tuple(dict.fromkeys((*found, *copied)))


def _copied(problem: GemmProblem, config: GemmConfig) -> GemmConfig:
    """The config where threads copy scales along K one by one, and rows in order too, as TMA can't
    read the scales. Copies take longer for smaller tiles, unless a second CTA on the SM has others
    under way."""
    if not isinstance(config, GemmSm90Config):
        return config
    if not config.tma_x:
        return replace(config, scale_span=1)
    found = _some_rows(problem) if config.ctas_per_sm == 1 else (config,)
    return next(replace(c, tma_x=False) for c in found if isinstance(c, GemmSm90Config))


def _estimates(problem: GemmProblem) -> tuple[GemmConfig, ...]:
    """Every config that `estimate` may return."""
    if problem.weight.packing:
        return packed_sm90.candidates(problem)
    families = [*_one_wave(problem), _swap(problem, 8, 64, True), _swap(problem, 8, 64, False)]
    evict_first = _evict_first(problem, problem.num_experts, H200)
    for rows in (*(rows for rows, _ in _SWAP_ROWS[1:]), _swap_rows(problem, H200)):
        families.append(_swap(problem, *_swap_tile(problem, rows, H200), evict_first))
    families += [f(problem) for f in (_one_tile, _some_rows, _many_rows, _three_consumers)]
    if problem.two_level and not problem.gather:
        families.append(tuple(t.config for t in waves_sm90.tiles_of(problem, _wide(problem))))
    return tuple(dict.fromkeys(config for family in families for config in family))


def step_config(problem: Problem, few: bool = False) -> StepConfig:
    """The config of a layer's step. few: for a RouteProblem, that there are at most FEW_PAIRS."""
    return StepConfig(_THREADS[problem.op](problem, few))


# Threads per CTA, by op.
_THREADS: dict[str, Callable[[Any, bool], int]] = {
    RouteProblem.op: lambda p, few: max(256, -(-p.num_experts // 32) * 32) if few else 1024,
    RouteLogitsProblem.op: lambda p, few: 512,
    TopkProblem.op: lambda p, few: 128,
    QuantizeProblem.op: lambda p, few: next(t for k, t in _ROW_THREADS if p.k <= k),
    QuantizeGroupsProblem.op: lambda p, few: 128,
    CombineProblem.op: lambda p, few: 128,
    GatherSumProblem.op: lambda p, few: 128,
    ActivateProblem.op: lambda p, few: 128,
    ActivateBackwardProblem.op: lambda p, few: 128,
}


def choose(
    problem: GemmProblem,
    num_tokens: int,
    rows_per_expert: float,
    schedule: str | None = None,
    gpu: str = GPU,
    wide_scales: bool = True,
) -> GemmConfig:
    """The config for a call: from a tuning table that knows GPU and problem, else an estimate.

    num_tokens: rows of x. rows_per_expert: the mean, or the caller's hint. schedule: the caller's
    wish. The swap-AB template has one schedule only, so another one brings a config of the template
    for many rows; a dynamic schedule has no clusters. Packed weights keep theirs. wide_scales:
    whether the scales of x, if they vary along K, can be read several at a time: by TMA where rows
    are in order, else 16 bytes of a row. Raises ValueError, with the reason, if no config is legal.
    """
    config = tuned.lookup(problem, gpu, rows_per_expert)
    config = config or estimate(problem, num_tokens, rows_per_expert, gpu)
    if problem.block_rows and not wide_scales:
        config = _copied(problem, config)
    if schedule is None:
        return config
    scheduled = config.scheduled(Schedule(schedule))
    if scheduled is None and problem.weight.packing:
        return config  # packed weights have no other template
    if scheduled is None:
        (config,) = _some_rows(problem)
        scheduled = config.scheduled(Schedule(schedule))
        assert scheduled is not None
    return scheduled


def origin(problem: GemmProblem, rows_per_expert: float, gpu: str) -> str:
    """The source of the config that `choose` returns: "tuning table" or "estimate"."""
    return "tuning table" if tuned.lookup(problem, gpu, rows_per_expert) else "estimate"


def estimate(
    problem: GemmProblem, num_tokens: int, rows_per_expert: float, gpu: str = GPU
) -> GemmConfig:
    """The config that `choose` returns without a tuning table."""
    built = _estimates(problem)
    if not built:
        raise ValueError(
            why_illegal(problem) or f"a problem must fit a config of some template, got {problem}"
        )
    families = (_family(problem, rows_per_expert, one) for one in (gpu_of(gpu), H200))
    return next((family[0] for family in families if family and family[0] in built), built[-1])


def _family(problem: GemmProblem, rows_per_expert: float, gpu: Gpu) -> tuple[GemmConfig, ...]:
    experts = problem.num_experts
    if problem.weight.packing:
        return packed_sm90.chosen(problem, rows_per_expert, gpu)
    only_many = not problem.sole_output or problem.quantized_out  # has no swap-AB
    if rows_per_expert > _swap_rows(problem, gpu) or only_many:
        if problem.two_level and not problem.gather:
            return waves_sm90.fastest(problem, _wide(problem), rows_per_expert, gpu)
        # Half of the rows of one large tile may be empty: that costs nothing only as long as
        # reading the weights takes longer than the arithmetic.
        if rows_per_expert <= _ONE_TILE_ROWS * min(1.0, gpu.balance / H200.balance):
            return _one_tile(problem)
        if problem.two_level and _wants_three(problem, rows_per_expert):
            return _three_consumers(problem)
        many = rows_per_expert > _MANY_ROWS[_wide(problem)]
        return _many_rows(problem) if many else _some_rows(problem)
    if rows_per_expert > _SWAP_ROWS[0][0]:
        tile = _swap_tile(problem, rows_per_expert, gpu)
        return _swap(problem, *tile, _evict_first(problem, experts, gpu))
    rows = rows_per_expert * experts
    tiles = min(experts, rows) * -(-problem.n // 64)
    quarter, whole = _one_wave(problem)
    if tiles <= gpu.sms:
        return quarter if tiles <= gpu.sms / 4 else whole
    active = experts * (1 - (1 - 1 / experts) ** rows)  # experts with rows, if routing is uniform
    return _swap(problem, 8, 64, _evict_first(problem, active, gpu))


def _wants_three(problem: GemmProblem, rows_per_expert: float) -> bool:
    """Whether three consumers are faster for two-level sums than two, with so many rows."""
    short = problem.k <= _SHORT_SUM and rows_per_expert > _THREE_SHORT_ROWS
    return short or rows_per_expert <= _THREE_ROWS


def _swap_rows(problem: GemmProblem, gpu: Gpu) -> float:
    """The rows per expert up to which swap-AB is used.

    They are more if tiles of 256 columns would leave SMs idle. With two-level accumulation they are
    not: there one tile of 128 rows takes 0.77 of the time of two tiles of 48.
    """
    idle = not problem.two_level and problem.num_experts * -(-problem.n // 256) <= gpu.sms
    return _SWAP_ROWS[-1][0] * (2 if idle else 1)


def _swap_tile(problem: GemmProblem, rows_per_expert: float, gpu: Gpu) -> tuple[int, int]:
    """The (tile_m, tile_n) of a swap-AB config.

    Tiles have 128 columns, but 64 if all the wide ones would run in a single wave. Then the
    remaining rows of a crowded expert take a wave of their own, and that costs less with tiles of
    32 rows than of 48.
    """
    tile_m = next((m for rows, m in _SWAP_ROWS if rows_per_expert <= rows), _SWAP_ROWS[-1][1])
    tiles = problem.num_experts * ceil(rows_per_expert / tile_m) * -(-problem.n // 128)
    if tiles <= 2 * gpu.sms:
        return min(tile_m, 32), 64
    long_rows = problem.k * problem.x.bytes >= _LONG_ROW_BYTES
    return tile_m, 64 if tile_m == 16 and long_rows else 128


def _evict_first(problem: GemmProblem, experts: float, gpu: Gpu) -> bool:
    """Whether weights should leave L2 first. experts: those that have rows."""
    weight_bytes = experts * problem.n * problem.k * problem.x.bytes
    return weight_bytes <= _EVICT_FIRST_BYTES * gpu.l2 / H200.l2
