"""Router, combine and the whole MoE layer in plain PyTorch: what the kernels are held to.

They are differentiable, but not through a quantisation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cutlass_moe.layer.padded import Experts, feed_forward, quantized
from cutlass_moe.ops.combine import combine_reference
from cutlass_moe.ops.route import row_capacity


def fused_moe_reference(
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    quant: str | None = None,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    expert_map: Tensor | None = None,
    capacity_factor: float | None = None,
    residual: Tensor | None = None,
    accumulation: str | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    pdl: bool = True,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`cutlass_moe.fused_moe`, expert by expert, every step but quantisation in compute_dtype.

    Takes the arguments of `fused_moe`, which checks them, and float32 and float64 tensors besides.
    With `quant`, tokens are quantised as `quantize_per_token` does, and so is the activation, from
    its float32 values. `accumulation`, `workspace` and `pdl` concern kernels only. Experts and
    their tokens are read back to the host.

    Returns [T, H] of compute_dtype, or `out`, of any floating dtype.
    """
    stacked = Experts(w13, w2, w13_scale, w2_scale, w13_bias, w2_bias)
    ids, experts = topk_ids.long(), len(w13)
    if expert_map is not None:
        known = (ids >= 0) & (ids < len(expert_map))
        ids = functional.pad(expert_map.long(), (0, 1), value=-1)[ids.where(known, -1)]
        experts = len(expert_map)
    limit = row_capacity(ids, experts, capacity_factor)
    x, x_scale = hidden.to(compute_dtype), None
    if quant:
        x, x_scale = quantized(hidden, w13.dtype, compute_dtype)

    rows, inverse, first = [x.new_empty(0, w2.shape[1])], torch.full_like(ids, -1), 0
    for e in range(len(w13)):
        token, choice = (ids == e).nonzero(as_tuple=True)
        token, choice = token[:limit], choice[:limit]
        if not len(token):
            continue
        inverse[token, choice] = torch.arange(first, first + len(token), device=ids.device)
        first += len(token)
        scale = None if x_scale is None else x_scale[None, token]
        rows += feed_forward(x[None, token], scale, stacked.only(e), activation, interleaved)
    return combine_reference(torch.cat(rows), topk_weights, inverse, residual=residual, out=out)
