"""What the emitters write: legality, every kernel without a spill, parameters, identical builds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import struct
from typing import Any

import pytest

from cutlass_moe.choose import heuristics_sm90 as heuristics
from cutlass_moe.images.cache import Cache
from cutlass_moe.images.compiler import Request, Result, build_images
from cutlass_moe.images.toolchains import default_build
from cutlass_moe.models import shapes
from cutlass_moe.models.problems import model_problems
from cutlass_moe.runtime.tensor_map import SWIZZLES
from emitters.compile.cubin import _sections as sections
from emitters.compile.cubin import read_cubin
from emitters.compile.emit import param_kinds
from emitters.spec.config_packed_sm90 import MMA_ROWS, GemmPackedSm90Config
from emitters.spec.config_sm90 import GemmSm90Config
from emitters.spec.config_swap_sm90 import GemmSwapSm90Config
from emitters.spec.dtypes import ACCUMULATIONS, OUTPUTS, Accumulation, DType
from emitters.spec.epilogue import Activation, ActivationFunction, ActivationGradient, Bias
from emitters.spec.gemm import GemmProblem, Granularity, Major, WeightFormat, WeightStorage
from emitters.spec.image import Image, LaunchRecord, image_key
from emitters.spec.layer_steps import (
    ActivateBackwardProblem,
    ActivateProblem,
    GatherSumProblem,
    Step,
    StepConfig,
)
from emitters.spec.packing import Packing
from emitters.spec.registry import (
    Config,
    GemmConfig,
    Problem,
    config_from_json,
    problem_from_json,
    why_illegal,
)
from emitters.spec.staged_sm90 import Schedule
from tests.support.cases import scales_and_nodes
from tests.support.fake_images import image_for

PROBLEM = GemmProblem(
    x=DType.E4M3,
    weight=WeightFormat(DType.E4M3),
    accumulation=Accumulation.FAST,
    out=DType.BF16,
    n=1536,
    k=2048,
    num_experts=128,
    gather=True,
    x_scale=Granularity.TOKEN,
    weight_scale=Granularity.CHANNEL,
)
ODD = dataclasses.replace(PROBLEM, n=208, k=1040, num_experts=33)  # tails of N and K
EPILOGUES = (
    (),
    (Granularity.TOKEN, Granularity.CHANNEL),
    (Granularity.TOKEN, Granularity.EXPERT, Bias(DType.FP32)),
    (Granularity.TOKEN, Granularity.CHANNEL, Bias(DType.BF16)),
    (Granularity.TOKEN, Granularity.CHANNEL, Activation(ActivationFunction.GEGLU)),
    (Bias(DType.BF16), Activation(ActivationFunction.SWIGLU_OAI)),
    (Granularity.TOKEN, Granularity.CHANNEL, Activation(ActivationFunction.GELU)),
)
GATED = dataclasses.replace(PROBLEM, **scales_and_nodes(EPILOGUES[4]))
STORED = (Activation(ActivationFunction.SWIGLU, stored=True),)
GRADIENT = (ActivationGradient(ActivationFunction.SWIGLU_OAI),)
SUMS = [(operand, sums) for operand, kinds in ACCUMULATIONS.items() for sums in kinds]
# Kernels of one of these differ in the opcode of their WGMMAs alone, not in what registers hold;
# int32 sums become float32 in place.
ALIKE = [
    [(o, a) for o, a in SUMS if (a is Accumulation.TWO_LEVEL) == two_level]
    for two_level in (False, True)
]


def holding(problem: GemmProblem, dtype: DType, **changes: Any) -> GemmProblem:
    """The problem with another dtype of x and weight."""
    weight = dataclasses.replace(problem.weight, dtype=dtype)
    return dataclasses.replace(problem, x=dtype, weight=weight, **changes)


def kept(problem: GemmProblem, **changes: Any) -> GemmProblem:
    """The problem with other words on how its weights lie."""
    return dataclasses.replace(problem, weight=dataclasses.replace(problem.weight, **changes))


def every_problem(twins: bool = True) -> list[GemmProblem]:
    """Every pair of operand with accumulation, output and epilogue, and the ways to find rows and
    weights.

    twins: else, of problems whose kernels are alike (operands with sums of one kind; sizes with
    and without tails), one and another in turn.
    """
    problems = []
    for (i, (operand, accumulation)), (j, epilogue) in itertools.product(
        enumerate(SUMS), enumerate(EPILOGUES)
    ):
        others = next(sums for sums in ALIKE if (operand, accumulation) in sums)
        if not twins and others[j % len(others)] != (operand, accumulation):
            continue
        out, base = OUTPUTS[(i + j) % len(OUTPUTS)], (PROBLEM, ODD)[(i + j) % 2]
        epilogue_of = scales_and_nodes(epilogue)
        problems.append(holding(base, operand, accumulation=accumulation, out=out, **epilogue_of))
    for i, base in enumerate((PROBLEM, ODD)):
        ways = [dataclasses.replace(base, gather=False)]
        for epilogue in ((), (Activation(ActivationFunction.SWIGLU),), STORED, GRADIENT):
            floats = holding(
                base, DType.BF16, accumulation=Accumulation.FP32, **scales_and_nodes(epilogue)
            )
            ways.append(kept(floats, major=Major.N))
        alternating = Activation(ActivationFunction.SWIGLU_OAI, alternating=True)
        ways.append(dataclasses.replace(ways[2], epilogue=(Bias(DType.BF16), alternating)))
        ways.append(kept(base, storage=WeightStorage.TABLE))
        gated = dataclasses.replace(GATED, n=base.n)
        ways.append(kept(gated, storage=WeightStorage.TABLE))
        ways.append(dataclasses.replace(base, num_experts=1024))
        ways.append(dataclasses.replace(base, num_experts=1, k=16))
        problems += ways if twins else ways[i::2]
    for i, packing in enumerate(Packing):
        problems.append(packed(packing, n=320, k=1032, out=OUTPUTS[i], gather=False))
        epilogues = EPILOGUES[3:6]  # without any: what is shipped, and this odd problem
        for epilogue in epilogues if twins else (*epilogues[:i], *epilogues[i + 1 :]):
            problems.append(packed(packing, **scales_and_nodes(epilogue)))
    return problems


def packed(packing: Packing, **changes: Any) -> GemmProblem:
    """A problem with packed weights."""
    plain = {"accumulation": Accumulation.FP32, "x_scale": None, "weight_scale": None}
    problem = dataclasses.replace(PROBLEM, x=DType.BF16, weight=WeightFormat(packing), **plain)
    return dataclasses.replace(problem, **changes)


def shipped(dtype: str) -> list[Request]:
    """For a model: the kernels that are no GEMM, and each config of its GEMMs with one of those
    that have it, in turn. MXFP4 is gpt-oss's, which has biases; its kernels that are no GEMM are
    those of the others for fewer experts."""
    model = "gpt-oss-20b" if dtype == "mxfp4" else "qwen3-30b"
    configs: dict[Problem, tuple[Config, ...]] = {
        problem: heuristics.every_config(problem)
        for problem in model_problems(shapes.MODELS[model], dtype).values()
    }
    gemms = [problem for problem in configs if isinstance(problem, GemmProblem)]
    others = [problem for problem in configs if problem not in gemms and dtype != "mxfp4"]
    requests = [Request(problem, config) for problem in others for config in configs[problem]]
    of_gemms = list(dict.fromkeys(c for gemm in gemms for c in configs[gemm]))
    # int8's are those of fp8, whose registers they share
    for i, config in enumerate(of_gemms[:: 2 if dtype == "int8" else 1]):
        having = [gemm for gemm in gemms if config in configs[gemm]]
        requests.append(Request(having[i % len(having)], config))
    return requests


@pytest.fixture(scope="module")
def compiled(shared_cache: Cache) -> list[Result]:
    """Problems with one of their configs, in turn, and what is shipped for a model."""
    requests = [request for dtype in shapes.DTYPES for request in shipped(dtype)]
    for i, problem in enumerate(every_problem(twins=False)):
        configs = heuristics.candidates(problem)
        requests.append(Request(problem, configs[i % len(configs)]))
    two_k_tiles = dataclasses.replace(GATED, accumulation=Accumulation.TWO_LEVEL, k=256)
    requests.append(Request(two_k_tiles, GemmSm90Config()))  # a loop of one step
    for problem in (*every_activation(), GatherSumProblem(DType.FP32, DType.FP16, 72)):
        requests += [Request(problem, config) for config in heuristics.every_config(problem)]
    return list(build_images(shared_cache, requests))


def every_activation() -> list[ActivateProblem]:
    """The activations of layers in training, and their gradients: one to three vectors a thread,
    each function once in either dtype."""
    return [
        kind(function, (DType.BF16, DType.FP16)[turn], inter, function.gated and turn > 0)
        for i, kind in enumerate((ActivateProblem, ActivateBackwardProblem))
        for number, function in enumerate(ActivationFunction)
        for turn in ((i + number) % 2,)
        for inter in ((256, 768, 1024, 14336)[number % 4],)
    ]


def test_shipped_kernels_compile_without_spills(compiled: list[Result]) -> None:
    assert len(compiled) > 100
    assert [(r.request, r.error) for r in compiled if r.image is None] == []
    images = {r.request: r.image for r in compiled if r.image is not None}
    assert {q: i.record.spill_bytes for q, i in images.items() if i.record.spill_bytes} == {}


def test_wgmmas_of_packed_weights_overlap(compiled: list[Result]) -> None:
    """The kernel waits for two at once; ptxas waits for each WGMMA where it can't tell who touches
    a register in between."""
    seen = set()
    for result in compiled:
        problem, config = result.request.problem, result.request.config
        if not isinstance(problem, GemmProblem) or problem.weight.packing is None:
            continue
        if config.tile_m == MMA_ROWS:
            continue
        assert result.image is not None
        code = (data for name, data in sections(result.image.cubin) if name.startswith(".text."))
        words = [word for word, _ in struct.iter_unpack("<QQ", next(code))]
        multiplies = sum(word & 0xFFFF == 0x7DF0 for word in words)  # HGMMA
        # WARPGROUP.DEPBAR; else .ARRIVE
        waits = sum(word & 0xFFFF == 0x79C5 and word >> 47 & 1 for word in words)
        assert 0 < waits <= multiplies // 2 + 1, (result.request, multiplies, waits)
        seen.add(problem.weight.packing)
    assert seen == set(Packing)


def test_parameters_are_the_cubins_own(compiled: list[Result]) -> None:
    for result in compiled:
        assert result.image is not None
        record, facts = result.image.record, read_cubin(result.image.cubin)
        assert facts.symbol == record.symbol
        assert tuple((p.offset, p.size) for p in record.params) == facts.params
        asked = result.request
        kinds = param_kinds(asked.problem, asked.config)
        assert [(p.name, p.kind) for p in record.params] == kinds
        assert all(m.swizzle in SWIZZLES for m in record.tensor_maps)


def test_records_say_what_was_asked(compiled: list[Result]) -> None:
    for result in compiled:
        assert result.image is not None
        problem, config = result.request.problem, result.request.config
        record = LaunchRecord.from_json(result.image.record.to_json())
        assert record == result.image.record
        assert problem_from_json(record.problem) == problem
        assert config_from_json(record.config) == config
        assert record.build == default_build()
        if isinstance(problem, Step) or isinstance(config, StepConfig):
            continue
        assert record.smem_bytes == config.smem_bytes(problem) <= 232_448 // config.ctas_per_sm
        assert (record.smem_bytes + 1024) * (config.ctas_per_sm + 1) > 233_472  # no CTA more
        assert record.threads * config.ctas_per_sm * record.registers <= 65_536


@pytest.mark.parametrize("gather", [True, False])
def test_parameters_follow_the_problem(gather: bool) -> None:
    problem = dataclasses.replace(PROBLEM, gather=gather)
    names = [name for name, _ in param_kinds(problem, GemmSm90Config())]
    assert ("index" in names) == gather
    assert names[-2:] == ["per_token_scale", "scale"]
    dynamic = param_kinds(problem, GemmSm90Config(schedule=Schedule.DYNAMIC))
    assert [name for name, _ in dynamic] == [*names, "counters"]
    gated = dataclasses.replace(problem, epilogue=GATED.epilogue)
    at = names.index("per_token_scale")
    for config in (GemmSm90Config(), GemmSwapSm90Config()):
        found = [name for name, _ in param_kinds(gated, config)]
        assert found == [*names[:at], "column_stride", "gate_stride", *names[at:]]


PROBLEM_REASONS = [
    ("fp32 operands", {"x": DType.FP32}, "got fp32"),
    ("int8 accumulated fast", {"x": DType.INT8}, "must be int32"),
    ("bf16 in two levels", {"x": DType.BF16, "accumulation": Accumulation.TWO_LEVEL}, "fp32"),
    ("x and weight apart", {"weight": WeightFormat(DType.E5M2)}, "must be e4m3 like x, got e5m2"),
    ("int8 output", {"out": DType.INT8}, "got int8"),
    ("ragged K", {"k": 2056}, "K must be a multiple of 16"),
    ("ragged N", {"n": 1532}, "N must be a multiple of 8"),
    ("N of nothing", {"n": 0}, "must be positive"),
    ("no expert", {"num_experts": 0}, "must be positive"),
    ("too many experts", {"num_experts": 1025}, "at most 1024"),
    ("a node twice", {"epilogue": (Bias(DType.BF16), Bias(DType.FP32))}, "at most once"),
    (
        "a node after the activation",
        {"epilogue": (*GATED.epilogue, Bias(DType.BF16))},
        "must be the last",
    ),
    (
        "a gradient before the last node",
        {"epilogue": (ActivationGradient(ActivationFunction.SILU), Bias(DType.BF16))},
        "must be the last",
    ),
    (
        "a gradient of rows in order",
        {"epilogue": (ActivationGradient(ActivationFunction.SILU),), "gather": False},
        "must be of gathered rows",
    ),
    ("x scaled by expert", {"x_scale": Granularity.EXPERT}, "one scale per token or none"),
    (
        "weights by token",
        {"weight_scale": Granularity.TOKEN},
        "per channel, one per expert or none",
    ),
    ("gated blocks cut", {"n": 1544, "epilogue": GATED.epilogue}, "a multiple of 16"),
]


@pytest.mark.parametrize(
    ("changes", "reason"), [r[1:] for r in PROBLEM_REASONS], ids=[r[0] for r in PROBLEM_REASONS]
)
def test_illegal_problems_have_a_reason(changes: dict, reason: str) -> None:
    problem = dataclasses.replace(PROBLEM, **changes)
    assert reason in (why_illegal(problem) or "")
    assert heuristics.candidates(problem) == ()
    with pytest.raises(ValueError, match=reason):
        heuristics.choose(problem, 1, 1.0)


CONFIG_REASONS = [
    ("32 rows", {"tile_m": 32}, "64 rows per consumer"),
    ("N between slices", {"tile_n": 96}, "multiple of 64"),
    ("N beyond WGMMA", {"tile_n": 320}, "up to 256"),
    ("cluster of four", {"cluster_m": 4}, "1 or 2"),
    ("TMA of gathered rows", {"tma_x": True}, "tma_x must be False for rows read through an index"),
    ("half a pair in a group", {"cluster_m": 2, "group_m": 3}, "multiple of cluster_m"),
    ("dynamic pairs", {"cluster_m": 2, "schedule": Schedule.DYNAMIC}, "cluster_m must be 1"),
    ("ping-pong of 192 rows", {"tile_m": 192, "tile_n": 64, "pingpong": True}, "at most 128"),
    ("three CTAs", {"ctas_per_sm": 3}, "1 or 2"),
    ("one stage", {"stages": 1}, "must be 2 to"),
    ("more stages than fit", {"stages": 5}, "shared memory per CTA must be"),
    ("registers at launch", {"tile_m": 192}, "the launch provides 128"),
    ("registers", {"tile_n": 192, "pingpong": True}, "a consumer thread must need at most"),
]


@pytest.mark.parametrize(
    ("changes", "reason"), [r[1:] for r in CONFIG_REASONS], ids=[r[0] for r in CONFIG_REASONS]
)
def test_illegal_configs_have_a_reason(changes: dict, reason: str) -> None:
    assert why_illegal(PROBLEM, GemmSm90Config()) is None
    assert reason in (why_illegal(PROBLEM, GemmSm90Config(**changes)) or "")


SPAN_REASONS = [
    ("half a span", {}, {"scale_span": 2}, "scale_span must be 1 or 4, got 2"),
    ("scales by TMA", {"gather": False}, {"tma_x": True}, "unless threads copy scales along K"),
    ("17 scales", {"k": 2176}, {}, "a multiple of 4 scales, got 17"),
    ("many stages", {}, {"tile_m": 64, "tile_n": 64}, "stages must be at most 5"),
]


@pytest.mark.parametrize(
    ("changes", "config", "reason"), [r[1:] for r in SPAN_REASONS], ids=[r[0] for r in SPAN_REASONS]
)
def test_spans_of_scales_have_reasons(changes: dict, config: dict, reason: str) -> None:
    spans = GemmSm90Config(scale_span=4)
    assert "unless threads copy scales along K" in (why_illegal(PROBLEM, spans) or "")
    scales = scales_and_nodes((Granularity.TOKEN_BLOCK, Granularity.BLOCK_128))
    blocks = dataclasses.replace(PROBLEM, accumulation=Accumulation.TWO_LEVEL, **scales)
    assert why_illegal(blocks, spans) is None
    problem = dataclasses.replace(blocks, **changes)
    assert reason in (why_illegal(problem, dataclasses.replace(spans, **config)) or "")


def test_n_major_weights_have_reasons() -> None:
    floats = holding(
        PROBLEM, DType.BF16, accumulation=Accumulation.FP32, x_scale=None, weight_scale=None
    )
    n_major = kept(floats, major=Major.N)
    gated = dataclasses.replace(n_major, epilogue=GATED.epilogue)
    table = kept(n_major, storage=WeightStorage.TABLE)
    ragged = dataclasses.replace(n_major, n=1532, out=DType.FP32)
    assert "must be bf16 or fp16" in (why_illegal(kept(PROBLEM, major=Major.N)) or "")
    assert "must be one stacked tensor" in (why_illegal(table) or "")
    assert "N must be a multiple of 8" in (why_illegal(ragged) or "")
    pairs = GemmSm90Config(tile_n=64, cluster_m=2)
    assert "boxes of 64 columns" in (why_illegal(n_major, pairs) or "")
    assert why_illegal(n_major, GemmSm90Config(tile_n=64)) is None
    assert "one of up" in (why_illegal(gated, GemmSwapSm90Config()) or "")
    assert why_illegal(gated, GemmSwapSm90Config(tile_n=128)) is None
    for rows in (0.1, 4.0, 1000.0):
        config = heuristics.choose(gated, 1, rows)
        assert isinstance(config, GemmSwapSm90Config) == (rows < 1000)


def test_two_outputs_have_reasons() -> None:
    stored = dataclasses.replace(PROBLEM, epilogue=STORED)
    gradient = dataclasses.replace(PROBLEM, epilogue=GRADIENT)
    for problem in (stored, gradient):
        assert why_illegal(problem, GemmSm90Config(tile_n=128)) is None
        assert "the only one" in (why_illegal(problem, GemmSwapSm90Config()) or "")
        assert isinstance(heuristics.choose(problem, 1, 0.1), GemmSm90Config)
    alternating = Activation(ActivationFunction.SWIGLU, alternating=True, stored=True)
    floats = holding(PROBLEM, DType.BF16, accumulation=Accumulation.FP32, x_scale=None)
    floats = dataclasses.replace(floats, weight_scale=None, epilogue=(alternating,))
    assert "must not be stored" in (why_illegal(kept(floats, major=Major.N)) or "")
    geglu = dataclasses.replace(
        floats, epilogue=(Activation(ActivationFunction.GEGLU, stored=True),)
    )
    assert "consumer thread" in (why_illegal(geglu, GemmSm90Config(128, 256)) or "")
    assert why_illegal(geglu, GemmSm90Config(64, 256, pingpong=True)) is None


def test_gated_tiles_hold_whole_slices_of_outputs() -> None:
    for tile_n, reason in ((64, "multiple of 128"), (192, "multiple of 128"), (128, None)):
        found = why_illegal(GATED, GemmSm90Config(tile_n=tile_n))
        assert found is None if reason is None else reason in (found or "")
    wide = dataclasses.replace(GATED, out=DType.FP32)
    assert why_illegal(wide, GemmSm90Config(tile_n=64)) is None


SWAP_REASONS = [
    ("24 rows", {"tile_m": 24}, "multiple of 16"),
    ("many rows", {"tile_m": 112}, "up to 96"),
    ("columns between blocks", {"tile_n": 96}, "64 or 128"),
    ("three boxes", {"k_boxes": 3}, "1, 2 or 4"),
    ("a cluster of three", {"split_k": 3}, "1, 2, 4 or 8"),
    ("more CTAs than steps of K", {"split_k": 8, "k_boxes": 4}, "at most 4, the number of stages"),
    ("four CTAs", {"ctas_per_sm": 4}, "1 to 3"),
    ("one stage", {"stages": 1}, "must be 2 to"),
    ("more stages than fit", {"stages": 30}, "shared memory per CTA must be"),
    ("registers", {"tile_m": 96, "tile_n": 128, "ctas_per_sm": 2}, "registers"),
]


@pytest.mark.parametrize(
    ("changes", "reason"), [r[1:] for r in SWAP_REASONS], ids=[r[0] for r in SWAP_REASONS]
)
def test_illegal_swap_configs_have_a_reason(changes: dict, reason: str) -> None:
    assert why_illegal(PROBLEM, GemmSwapSm90Config()) is None
    assert reason in (why_illegal(PROBLEM, GemmSwapSm90Config(**changes)) or "")


PACKED_PROBLEM_REASONS = [
    ("fp16 x", {"x": DType.FP16}, "x must be bf16 for packed weights, got fp16"),
    ("N-major", {"weight": WeightFormat(Packing.MXFP4, Major.N)}, "must be K-major"),
    (
        "a table",
        {"weight": WeightFormat(Packing.MXFP4, storage=WeightStorage.TABLE)},
        "one stacked tensor",
    ),
    ("ragged N", {"n": 1544}, "N must be a multiple of 32"),
    ("ragged gates", {"n": 1568, "epilogue": GATED.epilogue}, "N must be a multiple of 64"),
]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [r[1:] for r in PACKED_PROBLEM_REASONS],
    ids=[r[0] for r in PACKED_PROBLEM_REASONS],
)
def test_illegal_packed_problems_have_a_reason(changes: dict, reason: str) -> None:
    problem = packed(Packing.MXFP4)
    assert why_illegal(problem) is None
    problem = dataclasses.replace(problem, **changes)
    assert reason in (why_illegal(problem) or "")
    assert heuristics.candidates(problem) == ()


PACKED_REASONS = [
    ("24 rows", {"tile_m": 24}, "a multiple of 16"),
    ("20 rows", {"tile_m": 20, "one_producer": True}, "a multiple of 8 "),
    ("many rows", {"tile_m": 272}, "16 to 256"),
    ("columns between consumers", {"tile_n": 96}, "64, 128, 192 or 256"),
    ("half of a WGMMA", {"tile_m": 16, "tile_n": 32}, "or 32 with tile_m 8, got 32 with 16"),
    ("half a block of K", {"k_boxes": 1}, "k_boxes must be 2 or 4"),
    ("three groups", {"k_groups": 3}, "k_groups must be 1, 2 or 4"),
    ("more groups than steps of K", {"k_groups": 4, "split_k": 8}, "k_groups must be at most"),
    ("stages of both groups", {"k_groups": 2, "stages": 5}, "must be a multiple of k_groups 2"),
    ("few rows", {"tile_m": 8, "one_producer": True}, "tile_m must be at least 16"),
    ("a wide WGMMA", {"tile_m": 256, "tile_n": 128}, "a thread at launch must need at most 128"),
    ("a cluster of three", {"split_k": 3}, "1, 2, 4 or 8"),
    ("registers of five CTAs", {"ctas_per_sm": 5}, "registers"),
    ("more stages than fit", {"stages": 30}, "shared memory per CTA must be"),
    ("registers", {"tile_m": 256, "tile_n": 128}, "registers"),
]


@pytest.mark.parametrize(
    ("changes", "reason"), [r[1:] for r in PACKED_REASONS], ids=[r[0] for r in PACKED_REASONS]
)
def test_illegal_packed_configs_have_a_reason(changes: dict, reason: str) -> None:
    problem = packed(Packing.INT4_G128)
    assert why_illegal(problem, GemmPackedSm90Config()) is None
    assert reason in (why_illegal(problem, GemmPackedSm90Config(**changes)) or "")


def test_packed_weights_have_a_template_of_their_own() -> None:
    problem = packed(Packing.MXFP4)
    assert "must be packed" in (why_illegal(PROBLEM, GemmPackedSm90Config()) or "")
    for config in (GemmSm90Config(), GemmSwapSm90Config()):
        assert "must not be packed" in (why_illegal(problem, config) or "")


@pytest.mark.parametrize(
    "config",
    [GemmSm90Config(group_m=3), GemmSwapSm90Config(split_k=2), GemmPackedSm90Config(ctas_per_sm=3)],
)
def test_configs_round_trip(config: GemmConfig) -> None:
    plain = json.loads(json.dumps(config.to_json()))
    assert config_from_json(plain) == config
    for wrong in ({**plain, "template": "gemm"}, {**plain, "tile": 1}):
        with pytest.raises(ValueError, match="config"):
            config_from_json(wrong)


def test_other_architectures_have_a_reason() -> None:
    assert "sm_80" in (why_illegal(PROBLEM, arch="sm_80") or "")


def test_two_level_accumulation_multiplies_wide_tiles_in_halves() -> None:
    problem = dataclasses.replace(PROBLEM, accumulation=Accumulation.TWO_LEVEL)
    assert GemmSm90Config().parts(PROBLEM) == 1 and GemmSm90Config().parts(problem) == 2
    assert why_illegal(problem, GemmSm90Config()) is None
    three = GemmSm90Config(tile_m=192, tile_n=256)  # consumers, with fewer registers each
    assert "registers" in (why_illegal(problem, three) or "")
    assert len(heuristics.candidates(problem)) >= 2


def test_slices_of_a_tile_leave_together_where_three_stages_remain() -> None:
    ordered = dataclasses.replace(PROBLEM, gather=False, accumulation=Accumulation.TWO_LEVEL)
    wide = GemmSm90Config(128, 256, tma_x=True)
    assert (wide.slices_together(ordered), wide.pipeline_stages(ordered)) == (4, 3)
    three = GemmSm90Config(192, 128, tma_x=True)
    assert (three.slices_together(ordered), three.pipeline_stages(ordered)) == (2, 4)
    alone = (
        (dataclasses.replace(wide, stages=4), ordered),
        (dataclasses.replace(wide, tma_x=False), ordered),
        (GemmSm90Config(64, 128, ctas_per_sm=2, tma_x=True), ordered),
        (wide, dataclasses.replace(ordered, accumulation=Accumulation.FAST)),
        (wide, dataclasses.replace(ordered, out=DType.FP32)),
        (wide, dataclasses.replace(ordered, num_experts=4096)),
    )
    assert [config.slices_together(problem) for config, problem in alone] == [1] * len(alone)


@pytest.mark.parametrize("rows", [0.0, 0.1, 8.0, 64.0, 500.0, 1e6])
def test_choices_are_candidates(rows: float) -> None:
    for problem in every_problem():
        config = heuristics.choose(problem, 1, rows)
        assert config in heuristics.candidates(problem)
        for schedule in Schedule:
            named = heuristics.choose(problem, 1, rows, str(schedule))
            if problem.weight.packing:
                assert named == config  # there is one schedule only
                continue
            assert named.scheduled(schedule) == named
            assert why_illegal(problem, named) is None
            assert named.tile_m == config.tile_m or isinstance(config, GemmSwapSm90Config)


def test_keys_tell_problems_configs_and_archs_apart() -> None:
    keys = {
        image_key(problem, config, arch)
        for problem in (PROBLEM, ODD, dataclasses.replace(PROBLEM, x_scale=None))
        for config in (GemmSm90Config(), GemmSm90Config(stages=3))
        for arch in ("sm_90a", "sm_100a")
    }
    assert len(keys) == 12
    assert image_key(PROBLEM, GemmSm90Config(), "sm_90a") in keys


def test_json_round_trips() -> None:
    for problem in every_problem():
        assert GemmProblem.from_json(json.loads(json.dumps(problem.to_json()))) == problem


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"abi": 0}', '{"abi": 1}'],
)
def test_other_launch_records_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        LaunchRecord.from_json(text)


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"not a cubin" * 20])
def test_other_cubins_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        read_cubin(data)


def test_images_compare_by_content() -> None:
    _, image = image_for(ODD, GemmSm90Config(tile_n=64))
    assert Image(bytes(image.cubin), LaunchRecord.from_json(image.record.to_json())) == image
