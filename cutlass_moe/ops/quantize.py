"""Symmetric 8-bit quantisation with one float32 scale a row: tensor ~ q * scale."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cutlass_moe.operands import DTYPES, FLOATS
from cutlass_moe.ops._define import define
from cutlass_moe.ops.dispatch import launch_step, step_kernel
from cutlass_moe.runtime.parameters import quantize_values
from emitters.spec import dtypes
from emitters.spec.layer_steps import QuantizeProblem

LARGEST = {t: dtypes.LARGEST[name] for t, name in DTYPES.items() if name in dtypes.LARGEST}
_MAX_ROWS = 2**31  # of a launch, exclusive


def quantize_per_token(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [T, K] of bf16, fp16 or fp32 -> (q [T, K] of `dtype`, scale float32 [T]).

    dtype: torch.float8_e4m3fn, torch.float8_e5m2 or torch.int8. scale is the row's largest
    magnitude over the dtype's (448, 57344, 127), 1 for a row of zeros; q = x / scale to nearest,
    ties to even. A row with an infinity or a NaN gets a scale that is one too. Raises TypeError on
    other dtypes, ValueError on another number of dimensions and where x requires grad.
    """
    if x.dim() != 2:
        raise ValueError(f"x must be [T, K], got {list(x.shape)}")
    _check(x, dtype)
    return _quantize_op(x, dtype)


def quantize_per_channel(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """weight [E, N, K] -> (q [E, N, K], scale float32 [E, N]); else as `quantize_per_token`."""
    if weight.dim() != 3:
        raise ValueError(f"weight must be [E, N, K], got {list(weight.shape)}")
    _check(weight, dtype)
    q, scale = _quantize_op(weight.flatten(0, 1), dtype)
    return q.view(weight.shape), scale.view(weight.shape[:2])


def quantize_per_token_reference(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`quantize_per_token` in plain PyTorch: the same bits, but for q of rows that are not finite.

    x may have more dimensions.
    """
    largest = LARGEST[dtype]
    magnitude = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    # by a tensor: CUDA's division by a number multiplies by its reciprocal
    scale = magnitude.float() / torch.full((), largest, device=x.device)
    scale = scale.where(scale != 0, 1.0)  # zeros, and magnitudes that vanish in the division
    scaled = (x.float() / scale[..., None]).clamp_(-largest, largest)
    if dtype == torch.int8:
        scaled.round_()  # ties to even; the conversion alone would cut off
    return scaled.to(dtype), scale


def _check(x: Tensor, dtype: torch.dtype) -> None:
    if dtype not in LARGEST:
        raise TypeError(f"dtype must be one of {_names(LARGEST)}, got {dtype}")
    if x.dtype not in FLOATS:
        raise TypeError(f"values to quantise must be one of {_names(FLOATS)}, got {x.dtype}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "values to quantise must not require a gradient (quantisation has no gradient; "
            "detach them or call under torch.no_grad()), got some that do"
        )


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
    values = quantize_values(addresses, rows)
    launch_step(kernel, values, problem.ctas(rows, kernel.record.threads), x.get_device())
    return q, scale


_quantize_op = define(
    "quantize_per_token(Tensor x, ScalarType dtype) -> (Tensor, Tensor)",
    quantize_per_token_reference,
    _quantize_fake,
    cuda=_quantize_cuda,
)
