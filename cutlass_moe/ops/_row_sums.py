"""Sums of rows, by the token that they were gathered from or by their expert, in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from cutlass_moe.operands import DTYPES
from cutlass_moe.ops.dispatch import launch_step, step_kernel
from cutlass_moe.ops.weight_grad import grouped_weight_grad
from cutlass_moe.runtime.parameters import gather_sum_values
from emitters.spec.layer_steps import GatherSumProblem

_MAX_ELEMENTS = 2**33  # of sums, exclusive: threads are counted in int32 and take 4 or 8 each
_THIN = 8  # the least columns of a product: 16 bytes


def sum_by_index(rows: Tensor, index: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The sum of the rows of each index: [count, N] of this dtype.

    rows [R, N]: bfloat16, float16 or float32, contiguous. index int32 [R]: rows with one outside
    [0, count) are not read. Sums are float32, in the order of rows. The host waits for nothing.
    """
    ordered, order = index.sort(stable=True)
    groups = torch.arange(count + 1, dtype=torch.int32, device=index.device)
    bounds = torch.searchsorted(ordered, groups, out_int32=True)
    out = rows.new_empty(count, rows.shape[1], dtype=dtype)
    kernel = None
    if rows.is_cuda and 0 < out.numel() < _MAX_ELEMENTS:
        problem = GatherSumProblem(DTYPES[rows.dtype], DTYPES[dtype], rows.shape[1])
        kernel = step_kernel(problem, rows.get_device())
    if kernel is None:
        kept = order[bounds[0] : bounds[-1]]
        wide = torch.zeros(count, rows.shape[1], device=rows.device)
        return out.copy_(wide.index_add_(0, index[kept].long(), rows[kept].float()))
    order = order.int()
    tensors = {"rows": rows, "order": order, "bounds": bounds, "out": out}
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    grid = problem.ctas(count, kernel.record.threads)
    launch_step(kernel, gather_sum_values(addresses, count), grid, rows.get_device())
    return out


def sum_by_expert(
    rows: Tensor,
    offsets: Tensor,
    *,
    index: Tensor | None = None,
    weights: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """The sum of each expert's rows, weighted: float32 [E, N], such as the gradient of a bias.

    rows, offsets, starts: as right of `grouped_weight_grad`; index: int32 [R], of rows that are
    gathered. weights float32 [R], default ones. It is a product with thin rows of two parts: of
    the operands' dtype, they have together twice its digits.
    """
    count = rows.shape[0] if index is None else index.shape[0]
    left = rows.new_zeros(count, _THIN)
    if weights is None:
        left[:, 0] = 1
    else:
        left[:, :2] = two_parts(weights, rows.dtype)
    sums = grouped_weight_grad(
        left, rows, offsets, right_index=index, starts=starts, out_dtype=torch.float32
    )
    return sums[:, :2].sum(1)


def two_parts(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., 2] of a 16-bit dtype whose sum is float32 values [...], but for their last digits."""
    first = values.to(dtype)
    return torch.stack([first, (values - first.float()).to(dtype)], -1)
