"""The whole mixture-of-experts layer in plain PyTorch, which tests compare the kernels with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutlass_moe.layer.accept import converted, weigh_input
from cutlass_moe.layer.checks import inner_size
from cutlass_moe.layer.padded import feed_forward, quantized
from cutlass_moe.operands import (
    FP8_BLOCK,
    Experts,
    LayerArguments,
    LayerOperands,
    LayerOptions,
    split_layer,
)
from cutlass_moe.ops._packed import columns as columns_of
from cutlass_moe.ops._packed import packing_of
from cutlass_moe.ops._types import typed
from cutlass_moe.ops.activations import in_halves, is_gated
from cutlass_moe.ops.combine import combine_reference
from cutlass_moe.ops.pack import dequantize_packed
from cutlass_moe.ops.route import local_experts, row_capacity

if TYPE_CHECKING:
    from typing_extensions import Unpack


@typed
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
    tokens, and the activation's results, are quantised as `fused_moe` says.
    `accumulation`, `workspace` and `pdl` are for kernels and change nothing here. The host reads
    the routing back. Differentiable, except through a quantisation.

    Returns [T, H], or [T, k, H] of rows that are not summed, in compute_dtype, or `out`, of any
    floating dtype.
    """
    layer, options = split_layer(hidden, w13, w2, topk_weights, topk_ids, arguments)
    layer, _ = converted(layer, options)
    if options.weight_on_input:
        layer = weigh_input(layer)
        layer = layer._replace(topk_weights=torch.ones_like(layer.topk_weights))
    hidden, topk_weights, topk_ids = layer.hidden, layer.topk_weights, layer.topk_ids
    ids = local_experts(topk_ids, layer.expert_map).long()
    num_ids = len(w13) if layer.expert_map is None else len(layer.expert_map)
    limit = row_capacity(ids, num_ids, options.capacity_factor)
    x, x_scale = _tokens(layer, options, compute_dtype)
    most = options.rows(ids.numel())

    columns = min(x.shape[1], columns_of(w2))  # of padded experts, either may be wider
    rows, inverse, first = [x.new_empty(0, columns)], torch.full_like(ids, -1), 0
    dropped = 0
    for e in range(len(w13)):
        token, choice = (ids == e).nonzero(as_tuple=True)
        kept = min(limit, len(token), most - first)
        dropped += min(limit, len(token)) - kept
        token, choice = token[:kept], choice[:kept]
        if not len(token):
            continue
        inverse[token, choice] = torch.arange(first, first + len(token), device=ids.device)
        first += len(token)
        scale = None if x_scale is None else x_scale[None, token]
        expert = unpacked(layer.experts.only(e), options, x)
        rows += feed_forward(
            x[None, token],
            scale,
            expert,
            options.activation,
            options.interleaved and packing_of(w13) is None,
            options.numbers,
            layer.active_scale,
        )
    if layer.overflow is not None:
        layer.overflow.fill_(dropped)
    return _combine(torch.cat(rows), layer, inverse, options.reduce, out)


def unpacked(experts: Experts, options: LayerOptions, like: Tensor) -> Experts:
    """The experts with packed weights as values of like's dtype, for the tokens `like` [T, H].

    Packed rows are gates, then ups; a bias that is interleaved gets that order too.
    """
    if packing_of(experts.w13) is None:
        return experts
    inter = inner_size(experts.w13, experts.w2, is_gated(options.activation))
    bias = experts.w13_bias
    if bias is not None and options.interleaved:
        bias = in_halves(bias, 1)
    return experts._replace(
        w13=dequantize_packed(experts.w13, like.shape[1], like.dtype),
        w2=dequantize_packed(experts.w2, inter, like.dtype),
        w13_bias=bias,
    )


def _tokens(
    layer: LayerOperands, options: LayerOptions, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The values of the tokens that the up projection reads, and their scales, in this dtype."""
    hidden, scale = layer.hidden, layer.hidden_scale
    if options.quant is None:
        return hidden.to(dtype), None
    if hidden.dtype.itemsize == 1:
        assert scale is not None
        return hidden.to(dtype), scale.to(dtype)
    return quantized(hidden, layer.w13.dtype, dtype, scale, options.quant == FP8_BLOCK)


def _combine(
    rows: Tensor, layer: LayerOperands, inverse: Tensor, reduce: str, out: Tensor | None
) -> Tensor:
    """Sums the rows of each token, or gives each (token, choice) pair its own."""
    weights = layer.topk_weights
    if reduce == "sum":
        return combine_reference(rows, weights, inverse, residual=layer.residual, out=out)
    if reduce == "none":
        weights = torch.ones_like(weights)
    result = combine_reference(rows, weights.reshape(-1, 1), inverse.reshape(-1, 1))
    result = result.view(*inverse.shape, -1)
    return result if out is None else out.copy_(result)
