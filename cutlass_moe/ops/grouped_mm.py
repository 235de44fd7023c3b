"""grouped_mm: torch's function of that name, with kernels for the two forms that experts need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cutlass_moe.operands import FLOATS
from cutlass_moe.ops._types import check_types, typed
from cutlass_moe.ops.grouped_matmul import grouped_matmul, grouped_matmul_out
from cutlass_moe.ops.weight_grad import grouped_weight_grad
from cutlass_moe.runtime import library
from emitters.spec.arch import DEFAULT_ARCH

_SERVED = (torch.bfloat16, torch.float16)


def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`torch.nn.functional.grouped_mm`: one matrix product for each expert; differentiable.

      mat_a       mat_b       offs cuts              result      made by
      [M, K]      [E, K, N]   M                      [M, N]      `grouped_matmul`
      [M, K]      [K, N]      K of both              [E, M, N]   `grouped_weight_grad`
      [E, M, K]   [K, N]      N                      [M, N]      torch
      [E, M, K]   [E, K, N]   nothing, it is None    [E, M, N]   torch

    offs int32 [E]: cumulative ends of the experts' parts of that dimension, on the device; the
      host does not read them. In the first form rows past offs[-1] are undefined.
    mat_a, mat_b: as torch takes them. One of the last two dimensions has stride 1, and all other
      strides are multiples of 16 bytes; `w.transpose(1, 2)` of a contiguous w [E, N, K] will do.
    bias: must be None, as in torch. out_dtype: default mat_a's; in the first form bfloat16,
      float16 or float32, in the second mat_a's or float32, in the others what torch takes.

    Kernels serve the first two forms in bfloat16 and float16 on an SM90 GPU; CPU tensors of these
    dtypes take the references of both ops. Other dtypes, and other GPUs, are torch's. Each form's
    gradients are products of both, any number of times; gradients of what offs leaves out are 0.

    Raises ValueError or TypeError that says what must be and what came, and what torch raises for
    the forms that it computes.
    """
    try:
        if not (mat_a.dim() == 2 and mat_b.dim() in (2, 3) and _has_kernel(mat_a)):
            return _torch_grouped_mm(mat_a, mat_b, offs, bias, out_dtype)
        _check(mat_a, mat_b, offs, bias, out_dtype)
        form = _TokensTimesWeights if mat_b.dim() == 3 else _SumOverRows
        return form.apply(mat_a, mat_b, offs, out_dtype)
    except Exception:
        check_types(grouped_mm, locals())
        raise


@typed
def grouped_mm_reference(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`grouped_mm` in plain PyTorch, unchecked: float64 products, converted once at the end.

    The host reads offs. Rows past offs[-1] become zeros in the first form. Differentiable.
    """
    a, b = mat_a.double(), mat_b.double()
    if offs is None:
        out = a @ b
    elif b.dim() == 3:
        rows = [a[first:end] @ b[e] for e, first, end in _parts(offs)]
        used = sum(map(len, rows))
        out = torch.cat([*rows, a.new_zeros(len(a) - used, b.shape[2])])
    elif a.dim() == 3:
        out = torch.cat([a[e] @ b[:, first:end] for e, first, end in _parts(offs)], 1)
    else:
        out = torch.stack([a[:, first:end] @ b[first:end] for _, first, end in _parts(offs)])
    return out.to(out_dtype or mat_a.dtype)


class _TokensTimesWeights(torch.autograd.Function):
    """The first form, with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, mat_a: Tensor, mat_b: Tensor, offs: Tensor, out_dtype: torch.dtype | None
    ) -> Tensor:
        ctx.save_for_backward(mat_a, mat_b, offs)
        return grouped_matmul(mat_a, mat_b.transpose(1, 2), offsets=offs, out_dtype=out_dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mat_a, mat_b, offs = ctx.saved_tensors
        grad = grad.to(mat_a.dtype).contiguous()
        needs_a, needs_b = ctx.needs_input_grad[:2]
        grad_a = _rows_times(grad, mat_b.transpose(1, 2), offs) if needs_a else None
        grad_b = None
        if needs_b and mat_b.stride(1) == 1:  # the transpose of weights: so is their gradient
            grad_b = _SumOverRows.apply(grad.T, mat_a, offs, None).transpose(1, 2)
        elif needs_b:
            grad_b = _SumOverRows.apply(mat_a.T, grad, offs, None)
        return grad_a, grad_b, None, None


class _SumOverRows(torch.autograd.Function):
    """The second form, with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, mat_a: Tensor, mat_b: Tensor, offs: Tensor, out_dtype: torch.dtype | None
    ) -> Tensor:
        ctx.save_for_backward(mat_a, mat_b, offs)
        return grouped_weight_grad(mat_a.T, mat_b, offs, out_dtype=out_dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mat_a, mat_b, offs = ctx.saved_tensors
        grad = grad.to(mat_a.dtype).contiguous()
        needs_a, needs_b = ctx.needs_input_grad[:2]
        grad_a = _rows_times(mat_b, grad.transpose(1, 2), offs).T if needs_a else None
        grad_b = _rows_times(mat_a.T, grad, offs) if needs_b else None
        return grad_a, grad_b, None, None


def _rows_times(rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """The first form, with zeros in rows past offs[-1]."""
    if not torch.is_grad_enabled():  # else this gradient may have a gradient
        out = rows.new_zeros(len(rows), weight.shape[2])
        grouped_matmul_out(out, rows, weight.transpose(1, 2), offsets=offs)
        return out
    product = _TokensTimesWeights.apply(rows, weight, offs, None)
    row = torch.arange(len(product), device=offs.device)
    return product.masked_fill((row >= offs[-1])[:, None], 0)


def _torch_grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    function = getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if function is None:
        raise RuntimeError(
            "torch must have torch._grouped_mm for other forms than [M, K] x [E, K, N] and "
            f"[M, K] x [K, N] and for other dtypes than {_names(_SERVED)}, got torch "
            f"{torch.__version__}"
        )
    return function(mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)


def _has_kernel(mat_a: Tensor) -> bool:
    if mat_a.dtype not in _SERVED:
        return False
    return not mat_a.is_cuda or library.device_arch(mat_a.get_device()) == DEFAULT_ARCH


def _check(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
) -> None:
    """Checks the arguments of the first two forms by torch's rules; the ops check the rest."""
    if offs is None:
        raise ValueError("offs must be given where mat_a is [M, K], got None")
    if mat_a.shape[1] != mat_b.shape[-2]:
        wanted = "[E, K, N]" if mat_b.dim() == 3 else "[K, N]"
        got = f"{list(mat_a.shape)} and {list(mat_b.shape)}"
        raise ValueError(f"mat_a must be [M, K] and mat_b {wanted}, got {got}")
    if mat_b.dtype != mat_a.dtype:
        raise TypeError(f"mat_b must be {mat_a.dtype} like mat_a, got {mat_b.dtype}")
    if offs.dtype != torch.int32:
        raise TypeError(f"offs must be torch.int32, got {offs.dtype}")
    experts = len(mat_b) if mat_b.dim() == 3 else offs.numel()
    if offs.shape != (experts,):
        raise ValueError(f"offs must be [{experts}], one end per expert, got {list(offs.shape)}")
    if bias is not None:
        raise ValueError("bias must be None, as in torch's function, got a tensor")
    allowed = FLOATS if mat_b.dim() == 3 else (mat_a.dtype, torch.float32)
    if out_dtype is not None and out_dtype not in allowed:
        raise TypeError(f"out_dtype must be one of {_names(allowed)}, got {out_dtype}")
    for name, matrix in (("mat_a", mat_a), ("mat_b", mat_b)):
        _check_strides(name, matrix)


def _check_strides(name: str, matrix: Tensor) -> None:
    *outer, rows, columns = matrix.stride()
    height, width = matrix.shape[-2:]
    to_16 = 16 // matrix.dtype.itemsize
    if columns == 1 and rows >= max(1, width):
        others = [rows, *outer]
    elif rows == 1 and columns >= max(1, height):
        others = [columns, *outer]
    else:
        others = [1]
    if any(stride % to_16 for stride in others):
        raise ValueError(
            f"{name} must have one of its last two dimensions dense (stride 1) and all other "
            f"strides in multiples of {to_16} elements (16 bytes), got strides {matrix.stride()}"
        )


def _parts(offs: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yields (expert, first, end) of each expert's part of a dimension."""
    first = 0
    for expert, end in enumerate(offs.tolist()):
        yield expert, first, end
        first = end


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(map(str, dtypes))
