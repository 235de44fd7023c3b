"""Layers whose hidden size is no multiple of 16 bytes, with experts that are padded once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import cutlass_moe as cm
from cutlass_moe.layer.accept import widened
from cutlass_moe.layer.checks import problems_of
from cutlass_moe.models.problems import problems_of_shape
from cutlass_moe.models.shapes import MoeShape
from cutlass_moe.nn import GatedMoeFeedForward, quantize_
from cutlass_moe.operands import QUANTS, Experts, LayerOperands, LayerOptions
from emitters.spec.dtypes import DType
from emitters.spec.layer_steps import QuantizeProblem
from tests.support.layer_cases import SMALL, LayerCase, tokens, weights

CASES = [(72, "int8"), (72, "fp8"), (60, "int8"), (33, "fp8"), (60, None), (33, None)]
each_case = pytest.mark.parametrize(("hidden", "quant"), CASES)


def arguments(hidden: int, quant: str | None, device: str, count: int = 20) -> dict[str, Any]:
    case = LayerCase(replace(SMALL.shape, hidden=hidden, inter=40, bias=True), "reglu")
    given = {**tokens(case, count, device), **weights(case, quant, device), "quant": quant}
    return given | {"residual": given["hidden"].flip(0)}


def pad(given: dict[str, Any]) -> dict[str, Any]:
    found = cm.pad_experts(**{name: given.get(name) for name in Experts._fields})
    return given | {name: value for name, value in found._asdict().items() if value is not None}


def split(given: dict[str, Any]) -> tuple[LayerOperands, LayerOptions]:
    """As kernels read the arguments."""
    layer = widened(LayerOperands(**{name: given.get(name) for name in LayerOperands._fields}))
    names = set(LayerOptions._fields) & given.keys()
    return layer, LayerOptions(**{name: given[name] for name in names})


@each_case
def test_layers_keep_their_results(hidden: int, quant: str | None) -> None:
    given = arguments(hidden, quant, "cpu")
    wide = pad(given)
    want = cm.fused_moe(**given)
    assert wide["w2"].shape[1] % 8 == 0 and wide["w13"].shape[2] * (1 if quant else 2) % 16 == 0
    for call in (cm.fused_moe, cm.fused_moe_reference):
        torch.testing.assert_close(call(**wide).bfloat16(), want, rtol=2e-2, atol=1e-3)
    out = torch.full_like(want, 7)
    workspace = torch.empty(cm.fused_moe_workspace_size(**wide), dtype=torch.uint8)
    assert cm.fused_moe(**wide, out=out, workspace=workspace) is out
    assert torch.equal(out, cm.fused_moe(**wide))
    again = cm.pad_experts(**{name: wide.get(name) for name in Experts._fields})
    assert all(a is wide.get(name) for name, a in again._asdict().items())


@each_case
def test_kernels_serve_them(hidden: int, quant: str | None) -> None:
    given = arguments(hidden, quant, "cpu")
    assert "pads the experts'" in str(cm.why_not(**given))
    assert "hidden size to" in str(cm.why_not(**given))
    assert cm.why_not(**pad(given)) is None
    problems = problems_of(*split(pad(given)))
    assert problems.why_illegal("sm_90a") is None
    if (hidden, quant) == (72, "int8"):  # no copies: rows of hidden and output are read in place
        assert problems.quantize_hidden == QuantizeProblem(DType.BF16, DType.INT8, 72, padded=True)
        assert (problems.up.k, problems.down.n) == (80, 72)


@pytest.mark.parametrize("reduce", ["sum", "none"])
@pytest.mark.parametrize("hidden", [72, 33])
def test_hidden_that_is_quantised_already(hidden: int, reduce: str) -> None:
    given = arguments(hidden, "int8", "cpu") | {"residual": None, "reduce": reduce}
    want = cm.fused_moe(**given)
    q, scale = cm.quantize_per_token(given["hidden"], torch.int8)
    given = pad(given) | {"hidden": q, "hidden_scale": scale}
    torch.testing.assert_close(cm.fused_moe(**given), want, rtol=2e-2, atol=1e-3)
    assert cm.why_not(**given) is None


def test_leading_dimensions_and_compiled_calls() -> None:
    given = pad(arguments(60, "fp8", "cpu"))
    want = cm.fused_moe(**given)
    compiled = torch.compile(cm.fused_moe, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**given), want)
    for name in ("hidden", "residual", "topk_weights", "topk_ids"):
        given[name] = given[name].unflatten(0, (4, 5))
    assert torch.equal(cm.fused_moe(**given), want.unflatten(0, (4, 5)))


def test_other_widths_are_refused() -> None:
    given = pad(arguments(60, "fp8", "cpu"))
    for name, change in (("out", given["hidden"][:, :56]), ("hidden", given["hidden"][:, :40])):
        with pytest.raises(ValueError, match="must have shape|must be .E > 0"):
            cm.fused_moe(**given | {name: change.contiguous(), "residual": None})


def test_offline_problems_are_those_of_calls() -> None:
    shape = MoeShape("odd", SMALL.shape.num_experts, SMALL.shape.top_k, 72, 40, True, "reglu")
    for name in ("fp8", "int8"):
        given = pad(arguments(72, name, "cpu"))
        posed = problems_of_shape(shape, name)
        called = problems_of(*split(given))
        assert posed == called


@pytest.mark.parametrize("quant", list(QUANTS))
@pytest.mark.parametrize("size", [72, 60])
def test_modules(size: int, quant: str) -> None:
    torch.manual_seed(0)
    layer = GatedMoeFeedForward(size, 40, num_experts=4, top_k=2, bias=True)
    x = torch.randn(9, size)
    want = layer(x)
    quantize_(layer, quant)
    assert layer.w1_quantized.shape[2] % 16 == 0
    with torch.no_grad():
        got = layer(x)
    assert got.shape == want.shape and (got - want).norm() <= 0.1 * want.norm()
