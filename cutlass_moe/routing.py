"""From each token's experts to rows sorted by expert, without a wait for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingTable:
    """Rows of the product, sorted by expert.

    index    int32 [rows]   token of each row, -1 in rows past offsets[-1]; rows = topk_ids.numel()
    offsets  int32 [E]      cumulative ends: rows [offsets[e - 1], offsets[e]) are expert e's
    inverse  int32, shaped like topk_ids: row of each (token, choice) pair, -1 where it was dropped
    """

    index: Tensor
    offsets: Tensor
    inverse: Tensor


def route(topk_ids: Tensor, num_experts: int) -> RoutingTable:
    """Sorts (token, choice) pairs by expert, stably: by token, then choice, within an expert.

    topk_ids: int32 or int64 [T, top_k], or [T] for one choice. A pair whose id lies outside
    [0, num_experts) is dropped: it takes no row. Nothing is read back to the host; works under CUDA
    graphs and torch.compile. Raises TypeError on another dtype, ValueError on another number of
    dimensions and on num_experts < 1.
    """
    _check(topk_ids, num_experts)
    experts = topk_ids.flatten()
    kept = (experts >= 0) & (experts < num_experts)
    # num_experts: a bin behind all experts. int32 sorts in half the passes of int64.
    experts, order = torch.sort(experts.where(kept, num_experts).int(), stable=True)
    bins = torch.arange(num_experts, dtype=torch.int32, device=topk_ids.device)
    offsets = torch.searchsorted(experts, bins, right=True, out_int32=True)
    kept = experts < num_experts
    choices = max(topk_ids[:1].numel(), 1)
    index = order.div(choices, rounding_mode="floor").where(kept, -1).int()
    rows = torch.arange(len(order), dtype=torch.int32, device=topk_ids.device)
    inverse = torch.empty_like(rows).scatter_(0, order, rows.where(kept, -1))
    return RoutingTable(index, offsets, inverse.view(topk_ids.shape))


def _check(topk_ids: Tensor, num_experts: int) -> None:
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_ids: expected int32 or int64, got {topk_ids.dtype}")
    if topk_ids.dim() not in (1, 2):
        raise ValueError(f"topk_ids: expected [T, top_k] or [T], got {list(topk_ids.shape)}")
    if num_experts < 1:
        raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
