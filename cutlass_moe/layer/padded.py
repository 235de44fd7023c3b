"""Experts on padded rows, in plain PyTorch, for training modules and for references."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cutlass_moe.operands import Experts, Numbers
from cutlass_moe.ops.activations import activate
from cutlass_moe.ops.block_scales import expand_weight_scale, expand_x_scale
from cutlass_moe.ops.quantize import quantize_per_token_reference, quantize_static
from cutlass_moe.ops.quantize_groups import quantize_per_token_group_reference


def feed_forward(
    x: Tensor,
    x_scale: Tensor | None,
    experts: Experts,
    activation: str,
    interleaved: bool = False,
    numbers: Numbers | None = None,
    active_scale: Tensor | None = None,
) -> Tensor:
    """Applies each expert to its own M rows, in x's dtype: x [E, M, H] -> [E, M, H].

    experts may be padded, as `pad_experts` does.

    x_scale [E, M], or [E, M, H / 128]: given if x holds the values of 8-bit numbers; the
    activation's results are then quantised alike, with active_scale if it is given. Before, those
    with a scale per row are rounded to bfloat16, as kernels store them. numbers: as in `activate`.
    """
    w13, w2, w13_scale, w2_scale, w13_bias, w2_bias = experts
    width = x.shape[-1]
    x = functional.pad(x, (0, w13.shape[2] - width)) if w13.shape[2] > width else x
    gated = w13.shape[1] == 2 * w2.shape[2]
    up = _product(x, x_scale, w13, w13_scale, w13_bias, gated)
    active = activate(up, activation, interleaved, numbers)
    if x_scale is None:
        return _product(active, None, w2, w2_scale, w2_bias)[..., :width]
    blocks = x_scale.dim() == 3
    stored = active if blocks else active.bfloat16()
    values, scale = quantized(stored, w2.dtype, x.dtype, active_scale, blocks)
    return _product(values, scale, w2, w2_scale, w2_bias)[..., :width]


def quantized(
    x: Tensor,
    dtype: torch.dtype,
    to: torch.dtype,
    static_scale: Tensor | None = None,
    blocks: bool = False,
) -> tuple[Tensor, Tensor]:
    """Quantises x [..., K] per row; returns the 8-bit values and their scale [...] in dtype `to`.

    static_scale: of one element, the scale of every row. blocks: with a scale per 128 of K,
    [..., K / 128]. The result has no gradient.
    """
    if blocks:
        values, scale = quantize_per_token_group_reference(x.detach(), dtype)
    elif static_scale is None:
        values, scale = quantize_per_token_reference(x.detach(), dtype)
    else:
        values, scale = quantize_static(x.detach(), dtype, static_scale)
    return values.to(to), scale.to(to)


def _product(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    gated: bool = False,
) -> Tensor:
    """Multiplies each expert's rows with its weights: [E, M, N], in x's dtype.

    x [E, M, K], x_scale [E, M], weight [E, N, K], scale [E, N] or [E], bias [E, N]; or x_scale
    [E, M, K / 128] and scale [E, blocks of N, K / 128], of gates and ups apart if gated.
    """
    if x_scale is not None and x_scale.dim() == 3 and scale is not None:
        x = x * expand_x_scale(x_scale, x.shape[-1])
        weight = weight.to(x.dtype) * expand_weight_scale(scale.to(x.dtype), weight, gated)
        x_scale = scale = None
    product = torch.bmm(x, weight.to(x.dtype).transpose(1, 2))
    if x_scale is not None:
        product = product * x_scale[..., None]
    if scale is not None:
        product = product * scale.to(x.dtype).view(len(weight), 1, -1)
    return product if bias is None else product + bias.to(x.dtype)[:, None]
