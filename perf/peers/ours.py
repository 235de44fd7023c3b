"""This library, as a user calls it."""

from __future__ import annotations

import torch

import cutlass_moe
from perf.operands import LayerInputs, ProductInputs
from perf.peers.prepared import Prepared, Quick


def product(inputs: ProductInputs, quick: Quick) -> Prepared:
    """Gather and scales in the kernel. "down" reads its rows in order, as in a layer."""
    case, weight = inputs.case, inputs.weight
    out = inputs.new_out(case.rows, inputs.n)
    x, x_scale, index = inputs.x, inputs.x_scale, inputs.token_of.int()
    options = {"offsets": inputs.ends, "per_token_scale": x_scale, "scale": weight.scale}
    if case.part == "up":
        options["index"] = index
    else:
        x, options["per_token_scale"] = inputs.gathered()

    def launch() -> None:
        cutlass_moe.grouped_matmul_out(out, x, weight.w, **options)

    return Prepared(launch, lambda rows: out[rows])


def layer(inputs: LayerInputs, quick: Quick) -> Prepared:
    """`fused_moe` with a workspace: routing table, quantisation and weighted sum included."""
    case = inputs.case
    operands = (inputs.hidden, inputs.up.w, inputs.down.w, inputs.topk_weights, inputs.ids)
    options = {
        "quant": None if case.dtype == "bf16" else case.dtype,
        "activation": "swiglu",
        "w13_scale": inputs.up.scale,
        "w2_scale": inputs.down.scale,
    }
    size = cutlass_moe.fused_moe_workspace_size(*operands, **options)
    workspace = torch.empty(size, dtype=torch.uint8, device=inputs.hidden.device)
    out = torch.full_like(inputs.hidden, torch.nan)

    def launch() -> None:
        cutlass_moe.fused_moe(*operands, **options, out=out, workspace=workspace)

    return Prepared(launch, lambda tokens: out[tokens], clear=lambda: out.fill_(torch.nan))
