"""The Triton pipeline of layers: on a GPU, or on the CPU where TRITON_INTERPRET=1."""

from __future__ import annotations

import os

import pytest
import torch

from perf.layer.cases import MoeLayerCase
from perf.layer.operands import LayerInputs, LayerWeights, chosen_by_torch
from perf.product.routing import draw_topk_ids
from perf.systems import relative_error
from tests.perf.samples import LAYERS, SHAPE, dense


@pytest.fixture
def device() -> str:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1")
    return "cpu"


@pytest.mark.parametrize("tokens", [1, 37, 700])
def test_triton_lists_every_pair_once_with_its_expert(device: str, tokens: int) -> None:
    from perf.layer.triton import TritonLayer
    from perf.product.triton import Tiling, align

    ids = draw_topk_ids(MoeLayerCase("layer", SHAPE.name, "bf16", tokens).up).int().to(device)
    ids[ids == 3] = 4  # an expert without rows
    layer = TritonLayer(SHAPE, "bf16", tokens, Tiling(16, 64, 64, 1, 4, 3), torch.device(device))
    for _ in range(2):
        layer.align(ids)
        pairs, experts, padded = align(ids, SHAPE.num_experts, 16)
        assert layer.num_padded.item() == padded.item()
        assert torch.equal(layer.experts[: len(experts)], experts)
        for expert in experts.unique():
            got, want = (
                p[: len(pairs)].view(-1, 16)[experts == expert] for p in (layer.pairs, pairs)
            )
            assert torch.equal(got.flatten().sort().values, want.flatten().sort().values)


def test_triton_chooses_what_torch_chooses(device: str) -> None:
    from perf.layer.triton import topk

    logits = torch.randn(9, 37, device=device)
    weights, ids = topk(logits, 3)
    right = chosen_by_torch(logits, 3)
    assert torch.equal(ids, right[1])
    assert torch.allclose(weights, right[0], atol=1e-6)


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.dtype)
def test_triton_computes_the_layer(case: MoeLayerCase, device: str) -> None:
    from perf.layer.triton import TritonLayer
    from perf.product.triton import Tiling

    if device == "cpu" and case.dtype != "int8":
        pytest.skip("the interpreter multiplies no bf16 and rounds fp8 otherwise")
    weights, inputs = LayerWeights.of(case, 1, device), LayerInputs.of(case, device)
    layer = TritonLayer(SHAPE, case.dtype, 37, Tiling(16, 64, 64, 1, 4, 3), torch.device(device))
    assert inputs.choice is not None
    for residual in (None, inputs.hidden):
        out = torch.full_like(inputs.hidden, torch.nan)
        layer(inputs.hidden, weights, *inputs.choice, out, residual)
        tensors = (inputs.hidden, weights.w13, weights.w2, *inputs.choice)
        options = {name: scale.cpu() for name, scale in weights.options.items()}
        right = dense(
            *(t.cpu() for t in tensors),
            residual=None if residual is None else residual.cpu(), **options,
        )  # fmt: skip
        assert relative_error(out.cpu(), right) < 6e-2  # `dense` quantises no activation
