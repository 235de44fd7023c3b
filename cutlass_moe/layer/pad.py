"""Padding of experts whose rows no kernel can read."""

from __future__ import annotations

import torch
from torch import Tensor

from cutlass_moe.operands import DTYPES, Experts, padded
from cutlass_moe.ops._checks import is_n_major
from cutlass_moe.ops._types import typed
from emitters.spec.dtypes import DType


@typed
def pad_experts(
    w13: Tensor,
    w2: Tensor,
    *,
    interleaved: bool = False,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
) -> Experts:
    """Pads the sizes I and H of a layer's experts to what kernels take: once, when weights load.

    I and the last dimension of w13 become the next multiple of 16 bytes: of 16 for 8-bit weights,
    of 8 for 16-bit ones; the rows of w2 become a multiple of 8. The new values of weights and
    biases are 0, of scales 1 (blocks of scales stay as they are: none begins in the padding); every
    activation of 0 is 0, so the layer's results stay what they are, except for the order of float
    sums. Hidden states, residual and output keep their H: `fused_moe` takes both. If H is no
    multiple of 8, it copies them in every call.

    w13 [E, 2I, H] for a gated activation, else [E, I, H]; w2 [E, H, I]: 8-bit, bfloat16, float16 or
      float32, quantised or not yet.
    interleaved: the rows of w13 are gate, up, gate, up, ... instead of all gates, then all ups,
      which are then padded each.
    w13_scale, w2_scale, w13_bias, w2_bias: as `fused_moe` takes them.

    Returns the tuple (w13, w2, w13_scale, w2_scale, w13_bias, w2_bias); its fields are those
    arguments of `fused_moe`. What needs no padding is returned as it is; where K or N is dense in
    a weight, it stays so. Raises ValueError for shapes that are no layer's, TypeError for other
    dtypes. Gradients do not pass.

        experts = cutlass_moe.pad_experts(w13, w2, w13_scale=s13, w2_scale=s2)
        out = cutlass_moe.fused_moe(hidden, topk_weights=weights, topk_ids=ids, quant="fp8",
                                    **experts._asdict())
    """
    if w13.dim() != 3 or w2.dim() != 3 or w13.shape[1] not in (w2.shape[2], 2 * w2.shape[2]):
        raise ValueError(
            "w13 must be [E, 2I or I, H] and w2 [E, H, I], got "
            f"{tuple(w13.shape)} and {tuple(w2.shape)}"
        )
    if w2.dtype not in DTYPES:
        raise TypeError(f"w2 must be one of {', '.join(map(str, DTYPES))}, got {w2.dtype}")
    dtype, rows, inter, hidden = DTYPES[w2.dtype], w13.shape[1], w2.shape[2], w2.shape[1]
    parts = 1 if interleaved else rows // inter
    wide13, wide2 = rows // inter * padded(inter, dtype), padded(hidden, DType.BF16)

    def pad_rows(
        tensor: Tensor | None, rows: int, parts: int, size: int, value: int = 0
    ) -> Tensor | None:
        if tensor is None or tensor.dim() < 2 or tensor.shape[1] != rows:
            return tensor  # one scale for several rows
        return _pad(tensor, 1, parts, size, value)

    return Experts(
        _pad(_pad(w13, 1, parts, wide13), 2, 1, padded(w13.shape[2], dtype)),
        _pad(_pad(w2, 1, 1, wide2), 2, 1, padded(inter, dtype)),
        pad_rows(w13_scale, rows, parts, wide13, 1),
        pad_rows(w2_scale, hidden, 1, wide2, 1),
        pad_rows(w13_bias, rows, parts, wide13),
        pad_rows(w2_bias, hidden, 1, wide2),
    )


@torch.no_grad()
def _pad(tensor: Tensor, dim: int, parts: int, size: int, value: int = 0) -> Tensor:
    """Pads each of so many equal parts of a dimension at its end, to `size` in all."""
    if tensor.shape[dim] == size:
        return tensor
    shape = (*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])
    if tensor.dim() == 3 and is_n_major(tensor):
        wide = tensor.new_full((shape[0], shape[2], shape[1]), value).transpose(1, 2)
    else:
        wide = tensor.new_full(shape, value)
    old = tensor.shape[dim] // parts
    for part in range(parts):
        wide.narrow(dim, part * (size // parts), old).copy_(tensor.narrow(dim, part * old, old))
    return wide
