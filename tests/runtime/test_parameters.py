"""The values of kernels' parameters, by name: each has one, and each tensor finds its own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.images.toolchains import default_build
from cutlass_moe.operands import Operands
from cutlass_moe.runtime.parameters import (
    Strides,
    activate_values,
    combine_values,
    gather_sum_values,
    gemm_values,
    gemm_views,
    quantize_groups_values,
    quantize_values,
    route_values,
    router_values,
    weight_grad_values,
    weight_grad_views,
)
from emitters.spec.config_sm90 import GemmSm90Config
from emitters.spec.dtypes import DType
from emitters.spec.epilogue import Activation, ActivationFunction, Bias
from emitters.spec.gemm import GemmProblem, Granularity, Major, WeightFormat, WeightStorage
from emitters.spec.layer_steps import (
    ActivateBackwardProblem,
    ActivateProblem,
    CombineProblem,
    GatherSumProblem,
    QuantizeGroupsProblem,
    QuantizeProblem,
    RouteLogitsProblem,
    RouteProblem,
    TopkProblem,
)
from emitters.spec.registry import Config, Problem
from emitters.spec.staged_sm90 import Schedule
from emitters.spec.weight_grad import RAGGED_ROWS, Side, WeightGradProblem
from tests.support.cases import BASE, BLOCK_SCALES, FLOAT, TWO_LEVEL
from tests.support.fake_driver import INT, parameters_of

ADDRESS = {  # of any kernel's tensors
    name: 256 * number
    for number, name in enumerate(
        (*Operands._fields, "out", "out_scale", "source", "end", "q", "rows", "weights", "inverse")
        + (
            "static_scale",
            "overflow",
            "residual",
            "ids",
            "expert_map",
            "histograms",
            "logits",
            "correction_bias",
            "left",
            "right",
            "order",
            "bounds",
            "h",
            "active",
            "grad_active",
            "grad_h",
            "grad_weights",
        ),
        start=1,
    )
}
PLAIN = replace(FLOAT, gather=False, epilogue=()).problem
GATED = Activation(ActivationFunction.SWIGLU)
FULL = replace(
    BASE.problem,
    epilogue=(Bias(DType.BF16), GATED),
    weight=WeightFormat(DType.E4M3, storage=WeightStorage.TABLE),
)
BLOCKS = replace(
    TWO_LEVEL,
    gather=False,
    out=DType.E4M3,
    epilogue=(*BLOCK_SCALES, GATED),
).problem
ROUTER = (128, DType.BF16, "softmax", 1)
_ROUTE = {"num_ids": 9, "pairs": 24, "choices": 3, "capacity": 24}
_ROUTER = router_values(
    ADDRESS, num_tokens=5, k=2, topk_groups=1, renormalize=True, scale=2.5, threshold=None
)
SUMMED = [
    WeightGradProblem(DType.BF16, DType.FP32, 64, 72, 9, gathered) for gathered in (None, *Side)
]
_GROUPS = quantize_groups_values(ADDRESS, 24, 256, (1, 24))
_ACTIVATED = activate_values(ADDRESS, 24, 24, {})
_CLAMPED = activate_values(ADDRESS, 24, 24, {"limit": 7.0, "alpha": 1.702, "beta": 1.0})
CASES: dict[str, tuple[Problem, Config, dict[str, int]]] = {
    **{
        name: (problem, config, gemm_values(problem, ADDRESS, 8, 24))
        for name, problem, config in (
            ("plain", PLAIN, GemmSm90Config(64, 128)),
            ("tma_x", PLAIN, GemmSm90Config(64, 128, tma_x=True)),
            ("full", FULL, GemmSm90Config(64, 128, schedule=Schedule.DYNAMIC)),
            ("blocks", replace(BLOCKS, out=DType.BF16), GemmSm90Config(64, 128, tma_x=True)),
            ("quantised", replace(BLOCKS, gather=True), GemmSm90Config(128, 256)),
        )
    },
    **{
        problem.op: (problem, every_config(problem)[0], values)
        for problem, values in (
            (RouteProblem(9, 32), {**route_values(ADDRESS, **_ROUTE), "phase": 0}),
            (TopkProblem(*ROUTER), _ROUTER),
            (RouteLogitsProblem(*ROUTER), {**_ROUTER, **route_values(ADDRESS, **_ROUTE)}),
            (QuantizeProblem(DType.BF16, DType.E4M3, 64), quantize_values(ADDRESS, 24, 128)),
            (QuantizeGroupsProblem(DType.FP32, DType.E4M3, 64), _GROUPS),
            (CombineProblem(DType.BF16, DType.BF16, 64, 3), combine_values(ADDRESS, 24, 8, 3)),
            (GatherSumProblem(DType.BF16, DType.BF16, 64), gather_sum_values(ADDRESS, 24)),
            (ActivateProblem(ActivationFunction.RELU, DType.BF16, 64), _ACTIVATED),
            (ActivateBackwardProblem(ActivationFunction.SWIGLU_OAI, DType.BF16, 64), _CLAMPED),
        )
    },
    **{
        problem.words: (
            problem,
            every_config(problem)[0],
            weight_grad_values(problem, ADDRESS, 8, 24, 72),
        )
        for problem in SUMMED
    },
}


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_has_a_value_and_every_tensor_its_own(name: str) -> None:
    problem, config, values = CASES[name]
    for param, kind in parameters_of(problem, config):
        if kind is INT:
            assert -(2**31) <= values[param] < 2**31, param
        elif param != "counters":
            assert values[param] == ADDRESS["out" if param == "out_map" else param], param
        else:
            assert values[param] == 0  # the kernel's own


@pytest.mark.skipif(default_build() is None, reason="needs nvidia-cutlass-dsl")
@pytest.mark.parametrize("name", CASES)
def test_names_are_those_of_the_kernels(name: str) -> None:
    from emitters.compile.emit import param_kinds

    problem, config, _ = CASES[name]
    assert sorted(param_kinds(problem, config)) == sorted(parameters_of(problem, config))


def test_tensors_that_are_not_there_have_address_zero() -> None:
    needed = {name: ADDRESS[name] for name in ("x", "weight", "offsets", "out")}
    assert gemm_values(PLAIN, needed, 8, 24)["starts"] == 0
    assert quantize_values({}, 24, 128)["end"] == 0
    assert combine_values({}, 24, 8, 3)["residual"] == 0
    assert route_values({}, **_ROUTE)["expert_map"] == 0


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_integers_of_a_gemm(interleaved: bool, early: bool) -> None:
    values = gemm_values(FULL, ADDRESS, 8, 24, interleaved=interleaved, early=early)
    assert (values["num_tokens"], values["num_rows"], values["early"]) == (8, 24, int(early))
    strides = (2, 1) if interleaved else (1, FULL.n // 2)
    assert (values["column_stride"], values["gate_stride"]) == strides


def test_strides_of_scales() -> None:
    values = gemm_values(BLOCKS, ADDRESS, 8, 24)
    assert (values["out_scale_stride"], values["out_scale_k_stride"]) == (1, 1)  # of one group
    strides = Strides(x_scale=(1, 8), out_scale=(1, 24))
    values = gemm_values(BLOCKS, ADDRESS, 8, 24, strides=strides)
    assert (values["per_token_scale_stride"], values["per_token_scale_k_stride"]) == (1, 8)
    assert (values["out_scale_stride"], values["out_scale_k_stride"]) == (1, 24)


def test_stride_of_x() -> None:
    assert gemm_values(FULL, ADDRESS, 8, 24)["x_stride"] == FULL.k * FULL.x.bytes // 16
    assert gemm_values(FULL, ADDRESS, 8, 24, strides=Strides(512))["x_stride"] == 32
    with pytest.raises(ValueError, match="x must span less than 64 GiB"):
        gemm_values(FULL, ADDRESS, 2**27, 24, strides=Strides(512))


def test_float_parameters_travel_as_their_bits() -> None:
    assert _ROUTER["scale"] == 0x40200000  # 2.5
    assert _ROUTER["threshold"] == 0xBF800000 - 2**32  # -1: none


def test_views() -> None:
    problem = GemmProblem(
        x=DType.BF16,
        weight=WeightFormat(DType.BF16, Major.K),
        accumulation=PLAIN.accumulation,
        out=DType.FP32,
        n=64,
        k=32,
        num_experts=3,
        gather=True,
        weight_scale=Granularity.CHANNEL,
    )
    views = gemm_views(problem, (4096, 40, 1), num_tokens=6, num_rows=10, strides=Strides(48))
    assert views["x"] == ((32, 6), (48,), 2)
    assert views["weight"] == ((32, 64, 3), (40, 4096), 2)
    assert views["out_map"] == ((64, 10), (64,), 4)


def test_a_weight_gradient_knows_strides_and_its_limits() -> None:
    problem = SUMMED[2]
    views = weight_grad_views(problem, 80, 96)
    assert views["left"].extents[:2] == (64, RAGGED_ROWS) and views["left"].strides[:2] == (80, 80)
    assert views["right"].extents[0] == 72
    for _, row, beyond in (views["left"].strides, views["right"].strides):
        assert row + beyond == 2**34
    assert views["out"] == ((72, 64, 9), (72, 64 * 72), 4)
    assert weight_grad_values(problem, {}, 8, 24, 96)["gathered_stride"] == 12
    with pytest.raises(ValueError, match="right must span less than 64 GiB, got 134217728 rows"):
        weight_grad_values(problem, {}, 2**27, 24, 512)
    with pytest.raises(ValueError, match="rows must be at most 1073741824, got 1073741825"):
        weight_grad_values(problem, {}, 8, RAGGED_ROWS + 1, 72)
