"""Stands in for DeepGEMM (github.com/deepseek-ai/DeepGEMM): its grouped products on Hopper.

The names and arguments are those of versions 2.6 to 2.8.1, which vLLM 0.33 packs. Operands of fp8
have float32 scales of blocks: 1 x 128 of a, 128 x 128 of b; scales per token and channel are taken
too. Rows of padding are never written. `m_grouped_gemm_*` and `gemm_nt` are our own names for
operands of every dtype. `cutlass_moe.compat.install` makes `import deep_gemm` find this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from cutlass_moe.compat.deep_gemm import utils
from cutlass_moe.compat.deep_gemm.grouped import (
    gemm_nt,
    m_grouped_gemm_nt_contiguous,
    m_grouped_gemm_nt_masked,
)
from cutlass_moe.compat.deep_gemm.utils.layout import (
    get_col_major_tma_aligned_tensor,
    get_k_alignment_for_contiguous_layout,
    get_m_alignment_for_contiguous_layout,
    get_mk_alignment_for_contiguous_layout,
    get_mn_major_tma_aligned_tensor,
    get_theoretical_mk_alignment_for_contiguous_layout,
    get_tma_aligned_size,
    set_mk_alignment_for_contiguous_layout,
    transform_sf_into_required_layout,
)
from cutlass_moe.compat.deep_gemm.utils.math import (
    align,
    ceil_div,
    per_block_cast_to_fp8,
    per_token_cast_to_fp8,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "align",
    "bf16_m_grouped_gemm_nt_masked",
    "ceil_div",
    "fp8_fp4_gemm_nt",
    "fp8_gemm_nt",
    "fp8_m_grouped_gemm_nt_masked",
    "gemm_fp8_fp8_bf16_nt",
    "gemm_nt",
    "get_col_major_tma_aligned_tensor",
    "get_k_alignment_for_contiguous_layout",
    "get_m_alignment_for_contiguous_layout",
    "get_mk_alignment_for_contiguous_layout",
    "get_mn_major_tma_aligned_tensor",
    "get_theoretical_mk_alignment_for_contiguous_layout",
    "get_tma_aligned_size",
    "m_grouped_bf16_gemm_nn_contiguous",
    "m_grouped_bf16_gemm_nt_contiguous",
    "m_grouped_bf16_gemm_nt_masked",
    "m_grouped_fp8_fp4_gemm_nn_contiguous",
    "m_grouped_fp8_fp4_gemm_nt_contiguous",
    "m_grouped_fp8_fp4_gemm_nt_masked",
    "m_grouped_fp8_gemm_nn_contiguous",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous",
    "m_grouped_gemm_fp8_fp8_bf16_nt_masked",
    "m_grouped_gemm_nt_contiguous",
    "m_grouped_gemm_nt_masked",
    "per_block_cast_to_fp8",
    "per_token_cast_to_fp8",
    "set_mk_alignment_for_contiguous_layout",
    "transform_sf_into_required_layout",
    "utils",
]

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_Pair = tuple[Tensor, Tensor]
_Recipe = tuple[int, int, int] | None  # rows of a, rows of b and columns that share a scale
_RecipeOfOne = tuple[int, int] | None  # the same of one operand


class DeepGemmOptions(TypedDict, total=False):
    """What DeepGEMM's functions take besides. epilogue must be None, the others change nothing."""

    compiled_dims: str
    disable_ue8m0_cast: bool
    epilogue: None


class DenseOptions(DeepGemmOptions, total=False):
    """What `fp8_gemm_nt` takes besides. alpha must be None."""

    alpha: None


class ContiguousOptions(DeepGemmOptions, total=False):
    """What the products of the contiguous layout take besides.

    use_psum_layout, expected_m_for_psum_layout: use_psum_layout and expected_m of
    `m_grouped_gemm_nt_contiguous`. ensure_zero_padding changes nothing on Hopper.
    """

    use_psum_layout: bool
    ensure_zero_padding: bool
    expected_m_for_psum_layout: int | None


def m_grouped_bf16_gemm_nt_contiguous(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    grouped_layout: Tensor,
    **options: Unpack[ContiguousOptions],
) -> None:
    """`m_grouped_gemm_nt_contiguous` of bfloat16: a [M, K], b [E, N, K], grouped_layout [M], or [E]
    with use_psum_layout."""
    _expect_bf16(a=a, b=b)
    _contiguous(a, b, d, grouped_layout, options)


def m_grouped_bf16_gemm_nn_contiguous(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    grouped_layout: Tensor,
    **options: Unpack[ContiguousOptions],
) -> None:
    """As `m_grouped_bf16_gemm_nt_contiguous`, of b [E, K, N]."""
    _expect_bf16(a=a, b=b)
    m_grouped_bf16_gemm_nt_contiguous(a, _transposed("b", b), d, grouped_layout, **options)


def m_grouped_bf16_gemm_nt_masked(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    masked_m: Tensor,
    expected_m: int,
    compiled_dims: str = "nk",
    epilogue: None = None,
) -> None:
    """`m_grouped_gemm_nt_masked` of bfloat16: a [E, max_m, K], b [E, N, K], masked_m [E].

    compiled_dims changes nothing here, epilogue must be None.
    """
    _check_options({"epilogue": epilogue}, DeepGemmOptions)
    _expect_bf16(a=a, b=b)
    m_grouped_gemm_nt_masked(a, b, d, masked_m, expected_m)


def m_grouped_fp8_gemm_nt_contiguous(
    a: _Pair,
    b: _Pair,
    d: Tensor,
    grouped_layout: Tensor,
    recipe: _Recipe = None,
    recipe_a: _RecipeOfOne = None,
    recipe_b: _RecipeOfOne = None,
    **options: Unpack[ContiguousOptions],
) -> None:
    """`m_grouped_gemm_nt_contiguous` of fp8: a [M, K] with a scale [M, K / 128] and b [E, N, K]
    with a scale [E, N / 128, K / 128], rounded up; or with scales [M, 1] and [E, N, 1].
    grouped_layout [M], or [E] with use_psum_layout.

    recipe: how many rows of a, rows of b and columns share a scale, such as (1, 128, 128);
    recipe_a and recipe_b: the same of one operand. The shapes of the scales say it too, so each may
    be absent.

    Raises ValueError for scales of other shapes or than recipes say, and TypeError for scales that
    are not float32 (those packed in int32 are Blackwell's) and for int8, DeepGEMM's packed fp4.
    """
    _expect_fp8(a=a, b=b)
    _expect_recipes(a, b, recipe, recipe_a, recipe_b)
    _contiguous(a, b, d, grouped_layout, options)


def m_grouped_fp8_gemm_nn_contiguous(
    a: _Pair,
    b: _Pair,
    d: Tensor,
    grouped_layout: Tensor,
    recipe: _Recipe = None,
    recipe_a: _RecipeOfOne = None,
    recipe_b: _RecipeOfOne = None,
    **options: Unpack[ContiguousOptions],
) -> None:
    """As `m_grouped_fp8_gemm_nt_contiguous`, of b [E, K, N], K dense, with a scale
    [E, K / 128, N / 128] or [E, 1, N]. The scale of blocks is copied."""
    _expect_fp8(a=a, b=b)
    turned = _transposed("b", b[0]), _transposed("b", b[1])
    m_grouped_fp8_gemm_nt_contiguous(
        a, turned, d, grouped_layout, recipe, recipe_a, recipe_b, **options
    )


def m_grouped_fp8_gemm_nt_masked(
    a: _Pair,
    b: _Pair,
    d: Tensor,
    masked_m: Tensor,
    expected_m: int,
    recipe: _Recipe = None,
    recipe_a: _RecipeOfOne = None,
    recipe_b: _RecipeOfOne = None,
    **options: Unpack[DeepGemmOptions],
) -> None:
    """`m_grouped_gemm_nt_masked` of fp8: a [E, max_m, K] with a scale [E, max_m, K / 128] or
    [E, max_m, 1], b as in `m_grouped_fp8_gemm_nt_contiguous`, masked_m [E].

    Other arguments and errors: as there.
    """
    _check_options(options, DeepGemmOptions)
    _expect_fp8(a=a, b=b)
    _expect_recipes(a, b, recipe, recipe_a, recipe_b)
    m_grouped_gemm_nt_masked(a, b, d, masked_m, expected_m)


def fp8_gemm_nt(
    a: _Pair,
    b: _Pair,
    d: Tensor,
    c: None = None,
    recipe: _Recipe = None,
    recipe_a: _RecipeOfOne = None,
    recipe_b: _RecipeOfOne = None,
    **options: Unpack[DenseOptions],
) -> None:
    """d = a @ b.T of fp8: a [M, K] with a scale [M, K / 128] and b [N, K] with a scale
    [N / 128, K / 128], rounded up; or with scales [M, 1] and [N, 1]. d [M, N].

    c, which DeepGEMM adds, must be None. Other arguments and errors: as in
    `m_grouped_fp8_gemm_nt_contiguous`.
    """
    _check_options(options, DenseOptions)
    if c is not None:
        raise ValueError(f"c must be None (nothing is added to a product), got {type(c).__name__}")
    _expect_fp8(a=a, b=b)
    _expect_recipes(a, b, recipe, recipe_a, recipe_b)
    gemm_nt(a, b, d)


# Further names of DeepGEMM for the same: with fp4, which is not taken, and of earlier versions.
m_grouped_fp8_fp4_gemm_nt_contiguous = m_grouped_fp8_gemm_nt_contiguous
m_grouped_fp8_fp4_gemm_nn_contiguous = m_grouped_fp8_gemm_nn_contiguous
m_grouped_fp8_fp4_gemm_nt_masked = m_grouped_fp8_gemm_nt_masked
fp8_fp4_gemm_nt = fp8_gemm_nt
fp8_m_grouped_gemm_nt_masked = m_grouped_fp8_gemm_nt_masked
bf16_m_grouped_gemm_nt_masked = m_grouped_bf16_gemm_nt_masked
m_grouped_gemm_fp8_fp8_bf16_nt_contiguous = m_grouped_fp8_gemm_nt_contiguous
m_grouped_gemm_fp8_fp8_bf16_nt_masked = m_grouped_fp8_gemm_nt_masked
gemm_fp8_fp8_bf16_nt = fp8_gemm_nt


def _contiguous(
    a: Tensor | _Pair,
    b: Tensor | _Pair,
    d: Tensor,
    grouped_layout: Tensor,
    options: ContiguousOptions,
) -> None:
    _check_options(options, ContiguousOptions)
    psum = options.get("use_psum_layout", False)
    expected_m = options.get("expected_m_for_psum_layout")
    if expected_m is not None and not psum:
        raise ValueError(
            f"expected_m_for_psum_layout must be None without use_psum_layout, got {expected_m}"
        )
    m_grouped_gemm_nt_contiguous(a, b, d, grouped_layout, psum, expected_m)


def _check_options(options: DeepGemmOptions, known: type[DeepGemmOptions]) -> None:
    unknown = options.keys() - known.__annotations__.keys()
    if unknown:
        names = ", ".join(known.__annotations__)
        raise TypeError(f"an argument by name must be one of {names}, got {min(unknown)!r}")
    for name in ("alpha", "epilogue"):
        if options.get(name) is not None:
            raise ValueError(f"{name} must be None, got {options.get(name)!r}")


def _expect_bf16(**operands: Tensor) -> None:
    for name, operand in operands.items():
        got = getattr(operand, "dtype", type(operand).__name__)
        if got != torch.bfloat16:
            raise TypeError(f"{name} must be a torch.bfloat16 tensor, got {got}")


def _expect_fp8(**operands: _Pair) -> None:
    for name, operand in operands.items():
        if not isinstance(operand, (tuple, list)) or len(operand) != 2:
            got = type(operand).__name__
            raise TypeError(f"{name} must be a pair of an fp8 tensor and its scale, got {got}")
        if operand[0].dtype not in _FP8:
            expected = " or ".join(map(str, _FP8))
            raise TypeError(f"{name} must be of {expected}, got {operand[0].dtype}")


def _expect_recipes(
    a: _Pair, b: _Pair, recipe: _Recipe, recipe_a: _RecipeOfOne, recipe_b: _RecipeOfOne
) -> None:
    """The scales must have the shapes that recipes say, where there are any."""
    of_both = (None, None) if recipe is None else (recipe[::2], recipe[1:])
    for name, pair, given in (
        ("recipe", a, of_both[0]),
        ("recipe", b, of_both[1]),
        ("recipe_a", a, recipe_a),
        ("recipe_b", b, recipe_b),
    ):
        if given is None:
            continue
        values, scale = pair
        *experts, rows, columns = values.shape
        expected = [*experts, ceil_div(rows, given[0]), ceil_div(columns, given[1])]
        got = [*scale.shape, *[1] * (values.dim() - scale.dim())]
        if got != expected:
            raise ValueError(
                f"{name} must be as the scales are: {given[0]} rows and {given[1]} columns a scale "
                f"are a scale {expected} of {list(values.shape)}, got {list(scale.shape)}"
            )


def _transposed(name: str, tensor: Tensor) -> Tensor:
    if tensor.dim() != 3:
        raise ValueError(f"{name} and its scale must have three dimensions, got {tensor.dim()}")
    return tensor.transpose(1, 2)
