"""The whole mixture-of-experts layer in plain PyTorch, which tests compare the kernels with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutlass_moe.layer.padded import feed_forward, quantized
from cutlass_moe.operands import LayerArguments, split_layer
from cutlass_moe.ops.combine import combine_reference
from cutlass_moe.ops.route import local_experts, row_capacity

if TYPE_CHECKING:
    from typing_extensions import Unpack


def fused_moe_reference(
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
    **arguments: Unpack[LayerArguments],
) -> Tensor:
    """`cutlass_moe.fused_moe` in plain PyTorch, expert by expert, computed in compute_dtype.

    Takes the arguments of `fused_moe`, unchecked, and float32 and float64 tensors too. With `quant`
    tokens, and the activation's results in compute_dtype, are quantised as `quantize_per_token`
    does. `accumulation`, `workspace` and `pdl` are for kernels and change nothing here. The host
    reads the routing back. Differentiable, except through a quantisation.

    Returns [T, H] of compute_dtype, or `out`, of any floating dtype.
    """
    layer, options = split_layer(hidden, w13, w2, topk_weights, topk_ids, arguments)
    ids = local_experts(topk_ids, layer.expert_map).long()
    num_ids = len(w13) if layer.expert_map is None else len(layer.expert_map)
    limit = row_capacity(ids, num_ids, options.capacity_factor)
    x, x_scale = hidden.to(compute_dtype), None
    if options.quant:
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
        expert = layer.experts.only(e)
        rows += feed_forward(x[None, token], scale, expert, options.activation, options.interleaved)
    return combine_reference(
        torch.cat(rows), topk_weights, inverse, residual=layer.residual, out=out
    )
