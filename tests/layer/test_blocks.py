"""Layers whose scales vary along K: against products by hand, the forms of arguments, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe import nn as moe
from cutlass_moe.layer.chain import plan_workspace
from cutlass_moe.layer.checks import problems_of
from cutlass_moe.models.problems import model_problems, problems_of_shape
from cutlass_moe.models.shapes import MODELS
from cutlass_moe.operands import FP8_BLOCK, LayerOperands, LayerOptions
from emitters.spec.gemm import Granularity
from emitters.spec.layer_steps import QuantizeGroupsProblem
from emitters.spec.registry import why_illegal
from tests.support.layer_cases import SMALL, tokens, weights


def arguments(count: int = 20, **others: Any) -> dict[str, Any]:
    given = {**tokens(SMALL, count, "cpu"), **weights(SMALL, FP8_BLOCK, "cpu"), "quant": FP8_BLOCK}
    return {**given, **others}


def _wide(values: Tensor, scale: Tensor) -> Tensor:
    """The values [.., K] of what was quantised, a scale per 128 of K."""
    of_k = torch.arange(values.shape[-1]) // 128
    return values.double() * scale.double()[..., of_k]


def _by_hand(given: dict[str, Any]) -> Tensor:
    """The layer token by token, in float64 at the quantisation points."""
    hidden, inter = given["hidden"], SMALL.shape.inter
    x = _wide(*cm.quantize_per_token_group_reference(hidden))
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for t, ids in enumerate(given["topk_ids"].tolist()):
        for j, e in enumerate(ids):
            halves = []
            for half in range(2):
                weight = given["w13"][e, half * inter : (half + 1) * inter]
                blocks = given["w13_scale"][e].chunk(2)[half]
                rows = blocks.repeat_interleave(128, 0)[:inter]
                halves.append(_wide(weight, rows) @ x[t])
            gate, up = halves
            active = gate / (1 + torch.exp(-gate)) * up
            values = _wide(*cm.quantize_per_token_group_reference(active))
            rows = given["w2_scale"][e].repeat_interleave(128, 0)[: hidden.shape[1]]
            out[t] += given["topk_weights"][t, j].double() * (_wide(given["w2"][e], rows) @ values)
    return out


def test_against_products_by_hand() -> None:
    given = arguments()
    expected = _by_hand(given)
    out = cm.fused_moe(**given)
    assert (out.double() - expected).norm() / expected.norm() < 4e-3


def test_quantised_hidden_with_scales_of_any_strides() -> None:
    given = arguments()
    expected = cm.fused_moe(**given)
    q, scale = cm.quantize_per_token_group(given["hidden"])
    _, turned = cm.quantize_per_token_group(given["hidden"], column_major=True)
    for hidden_scale in (scale, turned):
        again = cm.fused_moe(**{**given, "hidden": q, "hidden_scale": hidden_scale})
        assert torch.equal(again, expected)


def test_narrow_scales_are_converted() -> None:
    given = arguments()
    narrow = {name: given[name].bfloat16() for name in ("w13_scale", "w2_scale")}
    wide = {name: scale.float() for name, scale in narrow.items()}
    assert torch.equal(cm.fused_moe(**{**given, **narrow}), cm.fused_moe(**{**given, **wide}))


def test_weight_on_input_scales_every_group() -> None:
    given = arguments()
    q, scale = cm.quantize_per_token_group(given["hidden"])
    one = {name: given[name][:, :1].contiguous() for name in ("topk_ids", "topk_weights")}
    given = {**given, **one, "hidden": q, "hidden_scale": scale, "weight_on_input": True}
    weighted = scale * one["topk_weights"].float()
    plain = {"weight_on_input": False, "topk_weights": torch.ones_like(one["topk_weights"])}
    expected = cm.fused_moe(**{**given, **plain, "hidden_scale": weighted})
    assert torch.equal(cm.fused_moe(**given), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"interleaved": True}, "interleaved must be False for 'fp8_block', got True"),
        ({"accumulation": "fast"}, "accumulation must be None or 'two_level' for 'fp8_block'"),
        ({"active_scale": torch.ones(1)}, "active_scale must be None for 'fp8_block'"),
        ({"hidden_scale": torch.ones(1)}, "hidden_scale must be None for 'fp8_block'"),
        ({"w13_scale": torch.ones(9, 384)}, r"w13_scale must have shape \(9, 4, 2\) or \(9, 6"),
        ({"w2_scale": torch.ones(9, 2, 1)}, r"w2_scale must have shape \(9, 2, 2\) or"),
        ({"w2_scale": None}, "w2_scale must be given with quant"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cm.fused_moe(**arguments(**changes))


def test_problems_and_workspace() -> None:
    given = arguments()
    given.pop("quant")
    activation, interleaved = given.pop("activation"), given.pop("interleaved")
    layer = LayerOperands(**given)
    options = LayerOptions(FP8_BLOCK, activation, interleaved)
    problems = problems_of(layer, options)
    assert isinstance(problems.quantize_hidden, QuantizeGroupsProblem)
    assert isinstance(problems.quantize_active, QuantizeGroupsProblem)
    for problem in (problems.up, problems.down):
        assert problem.x_scale is Granularity.TOKEN_BLOCK
        assert problem.weight_scale is Granularity.BLOCK_128
    addresses = plan_workspace(layer, options, problems).addresses(0)
    assert addresses["active_q"] - addresses["hidden_q_scale"] >= 20 * 2 * 4
    assert cm.why_not(**arguments()) is None


@pytest.mark.parametrize("model", ["qwen3-30b", "mixtral", "dsv3-ep8", "glm-4.5-air"])
def test_models_have_kernels(model: str) -> None:
    for problem in model_problems(MODELS[model], FP8_BLOCK).values():
        assert why_illegal(problem) is None


def test_a_share_that_cuts_blocks_has_smaller_ones() -> None:
    shape = MODELS["qwen3-30b"]
    assert problems_of_shape(shape, FP8_BLOCK).up.weight_scale is Granularity.BLOCK_128
    for inter, granularity in ((192, Granularity.BLOCK_64), (96, Granularity.BLOCK_32)):
        cut = problems_of_shape(replace(shape, inter=inter), FP8_BLOCK)
        assert cut.up.weight_scale is granularity
        assert cut.down.weight_scale is Granularity.BLOCK_128


def test_modules_are_quantised() -> None:
    torch.manual_seed(0)
    layer = moe.GatedMoeFeedForward(256, 192, 4, dtype=torch.bfloat16)
    x = torch.randn(30, 256).bfloat16()
    expected = layer(x)
    moe.quantize_(layer, FP8_BLOCK)
    assert layer.w1_scale.shape == (4, 4, 2) and layer.w2_scale.shape == (4, 2, 2)
    with torch.no_grad():
        assert (layer(x) - expected).norm() / expected.norm() < 0.1
    assert "quant='fp8_block'" in repr(layer)


def test_experts_are_padded() -> None:
    """Blocks are as many as before, because 16 divides them."""
    dense = torch.randn(2, 80, 256), torch.randn(2, 256, 40)
    w13, scale = cm.quantize_per_block(dense[0], gated=True)
    w2, w2_scale = cm.quantize_per_block(dense[1])
    experts = cm.pad_experts(w13, w2, w13_scale=scale, w2_scale=w2_scale)
    assert experts.w13.shape == (2, 96, 256) and experts.w13_scale is scale
    rest = {
        "hidden": torch.randn(7, 256).bfloat16(),
        "topk_weights": torch.rand(7, 1),
        "topk_ids": torch.arange(7)[:, None].int() % 2,
        "quant": FP8_BLOCK,
    }
    plain = {"w13": w13, "w2": w2, "w13_scale": scale, "w2_scale": w2_scale}
    assert "pad_experts" in str(cm.why_not(**rest, **plain))
    wide = experts._asdict()
    assert cm.why_not(**rest, **wide) is None
    torch.testing.assert_close(cm.fused_moe(**rest, **wide), cm.fused_moe(**rest, **plain))
