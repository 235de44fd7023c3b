"""Layers whose values between the kernels are large or small: they keep their numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.layer.checks import problems_of
from cutlass_moe.layer.padded import feed_forward
from cutlass_moe.operands import LayerOperands, LayerOptions
from emitters.spec.dtypes import DType
from tests.support.layer_cases import SMALL, tokens, weights


class Range(NamedTuple):
    """A layer; factors of hidden, w2 and topk_weights that bring values out of float16's range."""

    quant: str | None
    activation: str
    dtype: torch.dtype
    hidden: float = 1.0
    w2: float = 1.0
    weights: float = 1.0


RANGES = {
    **{  # activations of about 1e8
        f"large-{quant}-{activation}": Range(quant, activation, torch.bfloat16, 1e4, 1e-6)
        for quant in ("int8", "fp8")
        for activation in ("relu2", "reglu", "swiglu")
    },
    **{  # activations of rms 1e-5
        f"small-{quant}": Range(quant, "swiglu", torch.bfloat16, 4e-3, 1e4)
        for quant in ("int8", "fp8")
    },
    **{  # rows of about 2e5, and sums of about 200
        f"rows-{quant or 'fp16'}": Range(quant, "reglu", torch.float16, 1.0, 1e5, 1e-3)
        for quant in (None, "int8", "fp8")
    },
}
each_range = pytest.mark.parametrize("name", RANGES)


def arguments(case: Range, device: str, count: int = 70) -> dict[str, Any]:
    """Of fused_moe. The scales of quantised weights take the factor."""
    layer = replace(SMALL, activation=case.activation)
    given = {**tokens(layer, count, device), **weights(layer, case.quant, device)}
    given |= {"quant": case.quant, "hidden": (given["hidden"] * case.hidden).to(case.dtype)}
    given["topk_weights"] = given["topk_weights"] * case.weights
    if case.activation == "relu2":
        given |= {n: given[n][:, : layer.shape.inter].contiguous() for n in ("w13", "w13_scale")}
    if case.quant:
        given["w2_scale"] = given["w2_scale"] * case.w2
    else:
        given["w13"] = given["w13"].to(case.dtype)
        given["w2"] = (given["w2"] * (case.w2 / 10)).to(case.dtype)
        given["hidden"] *= 10
    return given


def problems(given: dict[str, Any]) -> Any:
    options = LayerOptions(**{name: given[name] for name in LayerOptions._fields if name in given})
    layer = LayerOperands(**{name: given.get(name) for name in LayerOperands._fields})
    return problems_of(layer, options)


def error(out: Tensor, given: dict[str, Any]) -> float:
    expected = cm.fused_moe_reference(**given, compute_dtype=torch.float64)
    return float((out.double() - expected).norm() / expected.norm())


@each_range
def test_cases_leave_the_range_of_float16(name: str) -> None:
    """Else these tests would hold nothing."""
    given = arguments(RANGES[name], "cpu")
    layer = LayerOperands(**{field: given.get(field) for field in LayerOperands._fields})
    hidden = given["hidden"].float()[None].expand(SMALL.shape.num_experts, -1, -1)
    seen: list[Tensor] = []
    experts = layer.experts

    def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
        return weight.float() if scale is None else weight.float() * scale[..., None]

    experts = experts._replace(
        w13=scaled(experts.w13, experts.w13_scale), w2=scaled(experts.w2, experts.w2_scale),
        w13_scale=None, w2_scale=None,
    )  # fmt: skip
    identity = torch.eye(experts.w2.shape[2]).expand(len(experts.w2), -1, -1)
    for w2 in (identity, experts.w2):
        seen.append(feed_forward(hidden, None, experts._replace(w2=w2), given["activation"]))
    active, rows = seen
    large, small = active.abs().max(), active.square().mean().sqrt()
    expected: dict[str, Callable[[], bool]] = {
        "large": lambda: bool(large > 2**21),
        "small": lambda: bool(3e-6 < small < 3e-5),
        "rows": lambda: bool(rows.abs().max() > 65_504 > large),
    }
    assert expected[name.partition("-")[0]]()


@each_range
def test_layers_keep_their_numbers(name: str) -> None:
    given = arguments(RANGES[name], "cpu")
    out = cm.fused_moe(**given)
    assert out.isfinite().all() and out.any()
    assert error(out, given) <= 5e-3


@each_range
def test_what_travels_between_kernels_has_the_range_of_float32(name: str) -> None:
    given = arguments(RANGES[name], "cpu", 5)
    layer, case = problems(given), RANGES[name]
    wide = (DType.BF16, DType.FP32)
    assert layer.down.out in wide and layer.combine.rows is layer.down.out
    assert layer.combine.out is (DType.FP16 if case.dtype is torch.float16 else DType.BF16)
    if case.quant:
        assert layer.up.out in wide and layer.quantize_active.source is layer.up.out
    assert layer.why_illegal("sm_90a") is None
