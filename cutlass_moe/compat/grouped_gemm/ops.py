"""`gmm` with the signature and semantics of the package grouped_gemm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cutlass_moe.ops.grouped_matmul import grouped_matmul


def gmm(
    a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool = False, trans_b: bool = False
) -> Tensor:
    """One matrix product for each group of rows, group i being the next batch_sizes[i] rows.

    a [M, K], bfloat16. batch_sizes int64 [E], on the CPU or on a's device, with the sum M.
      gmm(a, b [E, K, N])                -> [M, N]: rows a_i @ b[i]
      gmm(a, b [E, N, K], trans_b=True)  -> [M, N]: rows a_i @ b[i].T
      gmm(a, b [M, N], trans_a=True)     -> [E, K, N]: a_i.T @ b_i, zeros for an empty group

    Differentiable in a and b, any number of times. The first two forms run on
    `cutlass_moe.grouped_matmul` and never wait for the device; the sum of batch_sizes is checked on
    the CPU only, and further rows of the result are undefined. b is read in place where it or
    its transpose is contiguous. The third form, which is also the gradient of b, reads batch_sizes
    back and makes E products in torch. Raises TypeError or ValueError, with what was expected and
    what came, for malformed arguments.
    """
    _check(a, b, batch_sizes, trans_a, trans_b)
    return _Gmm.apply(a, b, batch_sizes, trans_a, trans_b)


class _Gmm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool, trans_b: bool
    ) -> Tensor:
        ctx.save_for_backward(a, b, batch_sizes)
        ctx.trans_a, ctx.trans_b = trans_a, trans_b
        if trans_a:
            return _outer(a, b, batch_sizes)
        weight = b if trans_b else b.transpose(1, 2)
        if not (weight.is_contiguous() or weight.transpose(1, 2).is_contiguous()):
            weight = weight.contiguous()
        offsets = batch_sizes.cumsum(0, dtype=torch.int32).to(a.device, non_blocking=True)
        return grouped_matmul(a.contiguous(), weight, offsets=offsets)

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


def _outer(a: Tensor, b: Tensor, batch_sizes: Tensor) -> Tensor:
    out = a.new_empty(len(batch_sizes), a.shape[1], b.shape[1])
    first = 0
    for product, size in zip(out, batch_sizes.tolist(), strict=True):
        torch.mm(a[first : first + size].T, b[first : first + size], out=product)
        first += size
    return out


def _check(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool, trans_b: bool) -> None:
    if trans_a and trans_b:
        raise ValueError("at most one of trans_a and trans_b must be true, got both")
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype != torch.bfloat16:
            raise TypeError(f"{name} must be torch.bfloat16, got {tensor.dtype}")
    if batch_sizes.dtype != torch.int64:
        raise TypeError(f"batch_sizes must be torch.int64, got {batch_sizes.dtype}")
    if batch_sizes.dim() != 1:
        raise ValueError(f"batch_sizes must be [E], got {list(batch_sizes.shape)}")
    if a.dim() != 2:
        raise ValueError(f"a must be [M, K], got {list(a.shape)}")
    experts, (rows, k) = len(batch_sizes), a.shape
    if trans_a:
        expected, fits = f"[{rows}, N]", b.dim() == 2 and len(b) == rows
    else:
        expected = f"[{experts}, N, {k}]" if trans_b else f"[{experts}, {k}, N]"
        inner = -1 if trans_b else -2
        fits = b.dim() == 3 and len(b) == experts and b.shape[inner] == k
    if not fits:
        raise ValueError(f"b must be {expected}, got {list(b.shape)}")
    if b.device != a.device:
        raise ValueError(f"b must be on {a.device}, got one on {b.device}")
    if batch_sizes.device.type == "cpu":
        total = int(batch_sizes.sum())
        if total != rows or (batch_sizes < 0).any():
            raise ValueError(
                f"batch_sizes must be at least 0 with the sum {rows}, a's rows, "
                f"got {batch_sizes.tolist()}"
            )
    elif batch_sizes.device != a.device:
        raise ValueError(
            f"batch_sizes must be on the CPU or {a.device}, got one on {batch_sizes.device}"
        )
