"""The calls that every implementation must get right, and their data."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cutlass_moe.choose.heuristics_sm90 import candidates, choose
from cutlass_moe.operands import TORCH_DTYPES
from cutlass_moe.ops.pack import pack_weights
from emitters.spec.config_sm90 import SCALE_SPAN, GemmSm90Config
from emitters.spec.config_swap_sm90 import GemmSwapSm90Config
from emitters.spec.dtypes import ACCUMULATIONS, Accumulation, DType
from emitters.spec.epilogue import NUMBERS, Activation, ActivationFunction, Bias, EpilogueNode
from emitters.spec.gemm import GemmProblem, Granularity, Major, WeightFormat
from emitters.spec.packing import Packing
from emitters.spec.registry import GemmConfig, why_illegal
from emitters.spec.staged_sm90 import Schedule

E4M3, E5M2, INT8, BF16, FP16, FP32 = DType
Epilogue = tuple[Granularity | EpilogueNode, ...]  # scales, then nodes
SCALES: Epilogue = (Granularity.TOKEN, Granularity.CHANNEL)
BLOCK_SCALES: Epilogue = (Granularity.TOKEN_BLOCK, Granularity.BLOCK_128)
_OF_X = (Granularity.TOKEN, Granularity.TOKEN_BLOCK)
Counts = tuple[int, ...]


def even(experts: int, rows: int) -> Counts:
    return (rows // experts,) * experts


def hot(experts: int, rows: int) -> Counts:
    return tuple(rows if e == experts // 2 else 0 for e in range(experts))


def alternate(experts: int, rows: int) -> Counts:
    """Every second expert empty, the first and (for even numbers of experts) not the last."""
    return tuple(2 * rows // experts if e % 2 else 0 for e in range(experts))


def skewed(experts: int, rows: int) -> Counts:
    """Expert e drawn with weight 1 / (1 + e), then shuffled: some crowded, some empty."""
    draw = random.Random(experts * 1_000_003 + rows)
    weights = [1 / (1 + e) for e in range(experts)]
    draw.shuffle(weights)
    drawn = Counter(draw.choices(range(experts), weights, k=rows))
    return tuple(drawn[e] for e in range(experts))


RAGGED = (1, 63, 64, 65, 127, 0, 128, 129)  # around the edges of 64- and 128-row tiles


def scales_and_nodes(epilogue: Epilogue) -> dict[str, Any]:
    """These as fields of a GemmProblem."""
    scales = [scale for scale in epilogue if isinstance(scale, Granularity)]
    return {
        "x_scale": next((s for s in scales if s in _OF_X), None),
        "weight_scale": next((s for s in scales if s not in _OF_X), None),
        "epilogue": tuple(node for node in epilogue if not isinstance(node, Granularity)),
    }


@dataclass(frozen=True)
class Case:
    """One call of grouped_matmul. Rows [0, sum(counts)) belong to experts, `spare` more to nobody.

    tokens: T; without `gather` x has a row for every row. reads: which tokens rows read: "any" at
    random, "few" only the first and the last, "outside" one in three out of [0, T). apart: rows of
    nobody before each expert's, which `starts` then skips.
    """

    tokens: int = 200
    counts: Counts = skewed(8, 400)
    n: int = 256
    k: int = 256
    operand: DType = E4M3
    out: DType = BF16
    accumulation: Accumulation | None = None
    epilogue: Epilogue = SCALES
    gather: bool = True
    reads: str = "any"
    spare: int = 5
    interleaved: bool = False
    numbers: tuple[float, ...] = ()  # limit, alpha and beta of SWIGLU_OAI; default its own
    weight_major: Major = Major.K
    apart: int = 0
    packing: Packing | None = None  # of the weights; operand is then BF16

    @property
    def rows(self) -> int:
        return sum(self.counts) + len(self.counts) * self.apart + self.spare

    @property
    def owned(self) -> Tensor:
        """bool [rows]: which belong to an expert."""
        counts = torch.tensor(self.counts)
        ends = (counts + self.apart).cumsum(0)[:, None]
        row = torch.arange(self.rows)
        return ((row >= ends - counts[:, None]) & (row < ends)).any(0)

    @property
    def problem(self) -> GemmProblem:
        return GemmProblem(
            x=self.operand,
            weight=WeightFormat(self.packing or self.operand, self.weight_major),
            accumulation=self.accumulation or ACCUMULATIONS[self.operand][0],
            out=self.out,
            n=self.n,
            k=self.k,
            num_experts=len(self.counts),
            gather=self.gather,
            **scales_and_nodes(tuple(map(self._in_kernel, self.epilogue))),
        )

    def _in_kernel(self, part: Any) -> Any:
        """A part of the epilogue as the kernel has it, which knows the order of N-major columns."""
        alternating = self.interleaved and self.weight_major is Major.N
        return replace(part, alternating=alternating) if isinstance(part, Activation) else part

    @property
    def config(self) -> GemmConfig:
        """What the op chooses for this call."""
        tokens = self.tokens if self.gather else self.rows
        rows = self.rows / len(self.counts)
        # the scales of `make_inputs` lie row by row
        return choose(self.problem, tokens, rows, wide_scales=self.gather)


BASE = Case()
FLOAT = Case(operand=BF16, epilogue=())
INTEGER = Case(operand=INT8)
TWO_LEVEL = Case(accumulation=Accumulation.TWO_LEVEL)

CASES: dict[str, Case] = {
    "no_tokens": replace(BASE, tokens=0, counts=(0,) * 8, spare=0),
    "no_rows": replace(BASE, counts=(0,) * 8, spare=0),
    "no_rows_no_index": replace(BASE, counts=(0,) * 8, spare=0, gather=False),
    "only_spare_rows": replace(BASE, counts=(0,) * 8),
    "rows_without_tokens": replace(BASE, tokens=0, reads="outside"),
    "one_token": replace(BASE, tokens=1, counts=hot(8, 1), spare=0),
    "one_token_8_experts": replace(BASE, tokens=1, counts=even(8, 8)),
    "empty_experts": replace(BASE, counts=alternate(8, 400)),
    "fixed_groups": replace(BASE, counts=even(8, 512), spare=0),
    "one_hot_expert": replace(BASE, tokens=1024, counts=hot(8, 1024)),
    "duplicates": replace(BASE, reads="few"),
    "outside": replace(BASE, reads="outside"),
    "ragged": replace(BASE, counts=RAGGED),
    "ragged_spare": replace(BASE, counts=RAGGED[::-1], spare=300),
    "tokens_16384": replace(BASE, tokens=16384, counts=skewed(8, 131072)),
    # Experts: one, odd, around a warp's 32 lanes, as many as models have.
    "experts_1": replace(BASE, counts=(333,)),
    "experts_3": replace(BASE, counts=(0, 100, 31)),
    "experts_32": replace(BASE, counts=skewed(32, 700)),
    "experts_33": replace(BASE, counts=skewed(33, 700)),
    "experts_33_last": replace(BASE, counts=(0,) * 32 + (70,)),
    "experts_128": replace(BASE, counts=skewed(128, 3000)),
    "experts_512": replace(BASE, tokens=1024, counts=skewed(512, 8192)),
    "experts_512_few_rows": replace(BASE, tokens=4, counts=skewed(512, 32)),
    # N and K that fill no tile.
    "n_8": replace(INTEGER, n=8, counts=RAGGED),
    "n_72": replace(BASE, n=72, counts=RAGGED),
    "n_264": replace(BASE, n=264, counts=RAGGED),
    "n_264_two_level": replace(TWO_LEVEL, n=264, counts=RAGGED),
    "n_4_fp32": replace(FLOAT, n=4, out=FP32),
    "n_520_fp32": replace(BASE, n=520, out=FP32),
    "k_16": replace(BASE, k=16),
    "k_80": replace(BASE, k=80, counts=RAGGED),
    "k_128_few_rows": replace(BASE, tokens=64, counts=skewed(64, 64), n=2048, k=128),
    "k_144": replace(BASE, k=144),
    "k_2064": replace(BASE, k=2064),
    "k_8_bf16": replace(FLOAT, k=8),
    "k_72_bf16": replace(FLOAT, k=72, counts=RAGGED),
    "k_16_int8": replace(INTEGER, k=16),
    "n_72_k_80_two_level": replace(TWO_LEVEL, n=72, k=80),
    # Long rows, and long sums, where fast fp8 errs most.
    "n_2048": replace(BASE, n=2048, k=2048, tokens=1000, counts=skewed(8, 2000)),
    "n_2048_two_level": replace(TWO_LEVEL, n=2048, k=2048, tokens=1000, counts=skewed(8, 2000)),
    "n_2048_bf16": replace(FLOAT, n=2048, k=2048, tokens=1000, counts=skewed(8, 2000)),
    "k_7168": replace(BASE, n=264, k=7168),
    "k_7168_two_level": replace(TWO_LEVEL, n=264, k=7168),
    "k_7168_fp32": replace(BASE, n=264, k=7168, out=FP32),
    "k_4096_bf16": replace(FLOAT, n=264, k=4096),
    # Epilogues.
    "float_scales": replace(FLOAT, epilogue=SCALES),
    "float_token_scale": replace(FLOAT, operand=FP16, epilogue=(Granularity.TOKEN,)),
    "expert_scale": replace(BASE, epilogue=(Granularity.TOKEN, Granularity.EXPERT)),
    "bias_bf16": replace(BASE, epilogue=(*SCALES, Bias(BF16)), reads="outside"),
    "bias_fp16": replace(FLOAT, operand=FP16, out=FP16, epilogue=(Bias(FP16),), reads="outside"),
    "bias_fp32": replace(INTEGER, n=72, epilogue=(*SCALES, Bias(FP32)), counts=RAGGED),
    "bias_fp32_out_fp32": replace(
        FLOAT, out=FP32, epilogue=(Granularity.TOKEN, Granularity.EXPERT, Bias(FP32))
    ),
    # Rows of x in order.
    "no_index": replace(BASE, gather=False, counts=RAGGED),
    "no_index_two_level": replace(TWO_LEVEL, gather=False, counts=RAGGED, n=2048, k=768),
    "no_index_bf16": replace(FLOAT, gather=False, n=72, k=72),
    "no_index_int8": replace(INTEGER, gather=False),
}
# Every operand with every output.
for _operand, _accumulations in ACCUMULATIONS.items():
    for _accumulation in _accumulations:
        for _out in (BF16, FP16, FP32):
            CASES[f"{_operand}_{_accumulation}_{_out}"] = replace(
                BASE,
                operand=_operand,
                accumulation=_accumulation,
                out=_out,
                epilogue=SCALES if _operand.quantized else (),
            )

# Offsets of more than 31 bits: into out, into x, into weight. They need up to 60 GB.
BIG_CASES: dict[str, Case] = {
    "big_out": Case(tokens=65600, counts=skewed(8, 2**19 + 300), n=4096, k=128),
    "big_x": Case(tokens=2**20 + 300, counts=skewed(8, 3000), n=72, k=2064),
    "big_weight": Case(counts=skewed(512, 3000), n=2048, k=2064),
}
assert BIG_CASES["big_out"].rows * BIG_CASES["big_out"].n > 2**31
assert BIG_CASES["big_x"].tokens * BIG_CASES["big_x"].k > 2**31
assert len(BIG_CASES["big_weight"].counts) * 2048 * 2064 > 2**31

# Activations, by turns with every kind of operand, output and other node; gates in both orders.
_INPUTS: tuple[dict[str, Any], ...] = (
    {},
    {"operand": INT8, "out": FP32},
    {"operand": BF16, "epilogue": ()},
    {"operand": FP16, "out": FP16, "epilogue": (Bias(FP16),)},
    {"operand": E5M2, "epilogue": (Granularity.TOKEN, Granularity.EXPERT, Bias(BF16))},
    {"accumulation": Accumulation.TWO_LEVEL, "epilogue": (*SCALES, Bias(FP32))},
)
for _i, _activation in enumerate(ActivationFunction):
    for _j, _tokens in enumerate((20, 200, 2000)):  # both templates
        _case = replace(BASE, **_INPUTS[(_i + 2 * _j) % len(_INPUTS)], tokens=_tokens)
        CASES[f"{_activation}_{_tokens}"] = replace(
            _case,
            counts=skewed(8, 2 * _tokens),
            n=(256, 208, 512)[(_i + _j) % 3],
            epilogue=(*_case.epilogue, Activation(_activation)),
            reads=("any", "outside")[_i % 2],
            interleaved=_activation.gated and (_i + _j) % 2 == 1,
        )
BLOCKS = replace(BASE, accumulation=Accumulation.TWO_LEVEL, epilogue=BLOCK_SCALES)
BLOCK_SWIGLU = replace(
    BLOCKS, epilogue=(*BLOCK_SCALES, Bias(BF16), Activation(ActivationFunction.SWIGLU))
)
SWIGLU = replace(BASE, epilogue=(*SCALES, Activation(ActivationFunction.SWIGLU)))
CASES |= {
    "swiglu": replace(SWIGLU, counts=RAGGED, n=272),
    "swiglu_interleaved": replace(SWIGLU, counts=RAGGED, n=272, interleaved=True),
    "swiglu_clamped": replace(
        FLOAT,
        n=272,
        epilogue=(Activation(ActivationFunction.SWIGLU_OAI),),
        numbers=(0.75, 1.25, 0.5),
    ),
    "swiglu_n_16": replace(SWIGLU, n=16),
    "swiglu_k_7168": replace(SWIGLU, n=528, k=7168),
    "swiglu_tokens_16384": replace(SWIGLU, tokens=16384, counts=skewed(8, 65536), n=1536),
    "swiglu_gpt_oss": replace(
        FLOAT,
        n=1440,
        k=2880,
        epilogue=(Bias(BF16), Activation(ActivationFunction.SWIGLU_OAI)),
        interleaved=True,
    ),
    # Weights whose N is dense.
    "n_major": replace(FLOAT, weight_major=Major.N, counts=RAGGED, n=264, k=328),
    "n_major_few_rows": replace(FLOAT, weight_major=Major.N, tokens=5, counts=even(8, 16)),
    "n_major_fp16_scales": replace(
        FLOAT, operand=FP16, out=FP32, weight_major=Major.N, epilogue=SCALES, n=72, k=72
    ),
    "n_major_no_index": replace(FLOAT, weight_major=Major.N, gather=False, n=2048, k=768),
    "n_major_gelu": replace(
        FLOAT,
        weight_major=Major.N,
        epilogue=(Bias(BF16), Activation(ActivationFunction.GELU)),
        counts=RAGGED,
    ),
    "n_major_swiglu": replace(
        FLOAT,
        weight_major=Major.N,
        epilogue=(Activation(ActivationFunction.SWIGLU),),
        counts=RAGGED,
        n=400,
        k=136,
    ),
    "n_major_swiglu_few_rows": replace(
        FLOAT,
        operand=FP16,
        out=FP32,
        weight_major=Major.N,
        epilogue=(*SCALES, Bias(FP32), Activation(ActivationFunction.SWIGLU)),
        counts=even(8, 16),
        reads="outside",
        n=272,
    ),
    "n_major_swiglu_interleaved": replace(
        FLOAT,
        weight_major=Major.N,
        epilogue=(Bias(BF16), Activation(ActivationFunction.SWIGLU_OAI)),
        counts=RAGGED,
        n=400,
        k=136,
        interleaved=True,
    ),
    "n_major_swiglu_interleaved_few_rows": replace(
        FLOAT,
        operand=FP16,
        out=FP32,
        weight_major=Major.N,
        epilogue=(*SCALES, Activation(ActivationFunction.SWIGLU)),
        counts=even(8, 16),
        reads="outside",
        n=272,
        interleaved=True,
    ),
    # Scales that vary along K.
    "blocks": replace(BLOCKS, counts=RAGGED, n=264, k=400),
    "blocks_outside": replace(BLOCKS, reads="outside", k=1040),
    "blocks_few_rows": replace(BLOCKS, tokens=5, counts=even(8, 16), k=2048),
    "blocks_one_token": replace(BLOCKS, tokens=1, counts=hot(8, 1), k=7168, n=272),
    "blocks_many_rows": replace(BLOCKS, tokens=4096, counts=skewed(8, 16384), n=1536, k=768),
    "blocks_64": replace(
        BLOCKS, epilogue=(Granularity.TOKEN_BLOCK, Granularity.BLOCK_64), n=352, k=352, out=FP16
    ),
    "blocks_32": replace(
        BLOCKS, epilogue=(Granularity.TOKEN_BLOCK, Granularity.BLOCK_32), n=96, k=96, out=FP32
    ),
    "blocks_e5m2": replace(BLOCKS, operand=E5M2, epilogue=(*BLOCK_SCALES, Bias(FP32)), n=136),
    "blocks_swiglu": replace(BLOCK_SWIGLU, counts=RAGGED, n=512, k=528),
    "blocks_swiglu_cut": replace(BLOCK_SWIGLU, n=2 * 192, reads="outside"),
    "blocks_swiglu_64": replace(
        BLOCK_SWIGLU,
        epilogue=(Granularity.TOKEN_BLOCK, Granularity.BLOCK_64, *BLOCK_SWIGLU.epilogue[2:]),
        n=2 * 352,
    ),
    "blocks_swiglu_32_few_rows": replace(
        BLOCK_SWIGLU,
        epilogue=(Granularity.TOKEN_BLOCK, Granularity.BLOCK_32, *BLOCK_SWIGLU.epilogue[2:]),
        tokens=5,
        counts=even(8, 16),
        n=2 * 96,
    ),
    "blocks_no_index": replace(BLOCKS, gather=False, counts=RAGGED, n=2048, k=768),
    "blocks_starts": replace(BLOCKS, counts=RAGGED, apart=37),
    "blocks_spans": replace(BLOCKS, counts=RAGGED, n=264, k=1008, reads="outside"),
    "blocks_spans_swiglu": replace(BLOCK_SWIGLU, counts=RAGGED, n=512, k=2048),
    # First rows of experts that are not the ends before.
    "starts": replace(BASE, counts=RAGGED, apart=37),
    "starts_few_rows": replace(BASE, counts=even(8, 16), apart=3, reads="outside"),
    "starts_no_index": replace(SWIGLU, counts=RAGGED, apart=128, gather=False),
}

# Packed 4-bit weights.
PACKED = replace(FLOAT, packing=Packing.MXFP4)
_G128, _G32, _MXFP4 = Packing
_SWIGLU, _OAI = (Activation(ActivationFunction(name)) for name in ("swiglu", "swiglu_oai"))
PACKED_CASES: dict[str, Case] = {
    **{
        f"{packing}_{tokens}": replace(
            PACKED, packing=packing, tokens=tokens, counts=skewed(8, 2 * tokens), n=544, k=k
        )
        for packing in Packing
        for tokens, k in ((1, 2048), (20, 7168), (200, 768), (2000, 512))
    },
    "no_rows": replace(PACKED, counts=(0,) * 8, spare=0),
    "no_tokens": replace(PACKED, tokens=0, counts=(0,) * 8, spare=0),
    "one_hot_expert": replace(PACKED, tokens=1024, counts=hot(8, 1024)),
    "empty_experts": replace(PACKED, counts=alternate(8, 400), packing=_G32),
    "outside": replace(PACKED, reads="outside", packing=_G128, out=FP32),
    "ragged": replace(PACKED, counts=RAGGED, n=96, k=136, packing=_G32, out=FP16),
    "experts_128": replace(PACKED, counts=skewed(128, 3000)),
    "k_8": replace(PACKED, k=8, packing=_G128, counts=RAGGED),
    "gpt_oss_up": replace(
        PACKED, n=5760, k=2880, counts=skewed(8, 200), interleaved=True,
        epilogue=(Bias(BF16), _OAI),
    ),
    "gpt_oss_down": replace(
        PACKED, n=2880, k=2880, counts=skewed(8, 200), gather=False, epilogue=(Bias(BF16),)
    ),
    "swiglu": replace(PACKED, packing=_G32, counts=RAGGED, n=320, epilogue=(_SWIGLU,)),
    "swiglu_few_rows": replace(
        PACKED, packing=_G128, tokens=5, counts=even(8, 16), n=192, k=264,
        epilogue=(*SCALES, Bias(FP32), _SWIGLU), reads="outside", interleaved=True,
    ),
    "relu2": replace(PACKED, epilogue=(Activation(ActivationFunction.RELU2),)),
    "starts": replace(PACKED, packing=_G128, counts=RAGGED, apart=37),
}  # fmt: skip

# Run with every config the heuristics know for their problem, not only with the one they choose.
EVERY_CANDIDATE = (
    "ragged",
    "outside",
    "tokens_16384",
    "n_72",
    "k_7168",
    "k_72_bf16",
    "bias_fp32",
    "e4m3_two_level_bf16",
    "no_index_two_level",
    "bf16_fp32_bf16",
    "swiglu_interleaved",
    "blocks",
    "blocks_no_index",
    "blocks_spans",
    "blocks_64",
    "blocks_swiglu_cut",
    "swiglu_tokens_16384",
    "swiglu_gpt_oss",
    "starts",
    "n_major",
    "n_major_swiglu",
)
# Run with every legal config.
EVERY_LEGAL = (
    "n_264", "n_264_two_level", "swiglu", "n_major_swiglu", "blocks_32", "blocks_swiglu",
    "no_index_int8", "blocks_no_index", "blocks_spans",
)  # fmt: skip
# Run with CTAs that share a tile's K.
SPLIT = ("k_7168", "k_7168_two_level", "k_2064", "blocks_outside")
SPLIT_CONFIGS = tuple(GemmSwapSm90Config(tile_m=16, split_k=split) for split in (2, 4, 8))


def legal_configs(problem: GemmProblem) -> list[GemmConfig]:
    """Of every shape of tile, cluster and kind of consumers; schedules and groups in turn."""
    shapes = itertools.product((64, 128, 192), (64, 128, 192, 256), (1, 2), (1, 2), (False, True))
    turns = itertools.cycle(itertools.product(Schedule, (2, 1, 4)))
    configs: list[GemmConfig] = [
        GemmSm90Config(
            tile_m=m, tile_n=n, ctas_per_sm=ctas, cluster_m=cluster, pingpong=pingpong,
            schedule=schedule, group_m=group_m,
            tma_x=not problem.gather,
        )
        for (m, n, ctas, cluster, pingpong), (schedule, group_m) in zip(shapes, turns, strict=False)
    ]  # fmt: skip
    configs += [replace(config, scale_span=SCALE_SPAN) for config in configs if problem.gather]
    configs += [
        GemmSwapSm90Config(tile_m=m, tile_n=n, ctas_per_sm=ctas)
        for m, n, ctas in itertools.product((8, 16, 48, 96), (64, 128), (1, 2))
    ]
    configs += [
        GemmSwapSm90Config(tile_m=16, k_boxes=boxes, evict_first=boxes == 2) for boxes in (1, 2, 4)
    ]
    return [config for config in configs if why_illegal(problem, config) is None]


def config_cases() -> list[tuple[str, GemmConfig]]:
    """Names of cases with the configs to run them with."""
    pairs = [
        (name, config) for name in EVERY_CANDIDATE for config in candidates(CASES[name].problem)
    ]
    pairs += [
        (name, config) for name in EVERY_LEGAL for config in legal_configs(CASES[name].problem)
    ]
    return pairs + list(itertools.product(SPLIT, SPLIT_CONFIGS))


def images() -> set[tuple[GemmProblem, GemmConfig]]:
    """Every (problem, config) that the GPU tests run: what to build before them."""
    chosen = {(case.problem, case.config) for case in (CASES | BIG_CASES).values()}
    return chosen | {(CASES[name].problem, config) for name, config in config_cases()}


_SPREAD = {E4M3: 112.0, E5M2: 14336.0, INT8: 32.0}  # standard deviation: a quarter of the largest
_LARGEST = {E4M3: 448.0, E5M2: 57344.0, INT8: 127.0}


def make_inputs(case: Case, device: str, exact: bool = False, seed: int = 0) -> dict[str, Any]:
    """Arguments of `grouped_matmul`, by name; results are of order 1.

    exact: small integers, scales that are powers of two. No sum then needs more bits than fp32
    holds, nor than fp8's fast accumulation keeps: any right kernel agrees to the last bit.
    """
    data = _Data(device, exact, seed)
    tokens = case.tokens if case.gather else case.rows
    experts, n, k = len(case.counts), case.n, case.k
    spread_w = _SPREAD.get(case.operand, k**-0.5)
    inputs: dict[str, Any] = {
        "x": data.operand((tokens, k), case.operand, _SPREAD.get(case.operand, 1.0)),
        "weight": data.operand((experts, n, k), case.operand, spread_w),
        "index": data.index(case) if case.gather else None,
        "offsets": torch.tensor(case.counts).cumsum(0).int().to(device),
        "out_dtype": TORCH_DTYPES[case.out],
    }
    if case.packing is not None:
        inputs["weight"] = data.packed((experts, n, k), case.packing, k**-0.5)
    if case.weight_major is Major.N:
        inputs["weight"] = inputs["weight"].mT.contiguous().mT
    if case.accumulation and case.operand in (E4M3, E5M2):
        inputs["accumulation"] = str(case.accumulation)
    if case.apart:
        ends = (torch.tensor(case.counts) + case.apart).cumsum(0)
        inputs["offsets"] = ends.int().to(device)
        inputs["starts"] = (ends - torch.tensor(case.counts)).int().to(device)
    if case.problem.activation is not None:
        inputs["activation"] = str(case.problem.activation.function)
        inputs["interleaved"] = case.interleaved
        inputs |= zip(NUMBERS[: len(case.numbers)], case.numbers, strict=True)
    if Granularity.TOKEN in case.epilogue:
        inputs["per_token_scale"] = data.scale((tokens,), 1 / _SPREAD.get(case.operand, 1.0))
    if Granularity.CHANNEL in case.epilogue:
        inputs["scale"] = data.scale((experts, n), k**-0.5 / spread_w)
    if case.problem.block_rows:
        n_blocks, k_blocks = case.problem.scale_blocks
        inputs["per_token_scale"] = data.scale((tokens, k_blocks), 1 / _SPREAD[case.operand])
        inputs["scale"] = data.scale((experts, n_blocks, k_blocks), k**-0.5 / spread_w)
    if Granularity.EXPERT in case.epilogue:
        inputs["scale"] = data.scale((experts,), k**-0.5 / spread_w)
    bias = next((node for node in case.epilogue if isinstance(node, Bias)), None)
    if bias is not None:
        inputs["bias"] = data.operand((experts, n), bias.dtype, 1.0)
    return inputs


class _Data:
    """Seeded random tensors on a device."""

    def __init__(self, device: str, exact: bool, seed: int):
        self.device, self.exact = device, exact
        self.generator = torch.Generator(device).manual_seed(seed)

    def integers(
        self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype = torch.int8
    ) -> Tensor:
        return torch.randint(
            low, high, shape, generator=self.generator, device=self.device, dtype=dtype
        )

    def operand(self, shape: tuple[int, ...], dtype: DType, spread: float) -> Tensor:
        """Normal with standard deviation `spread`; exact: -2, -1, 1, 2, in int8 all its values."""
        if self.exact and dtype is INT8:
            return self.integers(-127, 128, shape)
        if self.exact:
            sign = self.integers(0, 2, shape).mul_(2).sub_(1)
            return self.integers(1, 3, shape).mul_(sign).to(TORCH_DTYPES[dtype])
        values = torch.randn(shape, generator=self.generator, device=self.device).mul_(spread)
        if dtype.quantized:
            values.clamp_(-_LARGEST[dtype], _LARGEST[dtype])
        if dtype is INT8:
            values.round_()
        return values.to(TORCH_DTYPES[dtype])

    def packed(self, shape: tuple[int, ...], packing: Packing, spread: float) -> Tensor:
        """Random codes, with scales such that values have about this standard deviation."""
        experts, n, k = shape
        groups = -(-k // packing.group)
        codes = self.integers(-128, 128, (experts, n, groups * packing.group // 2))
        if packing is Packing.MXFP4:
            power = 0 if self.exact else round(math.log2(spread / 3))
            exponents = self.integers(126, 129, (experts, n, groups), torch.int64) + power
            return pack_weights(codes, exponents.clamp(max=128).to(torch.uint8))
        scale = self.scale((experts, n, groups), spread / 4.6).bfloat16()
        scale *= self.integers(-1, 7, scale.shape).clamp_(max=1)  # some are negative, some 0
        return pack_weights(codes.view(torch.int32), scale)

    def scale(self, shape: tuple[int, ...], around: float) -> Tensor:
        if self.exact:
            return (1 << self.integers(0, 3, shape)).float() / 2
        values = torch.rand(shape, generator=self.generator, device=self.device)
        return values.add_(0.5).mul_(around)

    def index(self, case: Case) -> Tensor:
        """int32 [rows]; tokens in no order and repeated."""
        index = self.integers(0, max(case.tokens, 1), (case.rows,), torch.int32)
        if case.reads == "few":
            index = torch.where(index % 2 == 0, 0, case.tokens - 1).int()
        if case.reads == "outside":
            outside = torch.tensor([-1, case.tokens, 2**31 - 1, -(2**31)], dtype=torch.int32)
            which = self.integers(0, 4, (case.rows,), torch.int64)
            step = 3 if case.tokens else 1
            index[::step] = outside.to(self.device)[which][::step]
        return index
