"""The grouped matrix product and its gradients in plain PyTorch, which tests compare kernels with.

CPU tensors, gradients and problems without a kernel take this path. It reads `offsets` back to the
host and loops over the experts there, so it is slow and CUDA graphs cannot capture it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cutlass_moe.operands import Operands, Options, ProductArguments, split_product
from cutlass_moe.ops._checks import product_shape
from cutlass_moe.ops._packed import columns, dequantize_expert, packing_of
from cutlass_moe.ops._types import typed
from cutlass_moe.ops.activations import activate, activate_backward, in_halves, is_gated
from cutlass_moe.ops.block_scales import expand_weight_scale, expand_x_scale, is_block_scaled

if TYPE_CHECKING:
    from typing_extensions import Unpack

Tensors = tuple[Tensor | None, ...]
_BLOCK_ELEMENTS = 1 << 24  # of the largest float64 temporary: 128 MiB


@typed
def grouped_matmul_reference(
    x: Tensor, weight: Tensor, **arguments: Unpack[ProductArguments]
) -> Tensor:
    """`cutlass_moe.grouped_matmul` in plain PyTorch, computed in float64.

    Takes the arguments of `grouped_matmul`, unchecked, and float32 and float64 operands too. Rows
    that have no expert become zeros. `accumulation`, `expected_rows`, `num_sms` and `schedule` are
    for kernels and change nothing here.
    """
    operands, options = split_product(x, weight, arguments)
    default = torch.bfloat16 if x.element_size() == 1 else x.dtype
    shape = product_shape(operands, options)
    out = x.new_zeros(shape, dtype=options.out_dtype or default)
    fill_product(out, operands, options)
    return out


def grouped_matmul_reference_out(
    out: Tensor, x: Tensor, weight: Tensor, **arguments: Unpack[ProductArguments]
) -> None:
    """`cutlass_moe.grouped_matmul_out` in plain PyTorch, computed in float64.

    Products, sums (exact for int8), scales, bias and activation are float64. The result is
    converted once, to out's dtype; `out_dtype` is ignored. A row with an index outside [0, T)
    becomes zeros, without bias; rows that have no expert are left untouched.
    """
    fill_product(out, *split_product(x, weight, arguments))


def fill_product(out: Tensor, operands: Operands, options: Options) -> None:
    """`grouped_matmul_reference_out` for arguments that are split into operands and options."""
    x, weight, index, offsets, per_token_scale, scale, bias, starts = operands
    block = max(1, _BLOCK_ELEMENTS // max(columns(weight), x.shape[1]))
    gated = is_gated(options.activation)
    blocks = is_block_scaled(scale, weight, gated)
    interleaved = options.interleaved
    if interleaved and packing_of(weight) is not None:  # its rows are halves already
        scale, bias, interleaved = _halves(scale), _halves(bias), False
    for expert, first, last in expert_rows(starts, offsets, len(out)):
        for start in range(first, last, block):
            end = min(start + block, last)
            row, token = inside(index, start, end, x)
            if blocks:
                a, b = _dequantize(operands, gated, token, expert)
                result = a @ b.T
            else:
                result = x[token].double() @ _values(weight, expert, x.shape[1]).T
            if per_token_scale is not None and not blocks:
                result *= per_token_scale.flatten().expand(len(x))[token].double()[:, None]
            if scale is not None and not blocks:
                of_expert = scale[expert] if scale.numel() > 1 else scale
                result *= of_expert.flatten().double()
            if bias is not None:
                result += bias[expert].double()
            if options.activation is not None:
                result = activate(result, options.activation, interleaved, options.numbers)
            out[start:end] = 0
            out[row] = result.to(out.dtype)


def _halves(of_rows: Tensor | None) -> Tensor | None:
    """Values [E, N] of gate, up, gate, up, ... in the order of all gates, then all ups."""
    if of_rows is None or of_rows.dim() < 2:
        return of_rows
    return in_halves(of_rows, 1)


def _values(weight: Tensor, expert: int, k: int) -> Tensor:
    """An expert's weights [N, K], packed or not, in float64."""
    packing = packing_of(weight)
    if packing is None:
        return weight[expert].double()
    return dequantize_expert(weight[expert], packing, k, torch.float64)


def _dequantize(
    operands: Operands, gated: bool, token: Tensor, expert: int
) -> tuple[Tensor, Tensor]:
    """The values of these tokens and of an expert's weights, whose scales vary along K."""
    x, weight = operands.x[token].double(), operands.weight[expert, None].double()
    assert operands.per_token_scale is not None and operands.scale is not None
    x_scale = expand_x_scale(operands.per_token_scale[token].double(), x.shape[1])
    scale = expand_weight_scale(operands.scale[expert, None].double(), weight, gated)
    return x * x_scale, (weight * scale)[0]


def grouped_matmul_backward(
    grad: Tensor, operands: Operands, options: Options, needs: tuple[bool, ...]
) -> Tensors:
    """The gradients of (x, weight, per_token_scale, scale, bias), each None unless needed.

    grad [rows, N or I]: the gradient of the product. operands, options: the product's; no operand
    is 8-bit. needs: which of the five to compute. Each has its input's shape and dtype; sums are
    float32, or float64 for float64 operands. A token gets the sum over all rows that read it. Rows
    without an expert, and rows with an index outside [0, T), add nothing.
    """
    x, weight, index, offsets, per_token_scale, scale, bias, starts = operands
    inputs = (x, weight, per_token_scale, scale, bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    # The gradient of weight needs no wide copy: each expert's part is written once, not summed.
    grads = tuple(
        torch.zeros_like(tensor, dtype=tensor.dtype if tensor is weight else wide)
        if need and tensor is not None
        else None
        for tensor, need in zip(inputs, needs, strict=True)
    )
    for expert, first, last in expert_rows(starts, offsets, len(grad)):
        row, token = inside(index, first, last, x)
        _add_expert(grads, expert, token, grad[row].to(wide), inputs, options)
    return tuple(
        None if total is None or tensor is None else total.to(tensor.dtype)
        for total, tensor in zip(grads, inputs, strict=True)
    )


def _add_expert(
    grads: Tensors,
    expert: int,
    token: Tensor,
    grad: Tensor,
    inputs: Tensors,
    options: Options,
) -> None:
    """Adds the share of one expert's rows to `grads`.

    token [m]: the token of each of these rows; grad [m, N or I]: their gradient.
    """
    x, weight, per_token_scale, scale, bias = inputs
    dx, dweight, dtoken, dscale, dbias = grads
    assert x is not None and weight is not None
    a, b = x[token].to(grad.dtype), weight[expert].to(grad.dtype)
    unscaled = grad.new_ones(1)
    by_row = unscaled if per_token_scale is None else per_token_scale.flatten()[token][:, None]
    by_column = unscaled if scale is None else scale[expert].flatten()
    if options.activation is not None:
        before = a @ b.T * by_row * by_column
        if bias is not None:
            before += bias[expert]
        grad = activate_backward(
            grad, before, options.activation, options.interleaved, options.numbers
        )
    if dbias is not None:
        dbias[expert] = grad.sum(0)
    if dtoken is not None:
        share = (grad * (a @ b.T) * by_column).sum(1)
        dtoken.index_add_(0, token, share.view(-1, *dtoken.shape[1:]))
    if dscale is not None:
        share = (grad * (a @ b.T) * by_row).sum(0)
        dscale[expert] = share.sum_to_size(by_column.shape).view(dscale.shape[1:])
    grad = grad * by_row * by_column
    if dx is not None:
        dx.index_add_(0, token, grad @ b)
    if dweight is not None:
        dweight[expert] = grad.T @ a


def expert_rows(starts: Tensor | None, ends: Tensor, rows: int) -> Iterator[tuple[int, int, int]]:
    """Yields (expert, first row, end row) for every expert that has rows.

    starts: first rows per expert; default: the end of the expert before.
    """
    first_rows = None if starts is None or not rows else starts.tolist()
    first = 0
    for expert, end in enumerate(ends.tolist() if rows else ()):  # no rows: nothing is read
        if first_rows is not None:
            first = max(first_rows[expert], 0)
        last = min(end, rows)
        if first < last:
            yield expert, first, last
            first = last


def inside(index: Tensor | None, start: int, end: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows in [start, end) that have an existing token, and these tokens; int64."""
    row = torch.arange(start, end, device=x.device)
    if index is None:
        return row, row
    token = index[start:end].long()
    inside = (token >= 0) & (token < len(x))
    return row[inside], token[inside]
