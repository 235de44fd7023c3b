"""Layouts of rows and of scales, by DeepGEMM's names.

The products here read scales of any strides, and rows of experts with any alignment or none. These
functions are for callers that lay them out as DeepGEMM needs it on Hopper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cutlass_moe.compat.deep_gemm.utils.math import align, ceil_div
from emitters.spec.gemm import K_BLOCK

_DEFAULT_ALIGNMENT = 128  # DeepGEMM's on Hopper, whatever rows are expected
_TMA_BYTES = 16
_alignment = _DEFAULT_ALIGNMENT


def get_mk_alignment_for_contiguous_layout() -> int:
    """The number of rows, at first 128, to which DeepGEMM's callers pad those of each expert.

    In the psum layout each expert's rows begin at a multiple of it. The other layouts here take
    any padding, or none.
    """
    return _alignment


def set_mk_alignment_for_contiguous_layout(new_value: int) -> None:
    """Sets what `get_mk_alignment_for_contiguous_layout` returns, for the whole process.

    Raises ValueError unless it is a positive number.
    """
    global _alignment
    if new_value < 1:
        raise ValueError(f"new_value must be a positive number, got {new_value}")
    _alignment = new_value


def get_theoretical_mk_alignment_for_contiguous_layout(expected_m: int | None = None) -> int:
    """The alignment that DeepGEMM likes best: on Hopper 128 for every expected_m."""
    return _DEFAULT_ALIGNMENT


get_m_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout
get_k_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout


def get_tma_aligned_size(x: int, element_size: int) -> int:
    """x elements of so many bytes, rounded up to a multiple of 16 bytes."""
    return align(x, _TMA_BYTES // element_size)


def get_mn_major_tma_aligned_tensor(sf: Tensor) -> Tensor:
    """A float32 scale [M, K / 128] or [E, M, K / 128] whose neighbours along M lie side by side.

    Returns the same shape and values with strides (A K / 128, 1, A), where A is M rounded up to a
    multiple of 4; sf itself if it has them. The products here don't ask for it. Raises TypeError
    for another dtype and ValueError for another number of dimensions.
    """
    if sf.dtype != torch.float32:
        raise TypeError(f"sf must be torch.float32, got {sf.dtype}")
    if sf.dim() not in (2, 3):
        raise ValueError(f"sf must be [M, K / 128] or [E, M, K / 128], got {list(sf.shape)}")
    m, groups = sf.shape[-2:]
    aligned = get_tma_aligned_size(m, sf.element_size())
    strides = (aligned * groups, 1, aligned)[-sf.dim() :]
    if sf.stride() == strides:
        return sf
    out = torch.empty_strided(sf.shape, strides, dtype=sf.dtype, device=sf.device)
    return out.copy_(sf)


get_col_major_tma_aligned_tensor = get_mn_major_tma_aligned_tensor  # its name before DeepGEMM 2


def transform_sf_into_required_layout(
    sf: Tensor,
    mn: int,
    k: int,
    recipe: Sequence[int],
    num_groups: int | None = None,
    is_sfa: bool | None = None,
    disable_ue8m0_cast: bool = False,
    psum_layout: Tensor | None = None,
) -> Tensor:
    """A scale as DeepGEMM reads it on Hopper: that of x in the order of
    `get_mn_major_tma_aligned_tensor`, that of 128 x 128 blocks of weights as it is.

    sf: float32 [mn / rows, k / 128], both rounded up, after [num_groups] if that is given.
    recipe: (rows, 128), how many rows and columns share a scale; or (rows of a, rows of b, 128),
      of which is_sfa says whether sf is that of a. rows is 1 or 128.
    disable_ue8m0_cast, psum_layout: change nothing here; Blackwell's scales would be packed.

    Raises TypeError or ValueError, with what was expected and what came, for anything else.
    """
    if len(recipe) == 3 and is_sfa is None:
        raise ValueError(f"is_sfa must be given for the recipe of two operands {tuple(recipe)}")
    rows, columns = (recipe[0 if is_sfa else 1], recipe[2]) if len(recipe) == 3 else recipe
    if rows not in (1, K_BLOCK) or columns != K_BLOCK:
        raise ValueError(
            f"recipe must say 1 or {K_BLOCK} rows and {K_BLOCK} columns a scale, got "
            f"{rows} and {columns}"
        )
    if sf.dtype != torch.float32:
        raise TypeError(f"sf must be torch.float32, got {sf.dtype}")
    groups = () if num_groups is None else (num_groups,)
    shape = (*groups, ceil_div(mn, rows), ceil_div(k, columns))
    if sf.shape != shape:
        raise ValueError(f"sf must be {list(shape)}, got {list(sf.shape)}")
    return get_mn_major_tma_aligned_tensor(sf) if rows == 1 else sf
