"""Products of operands of every dtype in DeepGEMM's layouts of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cutlass_moe.compat.deep_gemm.utils.layout import get_mk_alignment_for_contiguous_layout
from cutlass_moe.compat.deep_gemm.utils.math import ceil_div
from cutlass_moe.operands import FLOATS
from cutlass_moe.ops.grouped_matmul import grouped_matmul_out
from emitters.spec.gemm import K_BLOCK

Operand = Tensor | tuple[Tensor, Tensor]


class RowRanges(NamedTuple):
    """The rows of each expert, both int32 [E]; none where the end is not after the start."""

    starts: Tensor
    ends: Tensor


def m_grouped_gemm_nt_contiguous(
    a: Operand,
    b: Operand,
    d: Tensor,
    m_indices: Tensor,
    use_psum_layout: bool = False,
    expected_m: int | None = None,
) -> None:
    """d[r] = a[r] @ b[m_indices[r]].T for every row r with m_indices[r] in [0, E).

    a [M, K] and b [E, N, K]: of bfloat16 or float16, where b may have N dense instead of K, or
      pairs of a tensor of float8_e4m3fn, float8_e5m2 or int8 and its float32 scale:

        one per token and channel    [M] or [M, 1]               [E, N], [E, N, 1] or [E]
        blocks, float8 alone         [M, K / 128], any strides   [E, N / 128, K / 128]

      where divisions are rounded up.
    d [M, N]: bfloat16, float16 or float32.
    m_indices int32 [M], on a's device, never read by the host. An expert's rows follow each other,
      in any order of experts and with any alignment; other values, such as -1, are padding. An
      expert whose rows don't follow each other is an error on the CPU; on a GPU some of its rows,
      or of others', are then undefined.
    use_psum_layout: m_indices is int32 [E] and holds the end of each expert's rows; the next
      expert's begin at the next multiple of `get_mk_alignment_for_contiguous_layout()`.
    expected_m: the rows an expert is expected to have; changes speed alone.

    Rows of padding in d are left untouched. What is copied: as in `cutlass_moe.grouped_matmul`.
    Not differentiable. Raises TypeError or ValueError, with what was expected and what came, for
    malformed arguments.
    """
    x, x_scale = _parts("a", a)
    weight, scale = _parts("b", b)
    if x.dim() != 2 or weight.dim() != 3:
        got = f"{list(x.shape)} and {list(weight.shape)}"
        raise ValueError(f"a must be [M, K] and b [E, N, K], got {got}")
    _expect_int32("m_indices", m_indices, x, len(weight) if use_psum_layout else len(x))
    rows = _after_gaps(m_indices) if use_psum_layout else _runs(m_indices, len(weight))
    _product(d, (x, x_scale), (weight, scale), rows, expected_m)


def m_grouped_gemm_nt_masked(
    a: Operand, b: Operand, d: Tensor, masked_m: Tensor, expected_m: int | None = None
) -> None:
    """d[e, r] = a[e, r] @ b[e].T for every expert e and its rows r < masked_m[e].

    a [E, max_m, K], contiguous, with a scale [E, max_m], [E, max_m, 1] or [E, max_m, K / 128];
      b as in `m_grouped_gemm_nt_contiguous`, and so are all dtypes. d [E, max_m, N], contiguous.
    masked_m int32 [E], on a's device, never read by the host; taken as within [0, max_m].
    expected_m: the rows an expert is expected to have; changes speed alone.

    Other rows of d are left untouched. A scale [E, max_m, K / 128] whose rows do not lie at one
    stride, as after `get_mn_major_tma_aligned_tensor`, is copied in each call. Not differentiable.
    Raises TypeError or ValueError, with what was expected and what came, for malformed arguments.
    """
    x, x_scale = _parts("a", a)
    weight, scale = _parts("b", b)
    if x.dim() != 3 or weight.dim() != 3 or len(x) != len(weight):
        got = f"{list(x.shape)} and {list(weight.shape)}"
        raise ValueError(f"a must be [E, max_m, K] and b [E, N, K], got {got}")
    experts, most, _ = x.shape
    _expect_int32("masked_m", masked_m, x, experts)
    for name, tensor, shape in (("a", x, x.shape), ("d", d, (experts, most, weight.shape[1]))):
        if tensor.shape != shape or not tensor.is_contiguous():
            got = f"{list(tensor.shape)} with strides {tensor.stride()}"
            raise ValueError(f"{name} must be a contiguous {list(shape)}, got {got}")
    starts = torch.arange(experts, dtype=torch.int32, device=x.device) * most
    rows = RowRanges(starts, starts + masked_m.clamp(0, most))
    _product(d, (x, x_scale), (weight, scale), rows, expected_m)


def gemm_nt(a: Operand, b: Operand, d: Tensor) -> None:
    """d = a @ b.T for a [M, K] and b [N, K].

    Scales of a, dtypes and errors are as in `m_grouped_gemm_nt_contiguous`; those of b are as
    there, of one expert and without [E].
    """
    x, x_scale = _parts("a", a)
    weight, scale = _parts("b", b)
    if x.dim() != 2 or weight.dim() != 2:
        got = f"{list(x.shape)} and {list(weight.shape)}"
        raise ValueError(f"a must be [M, K] and b [N, K], got {got}")
    starts = torch.zeros(1, dtype=torch.int32, device=x.device)
    one_expert = weight[None], None if scale is None else scale[None]
    _product(d, (x, x_scale), one_expert, RowRanges(starts, starts + len(x)), None)


def _product(
    d: Tensor,
    a: tuple[Tensor, Tensor | None],
    b: tuple[Tensor, Tensor | None],
    rows: RowRanges,
    expected_m: int | None,
) -> None:
    (x, x_scale), (weight, scale) = a, b
    if x_scale is not None and scale is not None:
        _expect_scales(x, x_scale, weight, scale)
        columns = x_scale.shape[-1] if x_scale.dim() == x.dim() else 1
        x_scale = x_scale.reshape(x.shape[:-1].numel(), columns)
    grouped_matmul_out(
        d.view(-1, d.shape[-1]) if x.dim() == 3 else d,
        x.view(-1, x.shape[-1]) if x.dim() == 3 else x,
        weight,
        offsets=rows.ends,
        starts=rows.starts,
        per_token_scale=x_scale,
        scale=scale,
        expected_rows=None if expected_m is None else max(expected_m, 1),
    )


# Rows of experts


def _runs(m_indices: Tensor, experts: int) -> RowRanges:
    """The rows of experts whose number stands beside each of them."""
    rows, device = len(m_indices), m_indices.device
    # what is no expert, negative numbers too, goes to a bin behind all experts
    expert = m_indices.long().bitwise_and_(2**32 - 1).clamp_(max=experts)
    row = torch.arange(rows, dtype=torch.int32, device=device)
    bins = torch.full((experts + 1,), rows, dtype=torch.int32, device=device)
    starts = bins.scatter_reduce_(0, expert, row, "amin")[:-1]
    # starts and counts: where an expert's rows are apart, its range is still no longer than they
    counts = torch.zeros_like(bins).scatter_add_(0, expert, torch.ones_like(row))[:-1]
    ends = starts + counts
    if device.type == "cpu":
        lasts = torch.zeros_like(bins).scatter_reduce(0, expert, row + 1, "amax")[:-1]
        apart = ((counts > 0) & (lasts != ends)).nonzero().flatten().tolist()
        if apart:
            raise ValueError(
                f"each expert's rows must follow each other in m_indices, got experts {apart} "
                "with other rows in between"
            )
    return RowRanges(starts, ends)


def _after_gaps(ends: Tensor) -> RowRanges:
    """The rows of experts that each begin at the next multiple of the alignment."""
    alignment = get_mk_alignment_for_contiguous_layout()
    starts = (ends[:-1] + (alignment - 1)) // alignment * alignment
    return RowRanges(functional.pad(starts, (1, 0)), ends)


# Checks


def _parts(name: str, operand: Operand) -> tuple[Tensor, Tensor | None]:
    """The tensor and its scale."""
    values, scale = (operand, None) if isinstance(operand, Tensor) else operand
    if (scale is None) == (values.dtype.itemsize == 1):
        alone, paired = "a tensor alone", "a pair of a tensor and its scale"
        expected, got = (paired, alone) if scale is None else (alone, paired)
        raise TypeError(f"{name} must be {expected} for {values.dtype}, got {got}")
    return values, scale


def _expect_scales(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor) -> None:
    """Both must be of blocks, or one per token and one per channel or expert."""
    tokens, (experts, n, k) = tuple(x.shape[:-1]), weight.shape
    groups = ceil_div(k, K_BLOCK)
    of_x, of_weight = (*tokens, groups), (experts, ceil_div(n, K_BLOCK), groups)
    _expect_scale("a", x_scale, [tokens, (*tokens, 1), of_x])
    _expect_scale("b", scale, [(experts, n), (experts, n, 1), (experts,), of_weight])
    if groups > 1 and (x_scale.shape == of_x) != (scale.shape == of_weight):
        raise ValueError(
            "a and b must both have scales of blocks or neither, got "
            f"{list(x_scale.shape)} and {list(scale.shape)}"
        )


def _expect_scale(name: str, scale: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if scale.dtype not in FLOATS:
        raise TypeError(f"{name}'s scale must be torch.float32, got {scale.dtype}")
    if tuple(scale.shape) not in shapes:
        expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name}'s scale must be {expected}, got {list(scale.shape)}")


def _expect_int32(name: str, tensor: Tensor, x: Tensor, length: int) -> None:
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must be torch.int32, got {tensor.dtype}")
    if tensor.shape != (length,):
        raise ValueError(f"{name} must be [{length}], got {list(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device}, got one on {tensor.device}")
