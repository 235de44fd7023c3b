"""This library, as a user calls it."""

from __future__ import annotations

import torch

import cutlass_moe
from cutlass_moe.compat.deep_gemm import get_mn_major_tma_aligned_tensor
from perf.operands import LayerInputs, ProductInputs, Weights
from perf.peers.prepared import Prepared, Quick


def weight_and_scale(weights: Weights) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What it takes; 4-bit weights, which hold their scales, are packed once a layer."""
    if weights.w.dtype not in (torch.uint8, torch.int32):
        return weights.w, weights.scale
    if "cutlass_moe" not in weights.made:
        assert weights.scale is not None
        weights.made["cutlass_moe"] = cutlass_moe.pack_weights(weights.w, weights.scale)
    return weights.made["cutlass_moe"], None


def product(inputs: ProductInputs, quick: Quick) -> Prepared:
    """Gather and scales in the kernel. "down" reads its rows in order, as in a layer."""
    case, (weight, scale) = inputs.case, weight_and_scale(inputs.weight)
    out = inputs.new_out(case.rows, inputs.n)
    x, x_scale, index = inputs.x, inputs.x_scale, inputs.token_of.int()
    options = {"offsets": inputs.ends, "per_token_scale": x_scale, "scale": scale}
    if case.part == "up":
        options["index"] = index
    else:
        x, options["per_token_scale"] = inputs.gathered()
        if case.dtype == "fp8_block":  # in columns, as layers write them
            options["per_token_scale"] = get_mn_major_tma_aligned_tensor(options["per_token_scale"])

    def launch() -> None:
        cutlass_moe.grouped_matmul_out(out, x, weight, **options)

    return Prepared(launch, lambda rows: out[rows])


def layer(inputs: LayerInputs, quick: Quick) -> Prepared:
    """`fused_moe` with a workspace: routing table, quantisation and weighted sum included."""
    case = inputs.case
    (up, up_scale), (down, down_scale) = map(weight_and_scale, (inputs.up, inputs.down))
    operands = (inputs.hidden, up, down, inputs.topk_weights, inputs.ids)
    options = {
        "quant": None if case.torch_dtype == torch.bfloat16 else case.dtype,
        "activation": case.activation,
        "w13_scale": up_scale,
        "w2_scale": down_scale,
    }
    size = cutlass_moe.fused_moe_workspace_size(*operands, **options)
    workspace = torch.empty(size, dtype=torch.uint8, device=inputs.hidden.device)
    out = torch.full_like(inputs.hidden, torch.nan)

    def launch() -> None:
        cutlass_moe.fused_moe(*operands, **options, out=out, workspace=workspace)

    return Prepared(launch, lambda tokens: out[tokens], clear=lambda: out.fill_(torch.nan))
