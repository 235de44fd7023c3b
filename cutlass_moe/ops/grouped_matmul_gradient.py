"""The gradients of grouped_matmul: by kernels if it has neither scales nor an activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cutlass_moe.operands import Operands, Options
from cutlass_moe.ops._checks import is_n_major, readable
from cutlass_moe.ops._define import define, define_gradient
from cutlass_moe.ops._packed import packing_of
from cutlass_moe.ops._row_sums import sum_by_expert, sum_by_index
from cutlass_moe.ops.grouped_matmul import (
    COUNT,
    TENSORS,
    grouped_matmul,
    grouped_matmul_out,
    split,
)
from cutlass_moe.ops.grouped_matmul_reference import grouped_matmul_backward
from cutlass_moe.ops.weight_grad import grouped_weight_grad


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    operands, options = split(inputs)
    if packing_of(operands.weight) is not None:
        raise RuntimeError(
            "grouped_matmul has no gradient through packed weights and an argument requires one: "
            "call under torch.no_grad()"
        )
    if operands.x.dtype.itemsize == 1:
        raise RuntimeError(
            f"grouped_matmul has no gradient through {operands.x.dtype} operands and an argument "
            "requires one: use bfloat16 or float16, or call under torch.no_grad()"
        )
    ctx.save_for_backward(*operands)
    ctx.activation = (
        options.activation, options.interleaved, options.limit, options.alpha, options.beta
    )  # fmt: skip


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    given = Operands(*ctx.saved_tensors)
    x, weight, _, _, per_token_scale, scale, bias, _ = ctx.needs_input_grad[:COUNT]
    needs = [x, weight, per_token_scale, scale, bias]
    computed = iter(_backward_op(grad.contiguous(), *readable(given), *ctx.activation, needs))
    inputs = (given.x, given.weight, given.per_token_scale, given.scale, given.bias)
    gradients = [
        _as_given(next(computed), tensor) if need else None
        for need, tensor in zip(needs, inputs, strict=True)
    ]
    return (*gradients[:2], None, None, *gradients[2:], None, *(None for _ in Options._fields))


def _as_given(gradient: Tensor, given: Tensor | None) -> Tensor:
    """The gradient of a tensor as it was given, from that of the copy that was read."""
    assert given is not None
    if gradient.shape != given.shape:
        one = given.numel() == 1 and gradient.numel() != 1  # it stood for all
        gradient = (gradient.sum() if one else gradient).reshape(given.shape)
    return gradient.to(given.dtype)


def _no_second_gradient(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("grouped_matmul is differentiable once, got a gradient of its gradient")


def _split_backward(arguments: tuple[Any, ...]) -> tuple[Operands, tuple[Any, ...]]:
    return Operands(*arguments[:COUNT]), arguments[COUNT:]


def _backward_impl(grad: Tensor, *arguments: Any) -> list[Tensor]:
    """The gradients of those of (x, weight, per_token_scale, scale, bias) that `needs` marks."""
    operands, (activation, interleaved, limit, alpha, beta, needs) = _split_backward(arguments)
    if activation is None and operands.per_token_scale is None and operands.scale is None:
        found = _plain_gradients(grad.to(operands.x.dtype), operands, needs)
        return [gradient for gradient in found if gradient is not None]
    options = Options(
        activation=activation, interleaved=interleaved, limit=limit, alpha=alpha, beta=beta
    )
    gradients = grouped_matmul_backward(grad, operands, options, tuple(needs))
    return [gradient for gradient in gradients if gradient is not None]


def _plain_gradients(grad: Tensor, operands: Operands, needs: list[bool]) -> list[Tensor | None]:
    """The gradients of x, weight and bias of a product without scales and activation."""
    x, weight, index, offsets, _, _, bias, starts = operands
    by_x, by_weight, _, _, by_bias = needs
    found: list[Tensor | None] = [None, None, None]
    if by_x:
        found[0] = _gradient_of_x(grad, operands)
    if by_weight:
        swapped = is_n_major(weight)
        left, right, left_index, right_index = grad, x, None, index
        if swapped:
            left, right, left_index, right_index = x, grad, index, None
        by_experts = grouped_weight_grad(
            left, right, offsets, left_index=left_index, right_index=right_index, starts=starts
        )
        found[1] = by_experts.transpose(1, 2) if swapped else by_experts
    if by_bias and bias is not None:
        read = None
        if index is not None:
            read = ((index >= 0) & (index < x.shape[0])).float()
        found[2] = sum_by_expert(grad, offsets, weights=read, starts=starts).to(bias.dtype)
    return found


def _gradient_of_x(grad: Tensor, operands: Operands) -> Tensor:
    """The rows of `grad` times their experts' weights; a token gets the sum of its rows."""
    x, weight, index, offsets, _, _, _, starts = operands
    turned, rows = weight.transpose(1, 2), grad.shape[0]
    if index is None:
        found = x.new_zeros(x.shape)
        grouped_matmul_out(found, grad, turned, offsets=offsets, starts=starts)
        return found
    wide = torch.float32 if x.dtype == torch.float16 else x.dtype
    products = grouped_matmul(grad, turned, offsets=offsets, starts=starts, out_dtype=wide)
    row = torch.arange(rows, dtype=torch.int32, device=grad.device)
    inside = row < offsets[-1:]
    if starts is not None:
        expert = torch.searchsorted(offsets, row, right=True).clamp(max=len(offsets) - 1)
        inside = inside & (row >= starts[expert])
    return sum_by_index(products, index.where(inside, -1), x.shape[0], x.dtype)


def _backward_fake(grad: Tensor, *arguments: Any) -> list[Tensor]:
    operands, (*_, needs) = _split_backward(arguments)
    x, weight, _, _, per_token_scale, scale, bias, _ = operands
    inputs = zip((x, weight, per_token_scale, scale, bias), needs, strict=True)
    return [torch.empty_like(tensor) for tensor, need in inputs if need and tensor is not None]


_backward_op = define(
    f"grouped_matmul_backward(Tensor grad, {TENSORS}, str? activation, bool interleaved, "
    "float? limit, float? alpha, float? beta, bool[] needs) -> Tensor[]",
    _backward_impl,
    _backward_fake,
)
define_gradient("grouped_matmul", _gradients, _save_for_backward)
define_gradient("grouped_matmul_backward", _no_second_gradient)
