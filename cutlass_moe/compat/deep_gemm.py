"""DeepGEMM's grouped products in its contiguous and masked layouts.

They take the place of DeepGEMM's m_grouped_bf16_gemm_nt_contiguous and _masked. 8-bit operands have
other scales than there: one a token and one a channel, not one a block of 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cutlass_moe.ops.grouped_matmul import grouped_matmul_out

Operand = Tensor | tuple[Tensor, Tensor]


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
