"""fused_moe with packed 4-bit weights, on the CPU."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch

import cutlass_moe as cm
from cutlass_moe import nn
from emitters.spec.packing import Packing
from tests.support.layer_cases import SMALL, packed_weights, tokens

GPT_OSS = {"activation": "swiglu_oai", "interleaved": True, "bias": True}
FORMS = {"plain": {}, "gpt-oss": GPT_OSS, "relu2": {"activation": "relu2"}}


@lru_cache
def _weights(packing: Packing, form: str) -> dict[str, Any]:
    return packed_weights(SMALL, packing, "cpu", **FORMS[form])


def given(packing: Packing, form: str = "plain") -> dict[str, Any]:
    return {**tokens(SMALL, 7, "cpu"), **_weights(packing, form)}


def unpacked(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same layer with float64 weights that are not packed."""
    w13 = cm.dequantize_packed(arguments["w13"], SMALL.shape.hidden, torch.float64)
    if arguments["interleaved"]:
        w13 = w13.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    w2 = cm.dequantize_packed(arguments["w2"], SMALL.shape.inter, torch.float64)
    return {**arguments, "w13": w13, "w2": w2}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packing", Packing)
def test_layers_are_those_of_the_weights(packing: Packing, form: str) -> None:
    arguments = given(packing, form)
    out = cm.fused_moe(**arguments)
    wanted = cm.fused_moe_reference(**unpacked(arguments), compute_dtype=torch.float64)
    assert float((out - wanted).norm() / wanted.norm()) < 4e-3
    same = cm.fused_moe_reference(**arguments, compute_dtype=torch.float64)
    torch.testing.assert_close(same, wanted)


def test_problems_and_workspaces() -> None:
    arguments = given(Packing.MXFP4, "gpt-oss")
    assert cm.why_not(**arguments) is None
    assert cm.fused_moe_workspace_size(**arguments) > 0
    meta = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    assert cm.fused_moe(**meta).shape == arguments["hidden"].shape


def test_expert_maps_and_residuals() -> None:
    arguments = given(Packing.INT4_G32)
    whole = cm.fused_moe(**arguments)
    parts = []
    for first, last in ((0, 4), (4, 9)):
        expert_map = torch.full((9,), -1, dtype=torch.int32)
        expert_map[first:last] = torch.arange(last - first)
        own = {name: arguments[name][first:last] for name in ("w13", "w2")}
        parts.append(cm.fused_moe(**{**arguments, **own}, expert_map=expert_map).float())
    torch.testing.assert_close(sum(parts), whole.float(), rtol=2e-2, atol=2e-2)


def _packed(n: int, k: int, experts: int = 9) -> torch.Tensor:
    """Weights [experts, n, k] of zeros, in MXFP4."""
    blocks = Packing.MXFP4.blocks(n, k)
    return torch.zeros(experts, *blocks, Packing.MXFP4.block_bytes, dtype=torch.uint8)


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "fp16": ({"hidden": torch.ones(7, 256).half()}, TypeError, "hidden must be .*bfloat16"),
    "quant": ({"quant": "fp8"}, ValueError, "w13_scale must be given with quant"),
    "one_packed": ({"w2": torch.ones(9, 256, 192).bfloat16()}, ValueError, "both packed"),
    "hidden": ({"hidden": torch.ones(7, 512).bfloat16()}, ValueError, r"packed w13 must be .*, 4,"),
    "experts": ({"w2": _packed(256, 192, experts=8)}, ValueError, "packed w13 must have E 8"),
    "inner": ({"w2": _packed(256, 64)}, ValueError, "w2 must"),
    "rows": ({"w2": _packed(128, 192)}, ValueError, "N 256"),
}


@pytest.mark.parametrize(("change", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cm.fused_moe(**{**given(Packing.MXFP4), **change})


@pytest.mark.parametrize("quant", ["int4_g128", "int4_g32", "mxfp4"])
@pytest.mark.parametrize("gated", [False, True])
def test_modules_are_quantised(quant: str, gated: bool) -> None:
    kind = nn.GatedMoeFeedForward if gated else nn.MoeFeedForward
    torch.manual_seed(0)
    layer = kind(64, 96, num_experts=4, top_k=2, bias=True, num_shared_experts=1)
    wanted = copy.deepcopy(layer)
    for name in ("w1", "w2"):
        weight = getattr(wanted, name).data
        packed = cm.quantize_packed(weight.transpose(1, 2), quant)
        weight.copy_(cm.dequantize_packed(packed, weight.shape[1]).transpose(1, 2))
    assert nn.quantize_(layer, quant) is layer and layer.quant == quant
    assert layer.w1 is None and layer.w1_quantized.dtype == torch.uint8
    hidden = torch.randn(3, 5, 64)
    with torch.no_grad():
        out, expected = layer(hidden), wanted(hidden)
    assert out.dtype == hidden.dtype
    assert float((out - expected).norm() / expected.norm()) < 2e-2
    other = nn.quantize_(
        kind(64, 96, num_experts=4, top_k=2, bias=True, num_shared_experts=1), quant
    )
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert torch.equal(other(hidden), out)


def test_modules_of_other_sizes_are_refused() -> None:
    layer = nn.MoeFeedForward(64, 72, num_experts=2)
    with pytest.raises(ValueError, match="multiples of 32 for 'mxfp4', got 64 and 72"):
        nn.quantize_(layer, "mxfp4")
    assert layer.w1 is not None and layer.quant is None


def test_there_is_no_gradient() -> None:
    arguments = given(Packing.MXFP4)
    arguments["hidden"].requires_grad_()
    with pytest.raises(RuntimeError, match="w13 must not be packed"):
        cm.fused_moe(**arguments)
    assert "no gradient" in (cm.why_not(**arguments) or "")
