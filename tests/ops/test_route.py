from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cutlass_moe.ops.route
from cutlass_moe.ops.route import RoutingTable, renormalize_kept, route, row_capacity


def expected(
    topk_ids: Tensor, num_experts: int, expert_map: Tensor | None, factor: float | None
) -> tuple[list[int], list[int], list[int]]:
    """index, offsets, inverse, pair by pair."""
    ids, choices = topk_ids.flatten().tolist(), topk_ids.shape[1] if topk_ids.dim() == 2 else 1
    if expert_map is not None:
        local = dict(enumerate(expert_map.tolist()))
        ids = [local.get(e, -1) for e in ids]
    pairs: list[list[int]] = [[] for _ in range(num_experts)]
    experts = num_experts if expert_map is None else len(expert_map)  # of all ranks
    room = len(ids) if factor is None else len(ids) / max(experts, 1) * factor
    for p, e in enumerate(ids):
        if 0 <= e < num_experts and len(pairs[e]) < room:
            pairs[e].append(p)
    rows = [p for own in pairs for p in own]
    offsets = [sum(map(len, pairs[: e + 1])) for e in range(num_experts)]
    index = [p // choices for p in rows] + [-1] * (len(ids) - len(rows))
    return index, offsets, [rows.index(p) if p in rows else -1 for p in range(len(ids))]


def check(
    table: RoutingTable,
    topk_ids: Tensor,
    num_experts: int,
    expert_map: Tensor | None = None,
    capacity_factor: float | None = None,
) -> None:
    index, offsets, inverse = expected(topk_ids, num_experts, expert_map, capacity_factor)
    assert table.index.tolist() == index
    assert table.offsets.tolist() == offsets
    assert table.inverse.flatten().tolist() == inverse
    assert table.inverse.shape == topk_ids.shape
    for tensor in (table.index, table.offsets, table.inverse):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()


CASES: dict[str, tuple[Any, int]] = {
    "no_tokens": (torch.empty(0, 2, dtype=torch.int64), 4),
    "no_tokens_one_choice": (torch.empty(0, dtype=torch.int64), 1),
    "no_choices": (torch.empty(3, 0, dtype=torch.int64), 4),
    "one_pair": ([[0]], 1),
    "all_dropped": ([[-1, 4], [4, -1]], 4),
    "some_dropped": ([[3, -1], [4, 0], [2**31 - 1, -(2**31)], [0, 3]], 4),
    "empty_experts": ([[5, 1], [1, 5], [5, 1]], 7),
    "one_hot": ([[2], [2], [2]], 4),
    "one_token_twice": ([[1, 1], [0, 1]], 2),
    "one_choice": ([2, 0, 1, 0], 3),
    "many_experts": ([[511, 0], [256, 511]], 512),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("ids", "num_experts"), CASES.values(), ids=CASES.keys())
def test_route(ids: Any, num_experts: int, dtype: torch.dtype) -> None:
    topk_ids = torch.as_tensor(ids).to(dtype)
    check(route(topk_ids, num_experts), topk_ids, num_experts)


def test_ids_beyond_32_bits_are_dropped() -> None:
    topk_ids = torch.tensor([[2**32, 1], [-(2**32), 0]])
    check(route(topk_ids, 2), topk_ids, 2)


def test_strided_ids() -> None:
    topk_ids = torch.randint(0, 4, (3, 10)).T[::2]
    check(route(topk_ids, 4), topk_ids, 4)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda choices: st.lists(
            st.lists(st.integers(-2, 9), min_size=choices, max_size=choices),
            min_size=1,
            max_size=12,
        )
    ),
    st.integers(1, 9),
    st.none() | st.lists(st.integers(-1, 9), max_size=9),
    st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.25, 4.0]),
)
def test_route_pair_by_pair(
    ids: list[list[int]], num_experts: int, local: list[int] | None, factor: float | None
) -> None:
    topk_ids = torch.tensor(ids)
    expert_map = None if local is None else torch.tensor(local, dtype=torch.int32)
    table = route(topk_ids, num_experts, expert_map=expert_map, capacity_factor=factor)
    check(table, topk_ids, num_experts, expert_map, factor)


def test_capacity_rounds_up() -> None:
    ids = torch.zeros(7, 1, dtype=torch.int32)
    assert row_capacity(ids, 3, 1.0) == 3
    assert row_capacity(ids, 3, None) == row_capacity(ids, 3, 1e9) == 7
    assert route(ids, 3, capacity_factor=1.0).inverse.flatten().tolist() == [0, 1, 2, *[-1] * 4]


def test_weights_of_dropped_pairs_go_to_the_others() -> None:
    ids = torch.tensor([[0, 1], [0, 2], [0, -1], [1, 0]])
    weights = torch.tensor([[0.5, 0.25], [0.5, 0.5], [0.75, 0.0], [0.125, 0.375]])
    inverse = route(ids, 3, capacity_factor=0.3).inverse  # one row an expert
    assert (inverse >= 0).tolist() == [[True, True], [False, True], [False] * 2, [False] * 2]
    shared = renormalize_kept(weights, inverse)
    assert shared.tolist() == [[0.5, 0.25], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    one = torch.tensor([[3, -1]])
    assert renormalize_kept(torch.tensor([[0.6, 0.2]]), one)[0].tolist() == pytest.approx([0.8, 0])
    with pytest.raises(ValueError, match=r"must have the shape of inverse, \[4, 2\]"):
        renormalize_kept(weights[:2], inverse)


@pytest.mark.parametrize("factor", [None, 0.5], ids=str)
@pytest.mark.parametrize("with_map", [False, True], ids=["ids", "map"])
def test_op(with_map: bool, factor: float | None) -> None:
    expert_map = torch.tensor([1, -1, 0, 2], dtype=torch.int32) if with_map else None
    ids = torch.randint(-1, 5, (6, 2))
    torch.library.opcheck(cutlass_moe.ops.route._route_op, (ids, 3, expert_map, factor, True))


@pytest.mark.parametrize("shape", [(7, 3), (7,), (0, 3)], ids=str)
def test_compiles_as_one_graph(shape: tuple[int, ...]) -> None:
    topk_ids = torch.randint(-1, 6, shape)
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    check(compiled(topk_ids, 5), topk_ids, 5)


IDS = torch.zeros(2, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("topk_ids", "num_experts", "options", "error", "message"),
    [
        (torch.zeros(2, 2), 4, {}, TypeError, "must be int32 or int64, got torch.float32"),
        (IDS.short(), 4, {}, TypeError, "got torch.int16"),
        (IDS[None], 4, {}, ValueError, r"got \[1, 2, 2\]"),
        (IDS[0, 0], 4, {}, ValueError, r"got \[\]"),
        (IDS[:, :1].expand(2, 2**28), 4, {}, ValueError, "must have at most 268435456 ids"),
        (IDS, 0, {}, ValueError, "must be at least 1, got 0"),
        (IDS, 4, {"capacity_factor": -1.0}, ValueError, "must be 0 or more and finite, got -1.0"),
        (IDS, 4, {"capacity_factor": float("nan")}, ValueError, "got nan"),
        (IDS, 4, {"expert_map": IDS[0].long()}, TypeError, "must be int32, got torch.int64"),
        (IDS, 4, {"expert_map": IDS}, ValueError, r"must be \[global experts\], got \[2, 2\]"),
        (IDS, 4, {"expert_map": IDS[0].to("meta")}, ValueError, "must be on cpu, got one on meta"),
    ],
    ids=[
        "float", "int16", "3d", "scalar", "ids", "no_experts", "factor", "nan", "map_int64",
        "map_2d", "map_elsewhere",
    ],
)  # fmt: skip
def test_errors(
    topk_ids: Tensor,
    num_experts: int,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        route(topk_ids, num_experts, **options)
