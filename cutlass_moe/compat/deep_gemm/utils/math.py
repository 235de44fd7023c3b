"""Quantisation to fp8 by 1 x 128 and 128 x 128, by DeepGEMM's names."""

from __future__ import annotations

import torch
from torch import Tensor

from cutlass_moe.ops.quantize_groups import quantize_per_block, quantize_per_token_group
from emitters.spec.gemm import K_BLOCK


def ceil_div(x: int, y: int) -> int:
    """x / y, rounded up."""
    return -(-x // y)


def align(x: int, y: int) -> int:
    """x, rounded up to a multiple of y."""
    return ceil_div(x, y) * y


def per_token_cast_to_fp8(
    x: Tensor, use_ue8m0: bool = False, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (float8_e4m3fn [M, K], float32 scale [M, K / 128, rounded up]).

    This is `cutlass_moe.quantize_per_token_group`, with its dtypes and errors. use_ue8m0: scales
    are powers of two. A group of zeros has the scale 1, where DeepGEMM's is 1e-4 / 448 for all
    groups of that magnitude or a smaller one.

    Raises ValueError for another gran_k than 128 and for use_packed_ue8m0, which Blackwell reads.
    """
    _expect_128(gran_k)
    if use_packed_ue8m0:
        raise ValueError(
            "use_packed_ue8m0 must be False (scales are float32; Blackwell reads packed ones), "
            "got True"
        )
    return quantize_per_token_group(x, torch.float8_e4m3fn, power_of_two=use_ue8m0)


def per_block_cast_to_fp8(
    x: Tensor, use_ue8m0: bool = False, gran_k: int = 128
) -> tuple[Tensor, Tensor]:
    """x [N, K] -> (float8_e4m3fn [N, K], float32 scale [N / 128, K / 128], both rounded up).

    This is `cutlass_moe.quantize_per_block` of one expert's weights. Other arguments and errors:
    as in `per_token_cast_to_fp8`.
    """
    _expect_128(gran_k)
    if x.dim() != 2:
        raise ValueError(f"x must be [N, K], got {list(x.shape)}")
    q, scale = quantize_per_block(x[None], torch.float8_e4m3fn, power_of_two=use_ue8m0)
    return q[0], scale[0]


def _expect_128(gran_k: int) -> None:
    if gran_k != K_BLOCK:
        raise ValueError(f"gran_k must be {K_BLOCK}, got {gran_k}")
