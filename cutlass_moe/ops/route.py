"""route: sorts (token, choice) pairs by expert, on the device; the host waits for nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cutlass_moe.choose.heuristics_sm90 import FEW_PAIRS
from cutlass_moe.operands import IDS
from cutlass_moe.ops._define import define
from cutlass_moe.ops._types import check_types, typed
from cutlass_moe.ops.dispatch import launch_step, step_kernel
from cutlass_moe.runtime.kernel import Kernel
from cutlass_moe.runtime.parameters import route_values
from emitters.spec.layer_steps import RouteProblem

_MAX_PAIRS = 1 << 28  # 128 CTAs, each of which ranks its pairs in 21 bits
# Measured on an H200.
_ONE_CTA_PAIRS = 1536  # up to this many pairs one launch is faster than two
_CTA_PAIRS, _MOST_CTAS = 1024, 128  # with two launches: least pairs per CTA, most CTAs


@dataclass(frozen=True)
class RoutingTable:
    """The rows of the product, sorted by expert, and the way back to tokens.

    index    int32 [rows]      the token of each row, -1 in rows past offsets[-1]; there are
                               rows = topk_ids.numel()
    offsets  int32 [E]         cumulative ends: expert e has rows offsets[e - 1] to offsets[e] - 1
    inverse  int32 [T, top_k]  the row of each (token, choice) pair, -1 if it was dropped; has the
                               shape of topk_ids
    """

    index: Tensor
    offsets: Tensor
    inverse: Tensor

    @staticmethod
    def empty(topk_ids: Tensor, num_experts: int) -> RoutingTable:
        """A table with the right shapes for these ids; its values are uninitialised."""
        index, inverse = (topk_ids.new_empty(s, dtype=torch.int32) for s in _shapes(topk_ids))
        offsets = topk_ids.new_empty(num_experts, dtype=torch.int32)
        return RoutingTable(index, offsets, inverse)


def route(
    topk_ids: Tensor,
    num_experts: int,
    *,
    expert_map: Tensor | None = None,
    capacity_factor: float | None = None,
    pdl: bool = True,
) -> RoutingTable:
    """Sorts (token, choice) pairs by expert; an expert's pairs stay in order of token and choice.

    topk_ids int32 or int64 [T, top_k], or [T] for one choice: the experts of each token. A pair
      with an id outside [0, num_experts) is dropped: it gets no row.
    num_experts: the experts of this process, E.
    expert_map int32 [global experts]: for topk_ids that are global ids, the local id of each in
      [0, E), or -1 if the expert is elsewhere. Pairs with -1 or an id outside the map are dropped.
    capacity_factor: limits the rows of an expert to ceil(topk_ids.numel() / experts *
      capacity_factor), where experts is the length of expert_map, or else num_experts. The last
      pairs of a full expert are dropped.
    pdl: lets each kernel start before its predecessor ends (programmatic dependent launch); it
      waits for the predecessor before it reads anything.

    Returns a `RoutingTable` on the device of topk_ids. The host reads nothing back, so CUDA graphs
    and torch.compile work. Raises TypeError for a dtype, and ValueError for a shape, a device,
    num_experts < 1 and a negative or infinite capacity_factor.
    """
    try:
        if type(pdl) is not bool:  # torch would take anything for a bool
            check_types(route, locals())
        _check(topk_ids, num_experts, expert_map, capacity_factor)
        return RoutingTable(*_route_op(topk_ids, num_experts, expert_map, capacity_factor, pdl))
    except Exception:
        check_types(route, locals())
        raise


@typed
def route_reference(
    topk_ids: Tensor,
    num_experts: int,
    *,
    expert_map: Tensor | None = None,
    capacity_factor: float | None = None,
) -> RoutingTable:
    """`route` in plain PyTorch; takes the same arguments and gives the same table."""
    _check(topk_ids, num_experts, expert_map, capacity_factor)
    experts = local_experts(topk_ids.flatten(), expert_map)
    kept = (experts >= 0) & (experts < num_experts)
    # Dropped pairs get id num_experts, a bin behind all experts. int32 sorts in half the passes of
    # int64.
    bins = torch.arange(num_experts, dtype=torch.int32, device=topk_ids.device)
    rows = torch.arange(experts.numel(), dtype=torch.int32, device=topk_ids.device)
    experts, order = torch.sort(experts.where(kept, num_experts).int(), stable=True)
    ends = torch.searchsorted(experts, bins, right=True, out_int32=True)
    capacity = row_capacity(topk_ids, _num_ids(num_experts, expert_map), capacity_factor)
    if capacity < topk_ids.numel():
        starts = torch.nn.functional.pad(ends, (1, 0))[experts.long()]
        experts = experts.where(rows - starts < capacity, num_experts)
        experts, again = torch.sort(experts, stable=True)
        order = order[again]
        ends = torch.searchsorted(experts, bins, right=True, out_int32=True)
    kept = experts < num_experts
    choices = max(topk_ids[:1].numel(), 1)
    index = order.div(choices, rounding_mode="floor").where(kept, -1).int()
    inverse = torch.empty_like(rows).scatter_(0, order, rows.where(kept, -1))
    return RoutingTable(index, ends, inverse.view(topk_ids.shape))


@typed
def renormalize_kept(topk_weights: Tensor, inverse: Tensor) -> Tensor:
    """Raises the weights of a token's kept pairs so that they make up for its dropped pairs.

    topk_weights [T, k]: floating point. inverse [T, k]: from a `RoutingTable` of all experts; one
    of a single rank's experts will not do, because it drops the pairs of other ranks too.

    Returns weights [T, k] with the same sum per token, and 0 where inverse is -1; a token without
    any row gets zeros. Raises ValueError if the shapes differ.
    """
    if topk_weights.shape != inverse.shape:
        expected, got = list(inverse.shape), list(topk_weights.shape)
        raise ValueError(f"topk_weights must have the shape of inverse, {expected}, got {got}")
    kept = topk_weights.where(inverse >= 0, 0)
    kept_sum = kept.sum(-1, keepdim=True)
    factor = topk_weights.sum(-1, keepdim=True) / kept_sum
    return kept * factor.where(kept_sum != 0, 0)


def local_experts(ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """The local ids of global expert ids; -1 for ids outside expert_map. None: ids as they are."""
    if expert_map is None:
        return ids
    known = (ids >= 0) & (ids < len(expert_map))
    padded = torch.cat([expert_map, expert_map.new_full((1,), -1)])
    return padded[ids.where(known, len(expert_map)).long()]


def check_capacity(capacity_factor: float | None) -> None:
    """Raises ValueError for a capacity factor that is negative, infinite or NaN."""
    if capacity_factor is not None and not 0 <= capacity_factor < math.inf:
        raise ValueError(f"capacity_factor must be 0 or more and finite, got {capacity_factor}")


def _num_ids(num_experts: int, expert_map: Tensor | None) -> int:
    """The number of experts that ids may name: those of the map, or else num_experts."""
    return num_experts if expert_map is None else expert_map.numel()


def row_capacity(topk_ids: Tensor, num_experts: int, capacity_factor: float | None) -> int:
    """The most rows that an expert may have. num_experts: the experts of all ranks."""
    if capacity_factor is None:
        return topk_ids.numel()
    return min(
        math.ceil(topk_ids.numel() / max(num_experts, 1) * capacity_factor), topk_ids.numel()
    )


def route_grid(pairs: int, num_experts: int) -> int:
    """The number of CTAs that `launch_route` uses: 1 for one launch, more for two launches."""
    if pairs <= _ONE_CTA_PAIRS:
        return 1
    share = max(_CTA_PAIRS, 2 * num_experts)  # each CTA reads the histograms of all CTAs
    return min(-(-pairs // share), _MOST_CTAS)


def route_scratch(pairs: int, num_experts: int) -> int:
    """The number of int32 of scratch memory that `launch_route` needs."""
    grid = route_grid(pairs, num_experts)
    return grid * num_experts if grid > 1 else 0


def find_route(num_experts: int, dtype: torch.dtype, pairs: int, device: int) -> Kernel | None:
    """The route kernel for this many pairs and ids of this dtype, or None after a warning.

    Raises what `step_kernel` raises.
    """
    return step_kernel(
        RouteProblem(num_experts, 8 * dtype.itemsize), device, few=pairs <= FEW_PAIRS
    )


def route_phases(pairs: int, num_experts: int) -> tuple[tuple[int, int], ...]:
    """The launches of a route kernel, each as (CTAs, value of the parameter `phase`)."""
    grid = route_grid(pairs, num_experts)
    return ((1, 0),) if grid == 1 else ((grid, 1), (grid, 2))


def launch_route(
    kernel: Kernel,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    capacity: int,
    table: RoutingTable,
    scratch: Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Enqueues a kernel from `find_route` on torch's current stream; checks and allocates nothing.

    Tensors are contiguous. capacity: the most rows of an expert. table: is written. scratch int32
    [`route_scratch` or more]. pdl: as in `route`.
    """
    pairs, num_experts = topk_ids.numel(), len(table.offsets)
    addresses = {
        "ids": topk_ids.data_ptr(),
        "expert_map": 0 if expert_map is None else expert_map.data_ptr(),
        "index": table.index.data_ptr(),
        "offsets": table.offsets.data_ptr(),
        "inverse": table.inverse.data_ptr(),
        "histograms": scratch.data_ptr(),
    }
    values = route_values(
        addresses,
        num_ids=_num_ids(num_experts, expert_map),
        pairs=pairs,
        choices=topk_ids.shape[1] if topk_ids.dim() == 2 else 1,
        capacity=capacity,
    )
    for grid, phase in route_phases(pairs, num_experts):
        launch_step(kernel, {**values, "phase": phase}, grid, topk_ids.get_device(), pdl)


def _check(
    topk_ids: Tensor, num_experts: int, expert_map: Tensor | None, capacity_factor: float | None
) -> None:
    """Checks the arguments of `route`."""
    if topk_ids.dtype not in IDS:
        raise TypeError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
    if topk_ids.dim() not in (1, 2):
        raise ValueError(f"topk_ids must be [T, top_k] or [T], got {list(topk_ids.shape)}")
    if topk_ids.numel() > _MAX_PAIRS:
        raise ValueError(f"topk_ids must have at most {_MAX_PAIRS} ids, got {topk_ids.numel()}")
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    check_capacity(capacity_factor)
    if expert_map is None:
        return
    if expert_map.dtype != torch.int32:
        raise TypeError(f"expert_map must be int32, got {expert_map.dtype}")
    if expert_map.dim() != 1:
        raise ValueError(f"expert_map must be [global experts], got {list(expert_map.shape)}")
    if expert_map.device != topk_ids.device:
        raise ValueError(f"expert_map must be on {topk_ids.device}, got one on {expert_map.device}")


def _shapes(topk_ids: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a table's index and inverse."""
    return (topk_ids.numel(),), tuple(topk_ids.shape)


# The op.

_Table = tuple[Tensor, Tensor, Tensor]


def _route_cpu(
    topk_ids: Tensor,
    num_experts: int,
    expert_map: Tensor | None,
    capacity_factor: float | None,
    pdl: bool,
) -> _Table:
    table = route_reference(
        topk_ids, num_experts, expert_map=expert_map, capacity_factor=capacity_factor
    )
    return table.index, table.offsets, table.inverse


def _route_cuda(
    topk_ids: Tensor,
    num_experts: int,
    expert_map: Tensor | None,
    capacity_factor: float | None,
    pdl: bool,
) -> _Table:
    device = topk_ids.get_device()
    kernel = find_route(num_experts, topk_ids.dtype, topk_ids.numel(), device)
    if kernel is None:
        return _route_cpu(topk_ids, num_experts, expert_map, capacity_factor, pdl)
    topk_ids = topk_ids.contiguous()
    if expert_map is not None:
        expert_map = expert_map.contiguous()
    table = RoutingTable.empty(topk_ids, num_experts)
    scratch = topk_ids.new_empty(route_scratch(topk_ids.numel(), num_experts), dtype=torch.int32)
    capacity = row_capacity(topk_ids, _num_ids(num_experts, expert_map), capacity_factor)
    launch_route(kernel, topk_ids, expert_map, capacity, table, scratch, pdl=pdl)
    return table.index, table.offsets, table.inverse


def _route_fake(
    topk_ids: Tensor,
    num_experts: int,
    expert_map: Tensor | None,
    capacity_factor: float | None,
    pdl: bool,
) -> _Table:
    table = RoutingTable.empty(topk_ids, num_experts)
    return table.index, table.offsets, table.inverse


_route_op = define(
    "route(Tensor topk_ids, int num_experts, Tensor? expert_map, float? capacity_factor, bool pdl)"
    " -> (Tensor, Tensor, Tensor)",
    _route_cpu,
    _route_fake,
    cuda=_route_cuda,
)
