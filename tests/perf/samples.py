"""What several tests of the benchmarks need: ceilings, small cases, a run, a layer by torch."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from cutlass_moe.models.shapes import MoeShape
from perf.layer.cases import MoeLayerCase
from perf.machine import Ceilings
from perf.product.cases import ProductCase
from perf.suites import LAYER_SUITES, SUITES

H200 = Ceilings(4424, 4255, 1365, 906, 689, 2.0)
ABOUT = {
    "commit": "0123456789ab",
    "command": "python -m perf run",
    "versions": {"gpu": "Some GPU", "driver": "1", "cuda": "13.0", "torch": "2", "triton": "3"},
    "ceilings": asdict(H200),
}
PRODUCTS = [suite for suite in SUITES if suite not in LAYER_SUITES]
SMALL = ProductCase("gemm", "m", "fp8", 37, "up", num_experts=5, top_k=2, n=48, k=32)

SHAPE = MoeShape("small", num_experts=5, top_k=2, hidden=32, inter=48)  # one of MODELS: conftest
LAYERS = [MoeLayerCase("layer", SHAPE.name, dtype, 37) for dtype in ("fp8", "int8", "bf16")]
CHAIN = MoeLayerCase("chain", SHAPE.name, "int8", 3, layers=3)
each_case = pytest.mark.parametrize("case", [*LAYERS, CHAIN], ids=lambda case: case.id)


def dense(
    hidden, w13, w2, topk_weights, topk_ids, *, residual=None, w13_scale=None, w2_scale=None, **_
) -> torch.Tensor:
    """Every expert on every token, in float64; quantises weights alone."""
    up, down = (
        w.double() * (1 if scale is None else scale[..., None].double())
        for w, scale in ((w13, w13_scale), (w2, w2_scale))
    )
    gate, up = torch.einsum("th,enh->etn", hidden.double(), up).chunk(2, -1)
    each = torch.einsum("eti,ehi->eth", torch.nn.functional.silu(gate) * up, down)
    shares = torch.zeros(len(hidden), len(w13), dtype=torch.float64)
    shares.scatter_(1, topk_ids.long(), topk_weights.double())
    out = torch.einsum("te,eth->th", shares, each)
    return out if residual is None else out + residual.double()
