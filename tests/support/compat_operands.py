"""What the compatible names take: transpositions of gmm, operands of DeepGEMM's functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cutlass_moe.compat.grouped_gemm import ops
from cutlass_moe.ops.quantize import quantize_per_token

FORMS = {"plain": (False, False), "trans_b": (False, True), "trans_a": (True, False)}


def gmm(
    a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool = False, trans_b: bool = False
) -> Tensor:
    """The package's, whose fourth argument is trans_b, with both of FORMS."""
    return ops.gmm(a, b, batch_sizes, trans_b, trans_a=trans_a)


def pair(x: Tensor, dtype: torch.dtype) -> Any:
    """An operand as the functions take it."""
    if dtype == torch.bfloat16:
        return x
    flat, scale = quantize_per_token(x.flatten(0, -2), dtype)
    return flat.view(x.shape), scale.view(x.shape[:-1])


def dense(operand: Any) -> Tensor:
    if isinstance(operand, Tensor):
        return operand.double()
    values, scale = operand
    return values.double() * scale.double()[..., None]
