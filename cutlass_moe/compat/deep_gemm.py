"""DeepGEMM's grouped products in its contiguous and masked layouts, by its names and by ours.

`m_grouped_bf16_gemm_*` and `m_grouped_fp8_gemm_*` have the arguments of DeepGEMM 2.6
(github.com/deepseek-ai/DeepGEMM, csrc/apis/gemm.hpp). 8-bit operands have other scales than there:
one a token and one a channel; scales of blocks of 128 raise ValueError. `m_grouped_gemm_*` take
more dtypes. `cutlass_moe.compat.install` makes `import deep_gemm` find this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from cutlass_moe.ops.grouped_matmul import grouped_matmul_out

if TYPE_CHECKING:
    from typing_extensions import Unpack

Operand = Tensor | tuple[Tensor, Tensor]


class DeepGemmOptions(TypedDict, total=False):
    """What DeepGEMM's functions take by name besides. Only those of its psum layout, which is not
    supported, would change a result on Hopper."""

    compiled_dims: str
    disable_ue8m0_cast: bool
    use_psum_layout: bool
    ensure_zero_padding: bool
    expected_m_for_psum_layout: int | None


_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_ALIGNMENT = 128


def m_grouped_gemm_nt_contiguous(a: Operand, b: Operand, d: Tensor, m_indices: Tensor) -> None:
    """d[r] = a[r] @ b[m_indices[r]].T for every row r with m_indices[r] in [0, E).

    a [M, K] and b [E, N, K]: of bfloat16 or float16, where b may have N dense instead of K, or
      pairs of a tensor of float8_e4m3fn, float8_e5m2 or int8 and its float32 scale: [M] or [M, 1]
      for a, [E, N], [E, N, 1] or [E] for b.
    d [M, N], contiguous: bfloat16, float16 or float32.
    m_indices int32 [M], on a's device, never read by the host. An expert's rows follow each other,
      in any order of experts and with any alignment; other values, such as -1, are padding. An
      expert whose rows don't follow each other is an error on the CPU, undefined on a GPU.

    No operand is copied, rows of padding in d are left untouched. Not differentiable. Raises
    TypeError or ValueError, with what was expected and what came, for malformed arguments.
    """
    x, x_scale = _parts("a", a)
    weight, scale = _parts("b", b)
    if x.dim() != 2 or weight.dim() != 3:
        got = f"{list(x.shape)} and {list(weight.shape)}"
        raise ValueError(f"a must be [M, K] and b [E, N, K], got {got}")
    _expect_int32("m_indices", m_indices, x, len(x))
    _expect_scale("a", x_scale, [(len(x),), (len(x), 1)])
    starts, ends = _runs(m_indices, len(weight))
    _product(d, x, x_scale, weight, scale, starts, ends, None)


def m_grouped_gemm_nt_masked(
    a: Operand, b: Operand, d: Tensor, masked_m: Tensor, expected_m: int | None = None
) -> None:
    """d[e, r] = a[e, r] @ b[e].T for every expert e and its rows r < masked_m[e].

    a [E, max_m, K], contiguous, with a scale [E, max_m] or [E, max_m, 1]; b as in
      `m_grouped_gemm_nt_contiguous`, and so are all dtypes. d [E, max_m, N], contiguous.
    masked_m int32 [E], on a's device, never read by the host; taken as within [0, max_m].
    expected_m: the rows an expert is expected to have; changes speed alone.

    No operand is copied, other rows of d are left untouched. Not differentiable. Raises TypeError
    or ValueError, with what was expected and what came, for malformed arguments.
    """
    x, x_scale = _parts("a", a)
    weight, scale = _parts("b", b)
    if x.dim() != 3 or weight.dim() != 3 or len(x) != len(weight):
        got = f"{list(x.shape)} and {list(weight.shape)}"
        raise ValueError(f"a must be [E, max_m, K] and b [E, N, K], got {got}")
    experts, most, k = x.shape
    n = weight.shape[1]
    _expect_int32("masked_m", masked_m, x, experts)
    _expect_scale("a", x_scale, [(experts, most), (experts, most, 1)])
    for name, tensor, shape in (("a", x, x.shape), ("d", d, (experts, most, n))):
        if tensor.shape != shape or not tensor.is_contiguous():
            got = f"{list(tensor.shape)} with strides {tensor.stride()}"
            raise ValueError(f"{name} must be a contiguous {list(shape)}, got {got}")
    starts = torch.arange(experts, dtype=torch.int32, device=x.device) * most
    ends = starts + masked_m.clamp(0, most)
    flat_scale = None if x_scale is None else x_scale.reshape(-1)
    _product(
        d.view(-1, n), x.view(-1, k), flat_scale, weight, scale, starts, ends,
        None if expected_m is None else max(expected_m, 1),
    )  # fmt: skip


def m_grouped_bf16_gemm_nt_contiguous(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    grouped_layout: Tensor,
    **options: Unpack[DeepGemmOptions],
) -> None:
    """`m_grouped_gemm_nt_contiguous` of bfloat16: a [M, K], b [E, N, K], grouped_layout [M].

    options change nothing here: rows of padding stay as they are. Raises
    ValueError for use_psum_layout, whose grouped_layout holds ends of groups.
    """
    _check_options(options)
    _expect_bf16(a=a, b=b)
    m_grouped_gemm_nt_contiguous(a, b, d, grouped_layout)


def m_grouped_bf16_gemm_nn_contiguous(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    grouped_layout: Tensor,
    **options: Unpack[DeepGemmOptions],
) -> None:
    """As `m_grouped_bf16_gemm_nt_contiguous`, of b [E, K, N]."""
    _expect_bf16(a=a, b=b)
    m_grouped_bf16_gemm_nt_contiguous(a, _transposed("b", b), d, grouped_layout, **options)


def m_grouped_bf16_gemm_nt_masked(
    a: Tensor, b: Tensor, d: Tensor, masked_m: Tensor, expected_m: int, compiled_dims: str = "nk"
) -> None:
    """`m_grouped_gemm_nt_masked` of bfloat16: a [E, max_m, K], b [E, N, K], masked_m [E].

    compiled_dims changes nothing here.
    """
    _expect_bf16(a=a, b=b)
    m_grouped_gemm_nt_masked(a, b, d, masked_m, expected_m)


def m_grouped_fp8_gemm_nt_contiguous(
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    d: Tensor,
    grouped_layout: Tensor,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    **options: Unpack[DeepGemmOptions],
) -> None:
    """`m_grouped_gemm_nt_contiguous` of fp8: a [M, K] with a scale [M, 1], b [E, N, K] with a scale
    [E, N, 1], grouped_layout [M].

    recipes: how many rows and columns share a scale, as DeepGEMM writes it: must be absent, or say
      one row and at least K columns. options change nothing here: scales are float32, rows of
      padding stay as they are.

    Raises ValueError for scales or recipes of blocks and for use_psum_layout, and TypeError for
    int8, which for DeepGEMM is packed fp4.
    """
    _check_options(options)
    _expect_fp8(a=a, b=b)
    _refuse_blocks(a[0].shape[-1], recipe, recipe_a, recipe_b)
    m_grouped_gemm_nt_contiguous(a, b, d, grouped_layout)


def m_grouped_fp8_gemm_nn_contiguous(
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    d: Tensor,
    grouped_layout: Tensor,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    **options: Unpack[DeepGemmOptions],
) -> None:
    """As `m_grouped_fp8_gemm_nt_contiguous`, of b [E, K, N], K dense, with a scale [E, 1, N]."""
    _expect_fp8(a=a, b=b)
    turned = _transposed("b", b[0]), _transposed("b", b[1])
    m_grouped_fp8_gemm_nt_contiguous(
        a, turned, d, grouped_layout, recipe, recipe_a, recipe_b, **options
    )


def m_grouped_fp8_gemm_nt_masked(
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    d: Tensor,
    masked_m: Tensor,
    expected_m: int,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    **options: Unpack[DeepGemmOptions],
) -> None:
    """`m_grouped_gemm_nt_masked` of fp8: a [E, max_m, K] with a scale [E, max_m, 1], b [E, N, K]
    with a scale [E, N, 1], masked_m [E].

    Other arguments and errors: as in `m_grouped_fp8_gemm_nt_contiguous`.
    """
    _check_options(options)
    _expect_fp8(a=a, b=b)
    _refuse_blocks(a[0].shape[-1], recipe, recipe_a, recipe_b)
    m_grouped_gemm_nt_masked(a, b, d, masked_m, expected_m)


# Names that DeepGEMM keeps for what was called otherwise.
m_grouped_fp8_fp4_gemm_nt_contiguous = m_grouped_fp8_gemm_nt_contiguous
m_grouped_fp8_fp4_gemm_nn_contiguous = m_grouped_fp8_gemm_nn_contiguous
m_grouped_fp8_fp4_gemm_nt_masked = m_grouped_fp8_gemm_nt_masked
fp8_m_grouped_gemm_nt_masked = m_grouped_fp8_gemm_nt_masked
bf16_m_grouped_gemm_nt_masked = m_grouped_bf16_gemm_nt_masked


def get_mk_alignment_for_contiguous_layout() -> int:
    """DeepGEMM's 128, to which its callers pad each expert's rows; here any padding, or none, will
    do."""
    return _ALIGNMENT


get_m_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout


def _product(
    d: Tensor,
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    starts: Tensor,
    ends: Tensor,
    expected_rows: int | None,
) -> None:
    experts, n, _ = weight.shape
    _expect_scale("b", scale, [(experts, n), (experts, n, 1), (experts,)])
    grouped_matmul_out(
        d,
        x,
        weight,
        offsets=ends,
        starts=starts,
        per_token_scale=x_scale,
        scale=scale,
        expected_rows=expected_rows,
    )


def _runs(m_indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """First rows and ends, int32 [E], of the experts' rows; both 0 where there are none."""
    row = torch.arange(len(m_indices), dtype=torch.int32, device=m_indices.device)
    valid = (m_indices >= 0) & (m_indices < experts)
    expert = m_indices.where(valid, experts).long()  # a bin behind all experts
    bins = torch.zeros(experts + 1, dtype=torch.int32, device=m_indices.device)
    ends = bins.scatter_reduce(0, expert, row + 1, "amax")[:-1]
    starts = (bins + len(row)).scatter_reduce(0, expert, row, "amin")[:-1].minimum(ends)
    if m_indices.device.type == "cpu":
        counts = expert.bincount(minlength=experts + 1)[:-1]
        split = (counts != ends - starts).nonzero().flatten().tolist()
        if split:
            raise ValueError(
                f"each expert's rows must follow each other in m_indices, got experts {split} "
                "with other rows in between"
            )
    return starts, ends


def _parts(name: str, operand: Operand) -> tuple[Tensor, Tensor | None]:
    """The tensor and its scale."""
    values, scale = (operand, None) if isinstance(operand, Tensor) else operand
    if (scale is None) == (values.dtype.itemsize == 1):
        alone, paired = "a tensor alone", "a pair of a tensor and its scale"
        expected, got = (paired, alone) if scale is None else (alone, paired)
        raise TypeError(f"{name} must be {expected} for {values.dtype}, got {got}")
    return values, scale


def _expect_scale(name: str, scale: Tensor | None, shapes: list[tuple[int, ...]]) -> None:
    if scale is not None and tuple(scale.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(
            f"{name}'s scale must be {expected} (one a token, one a channel; DeepGEMM's block "
            f"scales are not supported), got {list(scale.shape)}"
        )


def _expect_int32(name: str, tensor: Tensor, x: Tensor, length: int) -> None:
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must be torch.int32, got {tensor.dtype}")
    if tensor.shape != (length,):
        raise ValueError(f"{name} must be [{length}], got {list(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device}, got one on {tensor.device}")


def _expect_bf16(**operands: Tensor) -> None:
    for name, operand in operands.items():
        got = getattr(operand, "dtype", type(operand).__name__)
        if got != torch.bfloat16:
            raise TypeError(f"{name} must be a torch.bfloat16 tensor, got {got}")


def _expect_fp8(**operands: tuple[Tensor, Tensor]) -> None:
    for name, operand in operands.items():
        if not isinstance(operand, (tuple, list)) or len(operand) != 2:
            got = type(operand).__name__
            raise TypeError(f"{name} must be a pair of an fp8 tensor and its scale, got {got}")
        if operand[0].dtype not in _FP8:
            expected = " or ".join(map(str, _FP8))
            raise TypeError(f"{name} must be of {expected}, got {operand[0].dtype}")


def _transposed(name: str, tensor: Tensor) -> Tensor:
    if tensor.dim() != 3:
        raise ValueError(f"{name} and its scale must have three dimensions, got {tensor.dim()}")
    return tensor.transpose(1, 2)


def _check_options(options: DeepGemmOptions) -> None:
    unknown = options.keys() - DeepGemmOptions.__annotations__.keys()
    if unknown:
        known = ", ".join(DeepGemmOptions.__annotations__)
        raise TypeError(f"an argument by name must be one of {known}, got {min(unknown)!r}")
    psum = options.get("use_psum_layout"), options.get("expected_m_for_psum_layout")
    if psum[0] or psum[1] is not None:
        raise ValueError(
            "grouped_layout must hold the expert of each row: use_psum_layout, where it holds ends "
            f"of groups, is not supported, got {psum[0]} and expected_m_for_psum_layout {psum[1]}"
        )


def _refuse_blocks(
    k: int,
    recipe: tuple[int, int, int] | None,
    recipe_a: tuple[int, int] | None,
    recipe_b: tuple[int, int] | None,
) -> None:
    """recipe: rows of a, rows of b and columns that share a scale; the others of one operand."""
    for name, given in (("recipe", recipe), ("recipe_a", recipe_a), ("recipe_b", recipe_b)):
        if given is not None and (any(rows != 1 for rows in given[:-1]) or given[-1] < k):
            raise ValueError(
                f"{name} must say one scale a token and a channel (rows 1, columns at least "
                f"{k}; DeepGEMM's block scales are not supported), got {tuple(given)}"
            )
