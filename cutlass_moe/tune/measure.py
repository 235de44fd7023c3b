"""Measures on a GPU which config is the fastest for a problem, for `cutlass-moe tune`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cutlass_moe.choose import heuristics_sm90 as heuristics
from cutlass_moe.choose import tuned
from cutlass_moe.choose.tuned import TunedConfig
from cutlass_moe.images.cache import MissingImage
from cutlass_moe.operands import TORCH_DTYPES
from cutlass_moe.ops import dispatch
from cutlass_moe.ops.grouped_matmul import grouped_matmul_out
from cutlass_moe.ops.pack import quantize_packed
from cutlass_moe.ops.route import route
from cutlass_moe.runtime import library
from cutlass_moe.runtime.parameters import column_stride
from cutlass_moe.tune.timing import batch_us, flush_buffer
from emitters.spec.config_packed_sm90 import GemmPackedSm90Config
from emitters.spec.config_sm90 import GemmSm90Config
from emitters.spec.epilogue import Bias
from emitters.spec.gemm import GemmProblem
from emitters.spec.registry import GemmConfig, why_illegal

TOKENS = tuple(2**i for i in range(16))
SCREENING = (2, 2)  # rounds, and launches per round, for every config
TIMING = (3, 6)  # the same, for the configs that may be the fastest
# Limits, as multiples of the fastest time:
MAYBE = 1.1  # up to this in screening, a config may be the fastest
NOISE = 1.02  # up to this, a config is as good as the fastest
HOPELESS = 1.5  # above this, a config is left out at the next number of tokens, then tried again

Sample = Callable[[GemmConfig, int], list[float]]  # (config, launches) -> microseconds of each


class Measured(NamedTuple):
    """The microseconds of each config at one number of tokens.

    They are the geometric mean of two routings of these tokens, a balanced and a skewed one: a call
    gets its config by its number of rows alone, whatever their routing.
    """

    tokens: int
    rows_per_expert: float
    us: dict[GemmConfig, float]

    @property
    def best(self) -> GemmConfig:
        return min(self.us, key=self.us.__getitem__)


@dataclass(frozen=True)
class Images:
    """The configs of a problem that can be measured, and the numbers of those that can't."""

    configs: tuple[GemmConfig, ...]
    missing: int  # configs without an image
    spilling: int  # configs with kernels that spill registers


def space(problem: GemmProblem) -> tuple[GemmConfig, ...]:
    """The legal configs that may be the fastest for some number of rows.

    Those in ping-pong are none of them where sums have two levels: the tensor core would wait for
    each consumer's additions.
    """
    alone = ((64, 128), (64, 192), (64, 256), (128, 128))
    few = ((8, 64, 2), (8, 64, 4), (8, 128, 2), (8, 256, 1), (16, 128, 2))
    one_producer = ((32, 192), (96, 192), (128, 192), (144, 128), (176, 128), (192, 128))
    considered: list[GemmConfig] = [
        GemmSm90Config(64, 128),
        GemmSm90Config(64, 64, ctas_per_sm=2),
        GemmSm90Config(64, 128, ctas_per_sm=2),
        *(
            GemmSm90Config(m, n, pingpong=True, group_m=16, cluster_m=cluster)
            for m, n in (() if problem.two_level else alone)
            for cluster in (1, 2)
        ),
        *(
            GemmSm90Config(128, n, cluster_m=cluster)
            for n in ((128, 192, 256) if problem.two_level else (192, 256))
            for cluster in (1, 2)
        ),
        *(GemmPackedSm90Config(m, n, ctas_per_sm=ctas) for m, n, ctas in few),
        *(GemmPackedSm90Config(m, n, k_boxes=2, one_producer=True) for m, n in one_producer),
        GemmPackedSm90Config(8, 64, ctas_per_sm=3, evict_first=True),
    ]
    loading = (tuned.with_loads(problem, c) for c in considered if c.tile_n < problem.n + 64)
    legal = (c for c in loading if why_illegal(problem, c) is None)
    return tuple(dict.fromkeys((*heuristics.candidates(problem), *legal)))


def gpu_name() -> str:
    """The name of the current device; raises RuntimeError if it can't run the kernels."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        got = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        raise RuntimeError(
            f"the device to measure on must be a GPU of compute capability 9.0, got {got}"
        )
    return library.device_name(torch.cuda.current_device())


def find_images(problem: GemmProblem, configs: Iterable[GemmConfig]) -> Images:
    """Loads a kernel for each config; compiles those that the cache lacks, if that is allowed.

    Kernels that spill registers are left out. Raises MissingImage if none is left, and what
    `library.load` raises.
    """
    device = torch.cuda.current_device()
    arch = library.device_arch(device)

    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda c: library.cached_or_compiled(problem, c, arch), configs)
        images = dict(zip(configs, found, strict=True))
    usable = {c: image for c, image in images.items() if image and not image.record.spill_bytes}
    for config, image in usable.items():
        library.load(problem, config, device, image)
    missing = sum(image is None for image in images.values())
    if not usable:
        raise MissingImage(
            f"there must be images for {problem} to measure, got none: build some with "
            "`cutlass-moe build --for-tuning`, or install the compiler"
        )
    return Images(tuple(usable), missing, len(images) - len(usable) - missing)


def measure(
    problem: GemmProblem, top_k: int, configs: Sequence[GemmConfig], tokens: Sequence[int] = TOKENS
) -> Iterator[Measured]:
    """Times configs at each number of tokens, in ascending order, on the current device.

    Operands are random, and so are both routings: one with equal chances for all experts, and one
    by Zipf's law. Results may lack configs that are far from the fastest.
    """
    operands = RandomOperands.of(problem, top_k, max(tokens))
    flush = flush_buffer()
    hopeless: set[GemmConfig] = set()
    for count in sorted(tokens):
        runs = [operands.product(count, skewed) for skewed in (False, True)]

        def sample(
            config: GemmConfig, launches: int, runs: Sequence[Callable[[], None]] = runs
        ) -> list[float]:
            with dispatch.forced_config(config):
                samples = [batch_us(run, launches, flush) for run in runs]
            return [statistics.geometric_mean(pair) for pair in zip(*samples, strict=True)]

        us = time_configs([c for c in configs if c not in hopeless], sample)
        hopeless = {c for c in us if us[c] > HOPELESS * min(us.values())}
        yield Measured(count, count * top_k / problem.num_experts, us)


def choices(measured: Sequence[Measured]) -> list[TunedConfig]:
    """The entries of a tuning table: a config per number of tokens.

    A config that is as fast as the best, up to noise, is kept for the next smaller number of tokens
    too, so that fewer images are needed.
    """
    entries: list[TunedConfig] = []
    for batch in sorted(measured, key=lambda batch: batch.tokens, reverse=True):
        config = entries[-1].config if entries else batch.best
        if batch.us.get(config, float("inf")) > NOISE * batch.us[batch.best]:
            config = batch.best
        entries.append(TunedConfig(batch.rows_per_expert, config, batch.us[config]))
    return entries[::-1]


def time_configs(configs: Sequence[GemmConfig], sample: Sample) -> dict[GemmConfig, float]:
    """The microseconds of each config: screens all, then times the fastest ones more closely."""
    first = _medians(configs, sample, *SCREENING)
    limit = MAYBE * min(first.values())
    return first | _medians([c for c in configs if first[c] <= limit], sample, *TIMING)


def _medians(
    configs: Sequence[GemmConfig], sample: Sample, rounds: int, launches: int
) -> dict[GemmConfig, float]:
    """The median microseconds of each config over several rounds; each round launches them all."""
    samples: dict[GemmConfig, list[float]] = {config: [] for config in configs}
    for _ in range(rounds):
        for config in configs:
            samples[config] += sample(config, launches)
    return {config: statistics.median(us) for config, us in samples.items()}


@dataclass(frozen=True)
class RandomOperands:
    """Random operands of a problem, for any number of tokens up to a limit."""

    problem: GemmProblem
    top_k: int
    x: Tensor
    fixed: dict[str, Tensor]  # weight, scale, bias
    per_token_scale: Tensor | None

    @classmethod
    def of(cls, problem: GemmProblem, top_k: int, tokens: int) -> RandomOperands:
        dtype = TORCH_DTYPES[problem.x]
        experts, n, k = problem.num_experts, problem.n, problem.k
        fixed = {"weight": _weights(problem, dtype)}
        of_expert: tuple[int, ...] = (n,)
        of_token: tuple[int, ...] = ()
        if problem.block_rows:
            of_expert, of_token = problem.scale_blocks, problem.scale_blocks[1:]
        if problem.x.quantized:
            fixed["scale"] = torch.rand(experts, *of_expert, device="cuda")
        for node in problem.epilogue:
            if isinstance(node, Bias):
                bias = torch.randn(experts, n, device="cuda")
                fixed["bias"] = bias.to(TORCH_DTYPES[node.dtype])
        rows = tokens if problem.gather else tokens * top_k
        scale = torch.rand(rows, *of_token, device="cuda") if problem.x.quantized else None
        if problem.block_rows and not problem.gather:  # in columns, as layers write them
            scale = torch.rand(*of_token, column_stride(rows), device="cuda").mT[:rows]
        return cls(problem, top_k, _values(dtype, rows, k).to(dtype), fixed, scale)

    def product(self, tokens: int, skewed: bool) -> Callable[[], None]:
        """A function that launches the product for this many tokens, with a random routing."""
        problem = self.problem
        ids = random_ids(tokens, problem.num_experts, self.top_k, skewed, self.x.device)
        table = route(ids, problem.num_experts)
        rows = tokens if problem.gather else tokens * self.top_k
        call: dict[str, Any] = {**self.fixed, "x": self.x[:rows], "offsets": table.offsets}
        if problem.gather:
            call["index"] = table.index
        if self.per_token_scale is not None:
            call["per_token_scale"] = self.per_token_scale[:rows]
        shape = (tokens * self.top_k, problem.n)
        out = torch.empty(shape, dtype=TORCH_DTYPES[problem.out], device="cuda")
        return partial(grouped_matmul_out, out, **call)


def random_ids(
    tokens: int, experts: int, top_k: int, skewed: bool, device: torch.device | str = "cpu"
) -> Tensor:
    """The distinct experts of each token, int64 [tokens, top_k].

    skewed: the i-th expert is drawn 1 / i as often as the first, else all equally often.
    """
    chances = torch.ones(experts, device=device)
    if skewed:
        chances /= torch.arange(1, experts + 1, device=device)
    # the largest of log(u) / chance are a draw without replacement (Efraimidis and Spirakis, 2006)
    draws = torch.rand(tokens, experts, device=device).log() / chances
    return draws.topk(top_k).indices


def _weights(problem: GemmProblem, dtype: torch.dtype) -> Tensor:
    """Random weights, made expert by expert."""
    experts, n, k = problem.num_experts, problem.n, problem.k
    packing = problem.weight.packing
    if packing is not None:
        parts = [quantize_packed(_values(dtype, n, k)[None], str(packing)) for _ in range(experts)]
        return torch.cat(parts)
    weight = torch.empty(experts, n, k, dtype=dtype, device="cuda")
    for expert in weight:
        expert.copy_(_values(dtype, n, k))
    return weight


def _values(dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """Normally distributed values, because their bits change a GPU's power and so its clocks."""
    values = torch.randn(rows, columns, device="cuda")
    return (values * 40).round_().clamp_(-127, 127) if dtype == torch.int8 else values
