"""What a case must come to, against the library's own references."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cutlass_moe
from perf.cases import DTYPES, Case
from perf.operands import LayerInputs, ProductInputs, weights_of
from perf.peers.ours import weight_and_scale
from tests.perf.samples import UP

PRODUCTS = [
    replace(UP, dtype=dtype, part=part, hidden=256, inter=128)
    for dtype in DTYPES
    for part in ("up", "down")
]
LAYERS = [
    replace(UP, dtype=dtype, part="layer", hidden=256, inter=128)
    for dtype in DTYPES
    if dtype != "fp8_block"
]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.id)
def test_expected_rows_are_the_product(case: Case) -> None:
    inputs = ProductInputs(case, weights_of(case, "cpu"))
    x, w, scale = inputs.x.double(), inputs.weight.w.double(), inputs.weight.scale
    if case.packed:
        packed, scale = weight_and_scale(inputs.weight)
        w = cutlass_moe.dequantize_packed(packed, inputs.k, torch.float64)
    if inputs.x_scale is not None and scale is not None:
        if case.dtype == "fp8_block":
            x = x * inputs.x_scale.repeat_interleave(128, 1)[:, : inputs.k]
            w = w * scale.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, : inputs.n]
        else:
            x, w = x * inputs.x_scale[:, None], w * scale[..., None]
    pairs = torch.einsum("rk,rnk->rn", x[inputs.token_of], w[inputs.expert_of])
    want = pairs[inputs.picked][:, inputs.columns]
    assert relative(inputs.expected(), want) < 1e-12
    assert torch.equal(inputs.ids.flatten()[inputs.order].long(), inputs.expert_of)
    assert 0.1 < want.std() < 10


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.id)
def test_expected_rows_are_the_references(case: Case) -> None:
    inputs = ProductInputs(case, weights_of(case, "cpu"))
    weight, scale = weight_and_scale(inputs.weight)
    rows = cutlass_moe.grouped_matmul_reference(
        inputs.x, weight, index=inputs.token_of.int(), offsets=inputs.ends,
        per_token_scale=inputs.x_scale, scale=scale, out_dtype=torch.float32,
    )  # fmt: skip
    assert relative(rows[inputs.picked][:, inputs.columns], inputs.expected()) < 1e-5


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.id)
def test_expected_tokens_are_the_layers(case: Case) -> None:
    inputs = LayerInputs(case, weights_of(case, "cpu"))
    (up, up_scale), (down, down_scale) = map(weight_and_scale, (inputs.up, inputs.down))
    out = cutlass_moe.fused_moe_reference(
        inputs.hidden, up, down, inputs.topk_weights, inputs.ids, activation=case.activation,
        quant=case.dtype if case.dtype in ("fp8", "int8") else None, w13_scale=up_scale,
        w2_scale=down_scale, compute_dtype=torch.float64,
    )  # fmt: skip
    # which rounds the activation to bf16 first: some of its 8-bit values are the neighbouring ones
    worst = {"fp8": 2e-2, "int8": 1e-2}.get(case.dtype, 1e-6)
    assert relative(out[inputs.picked], inputs.expected()) < worst
    assert 0.01 < inputs.expected().std() < 10


def test_scales_are_exact_in_bf16() -> None:
    inputs = ProductInputs(UP, weights_of(UP, "cpu"))
    for scale in (inputs.x_scale, inputs.weight.scale):
        assert scale is not None
        assert torch.equal(scale.bfloat16().float(), scale)


def test_block_scales_quantise_each_group_by_itself() -> None:
    case = replace(UP, part="layer", dtype="fp8_block")
    block, whole = (
        LayerInputs(c, weights_of(c, "cpu")) for c in (case, replace(case, dtype="fp8"))
    )
    row = torch.randn(300, dtype=torch.float64) * torch.tensor([1.0] * 128 + [1e6] * 172)
    got = block.quantized(row)
    for group in (slice(0, 128), slice(128, 256), slice(256, 300)):
        assert torch.equal(got[group], whole.quantized(row[group]))
    assert relative(got, row) < 5e-2 < relative(whole.quantized(row)[:128], row[:128])
