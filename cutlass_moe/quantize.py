"""Symmetric 8-bit quantisation with one float32 scale a row: tensor ~ q * scale."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
SOURCES = (torch.bfloat16, torch.float16, torch.float32)


def quantize_per_token(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [T, K] of bf16, fp16 or fp32 -> (q [T, K] of `dtype`, scale float32 [T]).

    dtype: torch.float8_e4m3fn, torch.float8_e5m2 or torch.int8. scale is the row's largest
    magnitude over the dtype's (448, 57344, 127), 1 for a row of zeros; q = x / scale to nearest,
    ties to even. A row with an infinity or a NaN gets a scale that is one too. Raises TypeError on
    other dtypes, ValueError on another number of dimensions and where x requires grad.
    """
    if x.dim() != 2:
        raise ValueError(f"x: expected [T, K], got {list(x.shape)}")
    return _quantize_rows(x, dtype)


def quantize_per_channel(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """weight [E, N, K] -> (q [E, N, K], scale float32 [E, N]); else as `quantize_per_token`."""
    if weight.dim() != 3:
        raise ValueError(f"weight: expected [E, N, K], got {list(weight.shape)}")
    return _quantize_rows(weight, dtype)


def _quantize_rows(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if dtype not in LARGEST:
        raise TypeError(f"dtype: expected one of {_names(LARGEST)}, got {dtype}")
    if values.dtype not in SOURCES:
        raise TypeError(f"values to quantise: expected {_names(SOURCES)}, got {values.dtype}")
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "values to quantise: expected none that require grad (quantisation has no gradient; "
            "detach them or call under torch.no_grad()), got some that do"
        )
    largest = LARGEST[dtype]
    magnitude = values.abs().amax(-1) if values.shape[-1] else values.new_zeros(values.shape[:-1])
    scale = magnitude.float() / largest
    scale = scale.where(scale != 0, 1.0)  # zeros, and magnitudes that vanish in the division
    scaled = (values.float() / scale[..., None]).clamp_(-largest, largest)
    if dtype == torch.int8:
        scaled.round_()  # ties to even; the conversion alone would cut off
    return scaled.to(dtype), scale


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
