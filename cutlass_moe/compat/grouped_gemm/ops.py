"""`gmm`, `permute`, `unpermute` and `sinkhorn` as the package grouped_gemm has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cutlass_moe.compat.grouped_gemm import backend


def gmm(
    a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False, *, trans_a: bool = False
) -> Tensor:
    """`backend.gmm`, differentiable in a and b, any number of times.

    Shapes, dtypes and errors are those of `backend.gmm`. The gradient of b is the form with
    trans_a, which the package's own function does not offer.
    """
    backend.check_gmm(a, b, batch_sizes, trans_a, trans_b)
    return _Gmm.apply(a, b, batch_sizes, trans_a, trans_b)


def permute(
    input_act: Tensor, indices: Tensor, num_out_tokens: int | None = None, max_token_num: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Rows of tokens in the order of their experts, and the map that `unpermute` needs.

    input_act [T, H]; indices int32 or int64 [T, k], or [T] for k = 1; num_out_tokens: how many rows
    to keep, default all; max_token_num: not needed here. Returns (rows [R, H], row_id_map int32
    [k * T]) as `backend.permute` does; an empty input_act as it is, and None. Differentiable in
    input_act.
    """
    if not input_act.numel():
        return input_act, None
    if indices.dim() == 1:
        indices = indices[:, None]
    return _Permute.apply(input_act, indices, num_out_tokens or 0)


def unpermute(input_act: Tensor, row_id_map: Tensor, probs: Tensor | None = None) -> Tensor:
    """Each token's rows, weighted with probs and added up: the inverse of `permute`.

    input_act [R, H]; row_id_map int32 [k * T]; probs [T, k], default ones, and then k must be 1.
    Returns [T, H] as `backend.unpermute` does; an empty input_act as it is. Differentiable in
    input_act and probs.
    """
    if not input_act.numel():
        return input_act
    if probs is None and len(row_id_map) != len(input_act):
        raise ValueError(
            f"probs must be given where row_id_map has not one element a row of input_act, got "
            f"{len(row_id_map)} for {len(input_act)} rows"
        )
    return _Unpermute.apply(input_act, row_id_map, probs)


def sinkhorn(cost: Tensor, tol: float = 0.0001) -> Tensor:
    """`backend.sinkhorn`: writes to cost, and returns it."""
    return backend.sinkhorn(cost, tol)


sinkhorn_kernel = sinkhorn  # the package's name


class _Gmm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool, trans_b: bool
    ) -> Tensor:
        ctx.save_for_backward(a, b, batch_sizes)
        ctx.trans_a, ctx.trans_b = trans_a, trans_b
        return backend.gmm(a, b, batch_sizes, trans_a, trans_b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, batch_sizes = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad[:2]
        grad_a = grad_b = None
        if ctx.trans_a:  # out_i = a_i.T @ b_i
            grad_a = gmm(b, grad, batch_sizes, trans_b=True) if needs_a else None
            grad_b = gmm(a, grad, batch_sizes) if needs_b else None
        else:
            grad_a = gmm(grad, b, batch_sizes, trans_b=not ctx.trans_b) if needs_a else None
            left, right = (grad, a) if ctx.trans_b else (a, grad)
            grad_b = gmm(left, right, batch_sizes, trans_a=True) if needs_b else None
        return grad_a, grad_b, None, None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input_act: Tensor, indices: Tensor, num_out_tokens: int
    ) -> tuple[Tensor, Tensor]:
        rows, row_id_map, _ = backend.permute(input_act, indices, num_out_tokens, [], 0)
        ctx.save_for_backward(row_id_map)
        ctx.shape = indices.shape
        ctx.mark_non_differentiable(row_id_map)
        return rows, row_id_map

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (row_id_map,) = ctx.saved_tensors
        return backend.unpermute(grad, row_id_map, grad.new_empty(0), *ctx.shape), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_act: Tensor, row_id_map: Tensor, probs: Tensor | None) -> Tensor:
        ctx.save_for_backward(input_act, row_id_map, probs)
        if probs is None:
            tokens, top_k, weights = len(input_act), 1, input_act.new_empty(0)
        else:
            (tokens, top_k), weights = probs.shape, probs
        return backend.unpermute(input_act, row_id_map, weights, tokens, top_k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input_act, row_id_map, probs = ctx.saved_tensors
        act, weights = backend.unpermute_bwd(grad, input_act, row_id_map, probs)
        return act, None, None if probs is None else weights.to(probs.dtype)
