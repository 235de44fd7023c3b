"""What is simulated: every template, dtype and epilogue on its smallest interesting shapes.

Two or three tiles with three k-steps over two stages, so that the ring wraps, within a tile and
from one to the next; ragged and empty experts, tails of N and K, rows of missing tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from emitters.spec.config_packed_sm90 import GemmPackedSm90Config
from emitters.spec.config_sm90 import GemmSm90Config
from emitters.spec.config_swap_sm90 import GemmSwapSm90Config
from emitters.spec.dtypes import ACCUMULATIONS, OUTPUTS, Accumulation, DType
from emitters.spec.epilogue import Activation, ActivationFunction, Bias, EpilogueNode
from emitters.spec.gemm import GemmProblem, Granularity, Major, WeightStorage
from emitters.spec.packing import Packing
from emitters.spec.registry import GemmConfig
from emitters.spec.staged_sm90 import Schedule
from tests.ptxsim import schedule
from tests.ptxsim.kernels import launch
from tests.ptxsim.ptx import Fault
from tests.support.cases import BLOCK_SCALES, SCALES, Case, make_inputs
from tests.support.numerics import check, check_quantized, poisoned

SMALL = GemmSm90Config(tile_m=64, tile_n=64, stages=2)
PINGPONG = replace(SMALL, pingpong=True)
CLUSTER = replace(SMALL, cluster_m=2)
SWAP = GemmSwapSm90Config(stages=2)
BASE = Case(tokens=30, counts=(70, 0, 33), n=72, k=272, spare=3, reads="outside")
PAIRS = replace(BASE, counts=(140, 0, 33))  # of M tiles: one, and one tile that is left over
_ORDERED = replace(BASE, gather=False, reads="any")  # rows
FEW = replace(BASE, counts=(11, 0, 3))
EPILOGUES: dict[str, tuple[EpilogueNode, ...]] = {
    "none": (),
    "token": (Granularity.TOKEN,),
    "scales": SCALES,
    "expert": (Granularity.TOKEN, Granularity.EXPERT),
    "bias_bf16": (*SCALES, Bias(DType.BF16)),
    "bias_fp16": (*SCALES, Bias(DType.FP16)),
    "bias_fp32": (Granularity.TOKEN, Granularity.EXPERT, Bias(DType.FP32)),
}


@dataclass(frozen=True)
class Run:
    case: Case
    config: GemmConfig = SMALL
    grid: int = 2
    storage: WeightStorage = WeightStorage.STACKED

    @property
    def problem(self) -> GemmProblem:
        problem = self.case.problem
        return replace(problem, weight=replace(problem.weight, storage=self.storage))


def _k(case: Case, steps: float) -> Case:
    """K of so many steps of 128 bytes."""
    return replace(case, k=int(steps * 128) // case.operand.bytes)


# What changes the numbers: FP8 sums with each output and each epilogue; int8 and 16 bits, whose
# sums reach the same epilogues as float32, with each output. Operands of a kind take turns.
NUMBERS: dict[str, Run] = {}
_COLUMNS = dict(zip(OUTPUTS, (40, 64, 72), strict=True))  # a tail, none, two tiles
for _kind, _names in (
    ((DType.E4M3, DType.E5M2), [*list(EPILOGUES)[2:], *list(EPILOGUES)[:2]]),
    ((DType.INT8,), ["token", "bias_fp32", "none"]),
    ((DType.FP16, DType.BF16), ["bias_bf16", "expert", "bias_fp16"]),
):
    _pairs = list(product(ACCUMULATIONS[_kind[0]], OUTPUTS))
    for _i, _name in enumerate(_names):  # scales where fp16 would overflow
        (_accumulation, _out), _operand = _pairs[_i % len(_pairs)], _kind[_i % len(_kind)]
        _case = replace(BASE, operand=_operand, accumulation=_accumulation, out=_out)
        _case = replace(_case, n=_COLUMNS[_out], epilogue=EPILOGUES[_name])
        NUMBERS[f"{_operand}_{_accumulation}_{_out}_{_name}"] = Run(_k(_case, 2.125))
for _i, ((_operand, _accumulation), _name) in enumerate(
    zip([(o, a) for o, al in ACCUMULATIONS.items() for a in al], EPILOGUES, strict=True)
):
    _case = replace(FEW, operand=_operand, accumulation=_accumulation, out=OUTPUTS[_i % 3])
    _case = replace(_case, epilogue=EPILOGUES[_name])
    _config = replace(SWAP, tile_m=(8, 16, 32)[_i % 3], tile_n=(64, 64, 128)[_i % 3])
    _config = replace(_config, k_boxes=1 + _i % 2)
    NUMBERS[f"swap_{_operand}_{_accumulation}_{_name}"] = Run(_k(_case, 2.125), _config)
ADDRESSES: dict[str, Run] = {}  # what changes where rows, weights and tiles are found
for _m, _n, _group in (
    (64, 128, 1),
    (64, 256, 1),
    (128, 64, 1),
    (128, 128, 2),
    (128, 256, 1),
    (192, 64, 3),
    (192, 128, 1),
):
    _case = replace(BASE, counts=(_m + 6, 0, 3), n=_n + 16 if _group > 1 else _n - 24)
    _config = GemmSm90Config(tile_m=_m, tile_n=_n, group_m=_group, stages=2)
    ADDRESSES[f"tile_{_m}x{_n}_group_{_group}"] = Run(_case, _config)
for _m, _n, _boxes in ((8, 128, 4), (48, 128, 1), (64, 64, 2), (96, 128, 1)):
    _case = replace(BASE, counts=(_m + 5, 0, 3), n=_n + 24)
    ADDRESSES[f"swap_{_m}x{_n}_boxes_{_boxes}"] = Run(
        _case, replace(SWAP, tile_m=_m, tile_n=_n, k_boxes=_boxes)
    )
ADDRESSES |= {
    "no_index": Run(replace(BASE, gather=False, reads="any")),
    "table": Run(BASE, storage=WeightStorage.TABLE),
    "table_two_consumers": Run(BASE, replace(SMALL, tile_m=128), storage=WeightStorage.TABLE),
    "experts_32": Run(replace(BASE, counts=(3,) * 6 + (0,) * 25 + (70,), k=144)),
    "experts_33": Run(replace(BASE, counts=(0,) * 30 + (66, 0, 5), k=144)),
    "experts_100": Run(replace(BASE, counts=(0, 2, 0, 0) * 25, k=16, n=8)),
    "no_rows": Run(replace(BASE, counts=(0, 0, 0))),
    "no_tokens": Run(replace(BASE, tokens=0)),
    "one_row": Run(replace(BASE, tokens=1, counts=(0, 0, 1), spare=0, reads="any")),
    "swap_no_index": Run(replace(FEW, gather=False, reads="any"), SWAP),
    "swap_table": Run(FEW, SWAP, storage=WeightStorage.TABLE),
    "swap_experts_33": Run(replace(FEW, counts=(0,) * 30 + (9, 0, 5), k=144), SWAP),
    "swap_no_rows": Run(replace(FEW, counts=(0, 0, 0)), SWAP),
    "swap_no_tokens": Run(replace(FEW, tokens=0), SWAP),
}
SHAPES: dict[str, Run] = {  # what changes the waits
    "all_stages": Run(_k(BASE, 10), replace(SMALL, stages=None, tile_n=128, ctas_per_sm=2)),
    "three_stages": Run(_k(BASE, 7), replace(SMALL, stages=3)),
    "one_step": Run(replace(BASE, k=16)),
    "two_steps": Run(replace(BASE, k=144)),
    "one_step_two_level": Run(replace(BASE, k=80, accumulation=Accumulation.TWO_LEVEL)),
    "three_consumers_two_level": Run(
        replace(BASE, counts=(230, 0, 3), n=128, accumulation=Accumulation.TWO_LEVEL),
        GemmSm90Config(tile_m=192, tile_n=128, stages=2),
    ),
    "group_longer_than_an_expert": Run(
        replace(BASE, counts=(200, 0, 70), n=136, k=144), replace(SMALL, group_m=3)
    ),
    "static": Run(BASE, replace(SMALL, schedule=Schedule.STATIC)),
    "static_three_ctas": Run(
        replace(BASE, counts=(70, 0, 173)), replace(SMALL, schedule=Schedule.STATIC), 3
    ),
    "dynamic": Run(BASE, replace(SMALL, schedule=Schedule.DYNAMIC)),
    "dynamic_three_ctas": Run(
        replace(BASE, counts=(70, 0, 173)), replace(SMALL, schedule=Schedule.DYNAMIC), 3
    ),
    "dynamic_one_step": Run(
        replace(BASE, counts=(200, 0, 33), k=80), replace(SMALL, schedule=Schedule.DYNAMIC)
    ),
    "pingpong": Run(BASE, PINGPONG),
    "pingpong_one_cta": Run(BASE, PINGPONG, grid=1),
    "pingpong_128x64": Run(replace(BASE, counts=(130, 0, 20)), replace(PINGPONG, tile_m=128)),
    "pingpong_64x128": Run(replace(BASE, n=136), replace(PINGPONG, tile_n=128, stages=3)),
    "pingpong_one_step": Run(replace(BASE, k=80), PINGPONG),
    "pingpong_many_stages": Run(BASE, replace(PINGPONG, stages=8)),
    "pingpong_two_level": Run(replace(BASE, accumulation=Accumulation.TWO_LEVEL), PINGPONG),
    "pingpong_dynamic": Run(
        replace(BASE, counts=(70, 0, 133)), replace(PINGPONG, schedule=Schedule.DYNAMIC)
    ),
    "pingpong_more_ctas_than_tiles": Run(replace(BASE, counts=(0, 5, 0)), PINGPONG, grid=3),
    "cluster": Run(PAIRS, CLUSTER),
    "cluster_of_two_consumers": Run(
        replace(PAIRS, counts=(300, 0, 33), n=120), replace(CLUSTER, tile_m=128, tile_n=128)
    ),
    "cluster_odd_tiles": Run(replace(PAIRS, counts=(190, 0, 33)), CLUSTER, grid=4),
    "cluster_one_step": Run(replace(PAIRS, k=80), CLUSTER),
    "cluster_two_level": Run(
        replace(PAIRS, accumulation=Accumulation.TWO_LEVEL), replace(CLUSTER, stages=3)
    ),
    "cluster_static": Run(PAIRS, replace(CLUSTER, schedule=Schedule.STATIC), grid=4),
    "cluster_table": Run(PAIRS, CLUSTER, storage=WeightStorage.TABLE),
    "cluster_pingpong": Run(replace(PAIRS, counts=(270, 0, 33)), replace(CLUSTER, pingpong=True)),
    "cluster_without_work": Run(replace(BASE, counts=(0, 5, 0)), CLUSTER, grid=6),
    "tma_x": Run(_ORDERED, replace(SMALL, tma_x=True)),
    "tma_x_bf16": Run(
        _k(replace(_ORDERED, operand=DType.BF16, epilogue=()), 2.125), replace(SMALL, tma_x=True)
    ),
    "tma_x_starts": Run(replace(_ORDERED, apart=19), replace(SMALL, tma_x=True)),
    "tma_x_pingpong": Run(
        replace(_ORDERED, counts=(200, 0, 140)), replace(PINGPONG, tile_m=128, tma_x=True)
    ),
    "tma_x_cluster": Run(replace(_ORDERED, counts=PAIRS.counts), replace(CLUSTER, tma_x=True)),
    "tma_x_dynamic": Run(_ORDERED, replace(SMALL, schedule=Schedule.DYNAMIC, tma_x=True)),
    "tma_x_one_step": Run(replace(_ORDERED, k=16), replace(SMALL, tma_x=True)),
    **{
        f"tma_x_two_level_{m}": Run(
            replace(_ORDERED, accumulation=Accumulation.TWO_LEVEL, n=n, counts=(m + 6, 0, 33)),
            GemmSm90Config(m, 128, stages=2, ctas_per_sm=ctas, tma_x=True),
        )
        for m, n, ctas in ((64, 136, 2), (128, 136, 1), (192, 128, 1))
    },
    "one_cta": Run(BASE, grid=1),
    "three_ctas": Run(replace(BASE, counts=(70, 0, 173)), grid=3),
    "more_ctas_than_tiles": Run(replace(BASE, counts=(0, 5, 0)), grid=3),
}
SWAPPED: dict[str, Run] = {  # the same of the template for few rows
    "swap_all_stages": Run(_k(FEW, 16), replace(SWAP, stages=None, ctas_per_sm=2)),
    "swap_one_step": Run(replace(FEW, k=16), SWAP),
    "swap_three_ctas": Run(replace(FEW, counts=(9, 0, 34)), SWAP, grid=3),
    "swap_more_ctas_than_tiles": Run(replace(FEW, counts=(0, 5, 0)), SWAP, grid=3),
    "swap_split_2": Run(FEW, replace(SWAP, split_k=2), grid=4),
    "swap_split_4": Run(_k(FEW, 9), replace(SWAP, split_k=4, tile_m=16, k_boxes=2), grid=4),
    "swap_split_int8": Run(
        _k(replace(FEW, operand=DType.INT8), 5), replace(SWAP, split_k=4, tile_n=128), grid=4
    ),
    "swap_split_two_level": Run(
        _k(replace(FEW, accumulation=Accumulation.TWO_LEVEL), 4), replace(SWAP, split_k=2), grid=2
    ),
}
_GATED = replace(
    BASE,
    n=144,
    k=144,
    out=DType.BF16,
    epilogue=(*SCALES, Activation(ActivationFunction.SWIGLU)),
)
_INTERLEAVED = replace(_GATED, interleaved=True)
_FEW_GATED = replace(_GATED, counts=FEW.counts)
_WIDE = replace(SMALL, tile_n=128)
ACTIVATED: dict[str, Run] = {}
for _i, _activation in enumerate(ActivationFunction):
    _nodes = (*EPILOGUES[list(EPILOGUES)[_i % len(EPILOGUES)]], Activation(_activation))
    _case = replace(_GATED, epilogue=_nodes, operand=DType.FP16, out=OUTPUTS[_i % 3], k=136)
    _case = replace(_case, interleaved=_activation.gated and _i % 4 > 1)
    if _activation in (ActivationFunction.SWIGLU, ActivationFunction.GELU_TANH):
        ACTIVATED[f"{_activation}"] = Run(_case, _WIDE)
    else:  # both templates apply the same functions to their values; these kernels are smaller
        _swapped = replace(_case, counts=FEW.counts)
        ACTIVATED[f"swap_{_activation}"] = Run(_swapped, replace(SWAP, tile_m=(8, 16)[_i % 4 // 2]))
_BIASED = replace(_GATED, epilogue=(*SCALES, Bias(DType.FP32), _GATED.epilogue[-1]))
ACTIVATED |= {
    "clamped": Run(
        replace(
            _GATED,
            epilogue=(Activation(ActivationFunction.SWIGLU_OAI),),
            operand=DType.BF16,
            numbers=(0.5, 1.0, 0.25),
        ),
        _WIDE,
    ),
    "gated_256": Run(replace(_GATED, n=288), replace(SMALL, tile_n=256)),
    "gated_64_columns": Run(replace(_INTERLEAVED, out=DType.FP32), SMALL),
    "gated_bias": Run(_BIASED, _WIDE),
    "gated_bias_interleaved": Run(replace(_BIASED, interleaved=True), _WIDE),
    "gated_table_int8": Run(
        replace(_INTERLEAVED, operand=DType.INT8, n=256), _WIDE, storage=WeightStorage.TABLE
    ),
    "gated_cluster_pingpong": Run(
        replace(_INTERLEAVED, counts=(270, 0, 33)),
        replace(CLUSTER, tile_n=128, pingpong=True),
    ),
    "gated_pingpong_128": Run(
        replace(_GATED, counts=(130, 0, 20)), replace(PINGPONG, tile_m=128, tile_n=128)
    ),
    "gated_two_level": Run(replace(_GATED, accumulation=Accumulation.TWO_LEVEL), _WIDE),
    "gated_starts": Run(replace(_GATED, apart=19), _WIDE),
    "starts": Run(replace(BASE, apart=19), SMALL),
    "swap_starts": Run(replace(FEW, apart=5), SWAP),
    "swap_gated_table": Run(_FEW_GATED, SWAP, storage=WeightStorage.TABLE),
    "swap_gated_128": Run(
        replace(_FEW_GATED, interleaved=True), replace(SWAP, tile_n=128, tile_m=48)
    ),
    "swap_gated_bias": Run(
        replace(_BIASED, counts=FEW.counts), replace(SWAP, tile_m=32, k_boxes=2)
    ),
    "swap_gated_split": Run(
        _k(replace(_FEW_GATED, n=64), 4), replace(SWAP, split_k=4, tile_m=16), grid=4
    ),
    "swap_gated_n_16": Run(replace(_FEW_GATED, n=16), SWAP),
}
_STORED = replace(
    _GATED,
    operand=DType.BF16,
    epilogue=(Bias(DType.FP32), Activation(ActivationFunction.GEGLU, stored=True)),
)
ACTIVATED |= {  # the columns before the activation are an output too
    "stored": Run(_STORED, _WIDE),
    "stored_plain": Run(
        replace(_STORED, epilogue=(Activation(ActivationFunction.RELU2, stored=True),), n=72)
    ),
    "stored_fp32": Run(replace(_STORED, out=DType.FP32, k=272), replace(PINGPONG, tile_n=128)),
    "stored_pingpong_256": Run(
        replace(_STORED, n=272, counts=PAIRS.counts), replace(PINGPONG, tile_n=256, cluster_m=2)
    ),
    "stored_shared_256": Run(
        replace(
            _STORED,
            n=240,
            counts=(140, 0, 33),
            epilogue=(Bias(DType.FP32), Activation(ActivationFunction.SWIGLU, stored=True)),
        ),
        GemmSm90Config(tile_m=128, tile_n=256, stages=2),
    ),
    "stored_n_major": Run(replace(_STORED, weight_major=Major.N, reads="any"), _WIDE),
    "stored_two_level": Run(
        _k(replace(_STORED, operand=DType.E4M3, accumulation=Accumulation.TWO_LEVEL), 3),
        replace(_WIDE, tile_m=128),
    ),
}
_N_MAJOR = replace(
    BASE, weight_major=Major.N, operand=DType.FP16, out=DType.FP16, epilogue=(), n=136, k=136
)
_N_GATED = replace(_N_MAJOR, n=144, out=DType.BF16, epilogue=(*SCALES, _GATED.epilogue[-1]))
_N_ALTERNATING = replace(
    _N_GATED, interleaved=True, epilogue=(*SCALES, Bias(DType.FP32), _GATED.epilogue[-1])
)
_N_FEW_ALTERNATING = replace(_N_ALTERNATING, counts=FEW.counts)
_N_FEW = replace(_N_MAJOR, counts=FEW.counts)
_N_FEW_GATED = replace(_N_GATED, counts=FEW.counts)
_SWAP_128 = replace(SWAP, tile_n=128)
N_MAJOR: dict[str, Run] = {
    "n_major": Run(_N_MAJOR),
    "n_major_two_consumers": Run(
        replace(_N_MAJOR, counts=(140, 0, 33)), replace(SMALL, tile_m=128, tile_n=192)
    ),
    "n_major_cluster": Run(replace(_N_MAJOR, counts=PAIRS.counts), replace(CLUSTER, tile_n=128)),
    "n_major_gated": Run(_N_GATED, _WIDE),
    "n_major_gated_cluster": Run(
        replace(_N_GATED, counts=PAIRS.counts), replace(CLUSTER, tile_n=128)
    ),
    "n_major_gated_cluster_256": Run(
        replace(_N_GATED, n=272, counts=PAIRS.counts), replace(CLUSTER, tile_n=256)
    ),
    "n_major_gated_pingpong_128": Run(
        replace(_N_GATED, counts=(130, 0, 20)), replace(PINGPONG, tile_m=128, tile_n=128)
    ),
    "n_major_alternating": Run(_N_ALTERNATING, _WIDE),
    "n_major_alternating_fp32_cluster": Run(
        replace(_N_ALTERNATING, out=DType.FP32, counts=PAIRS.counts), replace(CLUSTER, tile_n=128)
    ),
    "swap_n_major": Run(_N_FEW, SWAP),
    "swap_n_major_128": Run(
        replace(_N_FEW, operand=DType.BF16, out=DType.BF16), replace(_SWAP_128, tile_m=16)
    ),
    "swap_n_major_boxes": Run(
        replace(_N_FEW, n=72), replace(SWAP, tile_m=32, k_boxes=2, evict_first=True)
    ),
    "swap_n_major_split": Run(_k(_N_FEW, 4), replace(_SWAP_128, split_k=4), grid=4),
    "swap_n_major_gated_fp32": Run(
        replace(_N_FEW_GATED, out=DType.FP32), replace(_SWAP_128, tile_m=48)
    ),
    "swap_n_major_alternating": Run(_N_FEW_ALTERNATING, SWAP),
    "swap_n_major_alternating_fp32": Run(
        replace(_N_FEW_ALTERNATING, out=DType.FP32), replace(_SWAP_128, tile_m=48)
    ),
    "swap_n_major_alternating_split": Run(
        _k(_N_FEW_ALTERNATING, 4), replace(SWAP, split_k=2, tile_m=16), grid=4
    ),
    "swap_n_major_gated_split": Run(
        _k(_N_FEW_GATED, 4), replace(_SWAP_128, split_k=2, tile_m=16, k_boxes=2), grid=4
    ),
}
_BLOCKS = _k(replace(BASE, accumulation=Accumulation.TWO_LEVEL, epilogue=BLOCK_SCALES), 3.125)
_FEW_BLOCKS = replace(_BLOCKS, counts=FEW.counts)
_BLOCK_GATED = replace(
    _BLOCKS, n=176, k=272, epilogue=(*BLOCK_SCALES, Activation(ActivationFunction.SWIGLU))
)


def _blocks_of(rows: Granularity, case: Case) -> Case:
    return replace(case, epilogue=(Granularity.TOKEN_BLOCK, rows, *case.epilogue[2:]))


BLOCKS: dict[str, Run] = {  # scales that vary along K
    "blocks": Run(replace(_BLOCKS, n=136)),
    "blocks_halves": Run(
        replace(_BLOCKS, counts=(134, 0, 3), n=248, k=272),
        GemmSm90Config(tile_m=128, tile_n=256, stages=2),
    ),
    "blocks_spans": Run(
        replace(_BLOCKS, counts=(134, 0, 3), n=136, k=1008),
        GemmSm90Config(tile_m=128, tile_n=128, stages=3, scale_span=4),
    ),
    "blocks_spans_all_stages": Run(
        replace(_BLOCKS, n=72, k=1536), replace(SMALL, stages=5, scale_span=4)
    ),
    "blocks_spans_gated": Run(replace(_BLOCK_GATED, k=512, tokens=1), replace(_WIDE, scale_span=4)),
    "blocks_spans_cluster": Run(
        replace(_BLOCKS, counts=PAIRS.counts, n=136, k=512),
        replace(CLUSTER, tile_n=128, scale_span=4),
    ),
    "blocks_spans_pingpong": Run(
        replace(_BLOCKS, counts=(130, 0, 20), k=512),
        replace(PINGPONG, tile_m=128, tile_n=128, scale_span=4),
    ),
    "blocks_192": Run(
        replace(_BLOCKS, n=184, k=144), GemmSm90Config(tile_m=128, tile_n=192, stages=3)
    ),
    "blocks_pingpong": Run(
        replace(_BLOCKS, counts=(130, 0, 20), k=272), replace(PINGPONG, tile_m=128, tile_n=128)
    ),
    "blocks_cluster": Run(
        replace(_BLOCKS, counts=PAIRS.counts, n=136), replace(CLUSTER, tile_n=128)
    ),
    "blocks_table": Run(replace(_BLOCKS, n=136), storage=WeightStorage.TABLE),
    "blocks_64": Run(_blocks_of(Granularity.BLOCK_64, replace(_BLOCKS, n=136)), _WIDE),
    "blocks_32": Run(_blocks_of(Granularity.BLOCK_32, replace(_BLOCKS, n=72)), _WIDE),
    "blocks_dynamic": Run(_BLOCKS, replace(SMALL, schedule=Schedule.DYNAMIC)),
    "blocks_one_step": Run(replace(_BLOCKS, k=80, n=136)),
    "blocks_gated": Run(_BLOCK_GATED, _WIDE),
    "blocks_gated_256": Run(
        replace(_BLOCK_GATED, n=272, gather=False, reads="any"), replace(SMALL, tile_n=256)
    ),
    "blocks_tma_x": Run(
        replace(_BLOCKS, counts=(134, 0, 3), n=248, gather=False, reads="any"),
        GemmSm90Config(tile_m=128, tile_n=256, stages=2, tma_x=True),
    ),
    "blocks_tma_x_192": Run(
        replace(_BLOCKS, counts=(200, 0, 33), n=120, gather=False, reads="any"),
        GemmSm90Config(tile_m=192, tile_n=128, stages=2, tma_x=True),
    ),
    "blocks_tma_x_cluster": Run(
        replace(_BLOCKS, counts=(300, 0, 33), n=120, gather=False, reads="any", k=272),
        GemmSm90Config(tile_m=128, tile_n=128, stages=2, tma_x=True, cluster_m=2),
    ),
    "blocks_quantised": Run(  # in the second tile a group that is cut, and none
        replace(_BLOCKS, counts=(134, 0, 3), n=272, k=272, out=DType.E4M3),
        GemmSm90Config(tile_m=128, tile_n=256, stages=2),
    ),
    "blocks_quantised_gated": Run(
        replace(_BLOCK_GATED, counts=(70, 0, 3), n=352, out=DType.E4M3),
        replace(SMALL, tile_n=256),
    ),
    "blocks_quantised_bias": Run(
        replace(
            _BLOCKS,
            n=112,
            out=DType.E4M3,
            epilogue=(*BLOCK_SCALES, Bias(DType.BF16), Activation(ActivationFunction.RELU2)),
        ),
        _WIDE,
    ),
    "swap_blocks": Run(replace(_FEW_BLOCKS, n=136), SWAP),
    "swap_blocks_128": Run(
        replace(_FEW_BLOCKS, n=136), replace(SWAP, tile_n=128, tile_m=48, k_boxes=2)
    ),
    "swap_blocks_32": Run(
        _blocks_of(Granularity.BLOCK_32, replace(_FEW_BLOCKS, n=136)),
        replace(SWAP, tile_m=16, tile_n=128),
    ),
    "swap_blocks_split": Run(_k(_FEW_BLOCKS, 4), replace(SWAP, split_k=2, k_boxes=2), grid=4),
    "swap_blocks_gated": Run(
        replace(_BLOCK_GATED, counts=FEW.counts), replace(SWAP, tile_m=32, tile_n=128)
    ),
    "swap_blocks_gated_64": Run(
        _blocks_of(Granularity.BLOCK_64, replace(_BLOCK_GATED, counts=FEW.counts)), SWAP
    ),
}
_PACK = GemmPackedSm90Config(stages=2)  # of 256 of K
_HALF = replace(_PACK, k_boxes=2)
_PACKED = replace(FEW, operand=DType.BF16, out=DType.BF16, epilogue=(), n=96, k=520)
_SWIGLU = Activation(ActivationFunction.SWIGLU)
_BIAS_OAI = (Bias(DType.BF16), Activation(ActivationFunction.SWIGLU_OAI))


def _packed(packing: Packing, config: GemmConfig = _PACK, grid: int = 2, **changes: Any) -> Run:
    return Run(replace(_PACKED, packing=packing, **changes), config, grid)


def _half(packing: Packing, grid: int = 2, **changes: Any) -> Run:
    """Three stages of 128 of K."""
    return _packed(packing, grid=grid, **{"k": 264, "config": _HALF, **changes})


_G128, _G32, _MXFP4 = Packing
PACKED: dict[str, Run] = {  # 4-bit weights: mma.sync, or WGMMA, reads them from registers
    **{
        f"packed_{packing}{name}": _packed(
            packing, replace(_PACK, tile_m=tile_m), k=520 if packing is _G32 else 1160
        )
        for packing in Packing
        for tile_m, name in ((8, ""), (16, "_16"))
    },
    **{f"packed_{packing}_one_stage": _packed(packing, k=136, n=64) for packing in Packing},
    "packed_16": _half(_G128, config=replace(_HALF, tile_m=16, stages=3), k=520, out=DType.FP32),
    "packed_48": _half(_G32, config=replace(_HALF, tile_m=48), counts=(50, 0, 33)),
    "packed_96x128": _half(
        _MXFP4, config=replace(_HALF, tile_m=96, tile_n=128), counts=(101, 0, 33)
    ),
    "packed_128x64": _half(
        _MXFP4, config=replace(_HALF, tile_m=128), counts=(140, 0, 3), out=DType.FP16
    ),
    "packed_8x128": _packed(_G32, replace(_PACK, tile_n=128)),
    "packed_8x256": _packed(_G128, replace(_PACK, tile_n=256), n=192, k=264),
    "packed_all_stages": _packed(
        _MXFP4, replace(_PACK, stages=None, ctas_per_sm=4, evict_first=True), k=1672, n=64
    ),
    "packed_split": _packed(_G32, replace(_PACK, split_k=2), grid=4, k=776, n=64),
    "packed_split_128": _packed(
        _MXFP4, replace(_PACK, split_k=2, tile_n=128, tile_m=16), grid=4, k=1024, n=64
    ),
    "packed_scales_bias": _half(_G128, epilogue=(*SCALES, Bias(DType.FP32))),
    "packed_gelu": _half(_MXFP4, epilogue=(Activation(ActivationFunction.GELU),)),
    "packed_gated_gpt_oss": _half(
        _MXFP4, config=replace(_HALF, tile_m=16), epilogue=_BIAS_OAI, n=192, interleaved=True
    ),
    "packed_gated_128": _half(
        _G128,
        config=replace(_HALF, tile_n=128),
        epilogue=(*SCALES, _SWIGLU),
        n=192,
        interleaved=True,
    ),
    "packed_gated_split": _packed(
        _G128, replace(_PACK, split_k=2), grid=4, epilogue=(_SWIGLU,), n=64, k=512
    ),
    "packed_no_index": _half(_MXFP4, gather=False, reads="any"),
    "packed_starts": _half(_G32, apart=5),  # from here on one kernel
    "packed_no_rows": _half(_G32, counts=(0, 0, 0)),
    "packed_no_tokens": _half(_G32, tokens=0),
    "packed_three_ctas": _half(_G32, grid=3, counts=(9, 0, 34)),
    "packed_one_block": _half(_MXFP4, config=replace(_HALF, stages=3), k=520),
    "packed_one_producer": _half(
        _MXFP4,
        config=replace(_HALF, tile_m=144, tile_n=128, one_producer=True),
        counts=(150, 0, 33),
        n=160,
        k=392,
    ),
    "packed_one_producer_g128": _packed(
        _G128,
        replace(_PACK, tile_m=128, tile_n=128, one_producer=True),
        counts=(130, 0, 3),
        epilogue=(Bias(DType.BF16), _SWIGLU),
        n=128,
    ),
    "packed_one_producer_24": _packed(  # one block in the last stage, and half a part of rows
        _MXFP4,
        replace(_PACK, tile_m=24, tile_n=128, one_producer=True),
        counts=(30, 0, 3, 24),
        n=160,
    ),
    "packed_one_producer_40_fp32": _packed(
        _G128,
        replace(_PACK, tile_m=40, tile_n=128, one_producer=True),
        counts=(50, 0, 33),
        out=DType.FP32,
    ),
    "packed_one_producer_24x256_gpt_oss": _packed(
        _MXFP4,
        replace(_PACK, tile_m=24, tile_n=256, one_producer=True),
        counts=(26, 0, 20),
        n=320,
        epilogue=_BIAS_OAI,
        interleaved=True,
    ),
    "packed_one_producer_48x256": _half(
        _MXFP4,
        config=replace(_HALF, tile_m=48, tile_n=256, one_producer=True),
        counts=(50, 0, 20),
        n=192,
        epilogue=_BIAS_OAI,
        interleaved=True,
    ),
    **{
        f"packed_in_turn_{packing}": _packed(packing, replace(_PACK, k_groups=2, **more), **case)
        for packing, more, case in (
            (_MXFP4, {"stages": 4}, {"k": 1160, "n": 64}),  # five steps of K
            (_G128, {"tile_n": 128, "stages": None}, {"k": 520}),
            (
                _G32,
                {"tile_m": 16, "k_boxes": 2, "stages": 4},
                {"k": 136, "n": 192, "epilogue": (Bias(DType.BF16), _SWIGLU)},
            ),
        )
    },
    "packed_four_in_turn": _packed(  # seven steps of K
        _MXFP4, replace(_PACK, k_groups=4, k_boxes=2, stages=8), k=840, counts=(9, 0, 3), n=64
    ),
    "packed_8x32": _packed(  # three tiles for each of two CTAs, five steps of K
        _MXFP4, replace(_PACK, tile_n=32, k_groups=2, stages=4), k=1160, counts=(9, 0, 3)
    ),
    "packed_8x32_four_in_turn": _packed(  # seven steps of K
        _MXFP4, replace(_HALF, tile_n=32, k_groups=4, stages=8), k=840, counts=(9, 0, 3), n=64
    ),
    "packed_8x32_alone": _half(_G128, config=replace(_HALF, tile_n=32)),
    "packed_8x32_scales_bias": _packed(
        _G128,
        replace(_HALF, tile_n=32, k_groups=4, stages=8),
        k=520,
        out=DType.FP32,
        epilogue=(*SCALES, Bias(DType.FP32)),
    ),
    "packed_8x32_gated": _half(
        _G32, config=replace(_HALF, tile_n=32, k_groups=2, stages=4), epilogue=(_SWIGLU,), n=192
    ),
    "packed_8x32_gated_scales": _half(
        _G128,
        config=replace(_HALF, tile_n=32, k_groups=2, stages=4),
        epilogue=(*SCALES, _SWIGLU),
        n=128,
    ),
    "packed_8x32_gpt_oss": _half(
        _MXFP4,
        config=replace(_HALF, tile_n=32, k_groups=2, stages=None, ctas_per_sm=4),
        epilogue=_BIAS_OAI,
        n=128,
        interleaved=True,
    ),
    "packed_8x32_in_a_cluster": _half(  # two and three of five
        _G32, config=replace(_HALF, tile_n=32, k_groups=2, split_k=2, stages=4), k=584, n=64
    ),
    "packed_one_producer_192": _packed(  # slices of half of a row of float32
        _G32,
        replace(_PACK, tile_m=96, tile_n=192, k_boxes=2, one_producer=True),
        counts=(85, 0, 33, 16),
        n=320,
        k=264,
        out=DType.FP32,
    ),
    "packed_one_producer_in_turn": _half(  # five
        _MXFP4,
        config=replace(_HALF, tile_m=32, tile_n=128, k_groups=2, stages=4, one_producer=True),
        counts=(33, 0, 9),
        k=584,
    ),
    "packed_in_turn_in_a_cluster": _half(  # two and three of five
        _G128, config=replace(_HALF, k_groups=2, split_k=2, stages=4), k=584, n=64
    ),
    "packed_one_producer_two_ctas": _half(
        _G32,
        config=replace(_HALF, tile_m=128, one_producer=True, ctas_per_sm=2),
        counts=(140, 0, 33),
        gather=False,
        reads="any",
        n=64,
    ),
}
RUNS = NUMBERS | ADDRESSES | SHAPES | SWAPPED | ACTIVATED | N_MAJOR | BLOCKS | PACKED


def check_run(runs: dict[str, Run], name: str) -> None:
    """One of some runs, which take turns: every other schedule has values that need rounding."""
    run = runs[name]
    for order in schedule.in_turn(runs, name):
        exact = order.seed % 2 == 0
        inputs = make_inputs(run.case, "cpu", exact=exact, seed=order.seed)
        more = other_outputs(run.case, inputs)
        out = _simulate(run, {**inputs, **more}, order)
        check_outputs(out, more, run.case, inputs, exact)


def other_outputs(case: Case, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What the case's kernel writes beside the output, by parameter."""
    if case.problem.stored:
        return {"h": poisoned(case.rows, case.n, inputs["out_dtype"], "cpu")}
    if case.problem.quantized_out:
        shape = case.rows, case.problem.out_groups
        return {"out_scale": poisoned(*shape, torch.float32, "cpu")}
    return {}


def check_outputs(
    out: Tensor, more: dict[str, Tensor], case: Case, inputs: dict[str, Any], exact: bool
) -> None:
    """As `check`. more: as `other_outputs` gives it."""
    if case.problem.quantized_out:
        check_quantized(out, more["out_scale"], case, inputs, exact=exact)
        return
    check(out, case, inputs, exact=exact)
    if case.problem.stored:
        before = {**inputs, "activation": None, "interleaved": False}
        check(more["h"], replace(case, epilogue=case.epilogue[:-1]), before, exact=exact)


def _simulate(run: Run, inputs: dict[str, Any], order: schedule.Schedule) -> Tensor:
    def once(line_info: bool) -> Tensor:
        kernel = launch.kernel(run.problem, run.config, line_info)
        return launch.simulate(kernel, inputs, order, run.grid, rows=run.case.rows)

    try:
        return once(line_info=False)
    except Fault:
        return once(line_info=True)  # the same fault, and it names the Python line
