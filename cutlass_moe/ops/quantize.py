"""Symmetric 8-bit quantisation with one float32 scale per row: tensor ~ q * scale."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index

import torch
from torch import Tensor
from torch.nn import functional

from cutlass_moe.operands import DTYPES, FLOATS
from cutlass_moe.ops._define import define
from cutlass_moe.ops._types import check_types, typed
from cutlass_moe.ops.dispatch import launch_step, step_kernel
from cutlass_moe.runtime.parameters import quantize_values
from emitters.spec import dtypes
from emitters.spec.layer_steps import QuantizeProblem

LARGEST = {t: dtypes.LARGEST[name] for t, name in DTYPES.items() if name in dtypes.LARGEST}
_MAX_ROWS = 2**31  # per launch, exclusive: rows are counted in int32


def quantize_per_token(x: Tensor, dtype: torch.dtype, pad_to: int = 1) -> tuple[Tensor, Tensor]:
    """Quantises each row of x to 8 bits with a scale of its own.

      scale[t] = max |x[t]| / largest, or 1 for a row of zeros
      q[t] = x[t] / scale[t], to nearest, ties to even

    x [T, K]: bfloat16, float16 or float32. dtype: torch.float8_e4m3fn, torch.float8_e5m2 or
    torch.int8, with largest 448, 57344 and 127. pad_to: rows of q end with zeros, up to a multiple
    of so many values; kernels take rows of 16 (`pad_to=16`). Where K is none, x is copied.

    Returns (q [T, K] of `dtype`, K padded, scale float32 [T]). A row with an infinity or a NaN gets
    a scale that is not finite either. Raises TypeError for other dtypes, and ValueError if x is not
    [T, K] or requires a gradient, or if pad_to is not positive.
    """
    try:
        if x.dim() != 2:
            raise ValueError(f"x must be [T, K], got {list(x.shape)}")
        check_values(x, dtype)
        return _quantize_op(_pad(x, pad_to), dtype)
    except Exception:
        check_types(quantize_per_token, locals())
        raise


@typed
def quantize_per_channel(
    weight: Tensor, dtype: torch.dtype, pad_to: int = 1
) -> tuple[Tensor, Tensor]:
    """Quantises each row of each expert's weights to 8 bits, as `quantize_per_token` does.

    weight [E, N, K] -> (q [E, N, K], scale float32 [E, N]). pad_to: pads K, as there; rows of x
    must then be padded alike. `pad_experts` pads what is between a layer's two products.
    """
    if weight.dim() != 3:
        raise ValueError(f"weight must be [E, N, K], got {list(weight.shape)}")
    check_values(weight, dtype)
    weight = _pad(weight, pad_to)
    q, scale = _quantize_op(weight.flatten(0, 1), dtype)
    return q.view(weight.shape), scale.view(weight.shape[:2])


@typed
def quantize_per_token_reference(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`quantize_per_token` in plain PyTorch; gives the same bits for every finite row.

    x [..., K] may have any number of dimensions.
    """
    largest = LARGEST[dtype]
    magnitude = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    # divides by a tensor, because CUDA's division by a number multiplies by its reciprocal
    scale = magnitude.float() / torch.full((), largest, device=x.device)
    scale = scale.where(scale != 0, 1.0)  # rows of zeros, or so small that the division gives 0
    scaled = (x.float() / scale[..., None]).clamp_(-largest, largest)
    if dtype == torch.int8:
        scaled.round_()  # ties to even; the conversion alone would truncate
    return scaled.to(dtype), scale


def quantize_static(x: Tensor, dtype: torch.dtype, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """Quantises rows x [..., K] with one given scale: q = x / scale, clamped to dtype's range.

    scale: a number, or float32 of one element. Returns q [..., K] and the scale of each row,
    float32 [...].
    """
    largest = LARGEST[dtype]
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device).reshape(())
    scaled = (x.float() / scale).clamp_(-largest, largest)
    if dtype == torch.int8:
        scaled.round_()
    return scaled.to(dtype), scale.expand(x.shape[:-1]).contiguous()


def check_values(x: Tensor, dtype: torch.dtype) -> None:
    """Raises TypeError or ValueError if x can't be quantised to this dtype."""
    if dtype not in LARGEST:
        raise TypeError(f"dtype must be one of {_names(LARGEST)}, got {dtype}")
    if x.dtype not in FLOATS:
        raise TypeError(f"values to quantise must be one of {_names(FLOATS)}, got {x.dtype}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "values to quantise must not require a gradient, because quantisation has none, got "
            "some that do: detach them, or call under torch.no_grad()"
        )


def _pad(x: Tensor, pad_to: int) -> Tensor:
    """Pads rows [..., K] with zeros to a multiple of so many values."""
    if pad_to < 1:
        raise ValueError(f"pad_to must be a positive integer, got {pad_to!r}")
    more = -x.shape[-1] % index(pad_to)
    return functional.pad(x, (0, more)) if more else x


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)


def _quantize_fake(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:1], dtype=torch.float32)


def _quantize_cuda(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if x.numel() == 0 or x.shape[0] >= _MAX_ROWS:
        return quantize_per_token_reference(x, dtype)
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    q, scale = _quantize_fake(x, dtype)
    rows, k = x.shape
    problem = QuantizeProblem(DTYPES[x.dtype], DTYPES[dtype], k)
    kernel = step_kernel(problem, x.get_device())
    if kernel is None:
        return quantize_per_token_reference(x, dtype)
    addresses = {"source": x.data_ptr(), "q": q.data_ptr(), "scale": scale.data_ptr()}
    values = quantize_values(addresses, rows, k * x.element_size())
    launch_step(kernel, values, problem.ctas(rows, kernel.record.threads), x.get_device())
    return q, scale


_quantize_op = define(
    "quantize_per_token(Tensor x, ScalarType dtype) -> (Tensor, Tensor)",
    quantize_per_token_reference,
    _quantize_fake,
    cuda=_quantize_cuda,
)
