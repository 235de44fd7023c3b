from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cutlass_moe.routing import RoutingTable, route


def expected(topk_ids: Tensor, num_experts: int) -> tuple[list[int], list[int], list[int]]:
    """index, offsets, inverse by Python's own stable sort."""
    ids = topk_ids.flatten().tolist()
    choices = topk_ids.shape[1] if topk_ids.dim() == 2 else 1
    pairs = sorted((p for p, e in enumerate(ids) if 0 <= e < num_experts), key=lambda p: ids[p])
    index = [p // choices for p in pairs] + [-1] * (len(ids) - len(pairs))
    offsets = [sum(0 <= i <= e for i in ids) for e in range(num_experts)]
    inverse = [pairs.index(p) if p in pairs else -1 for p in range(len(ids))]
    return index, offsets, inverse


def check(table: RoutingTable, topk_ids: Tensor, num_experts: int) -> None:
    index, offsets, inverse = expected(topk_ids, num_experts)
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


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda choices: st.lists(
            st.lists(st.integers(-2, 9), min_size=choices, max_size=choices),
            min_size=1,
            max_size=12,
        )
    ),
    st.integers(1, 9),
)
def test_route_against_a_sort(ids: list[list[int]], num_experts: int) -> None:
    topk_ids = torch.tensor(ids)
    check(route(topk_ids, num_experts), topk_ids, num_experts)


@pytest.mark.parametrize("shape", [(7, 3), (7,), (0, 3)], ids=str)
def test_compiles_as_one_graph(shape: tuple[int, ...]) -> None:
    topk_ids = torch.randint(-1, 6, shape)
    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    check(compiled(topk_ids, 5), topk_ids, 5)


@pytest.mark.parametrize(
    ("topk_ids", "num_experts", "error", "message"),
    [
        (torch.zeros(2, 2), 4, TypeError, "expected int32 or int64, got torch.float32"),
        (torch.zeros(2, 2, dtype=torch.int16), 4, TypeError, "got torch.int16"),
        (torch.zeros(1, 2, 2, dtype=torch.int32), 4, ValueError, r"got \[1, 2, 2\]"),
        (torch.zeros((), dtype=torch.int32), 4, ValueError, r"got \[\]"),
        (torch.zeros(2, 2, dtype=torch.int32), 0, ValueError, "expected at least 1, got 0"),
    ],
    ids=["float", "int16", "3d", "scalar", "no_experts"],
)
def test_errors(topk_ids: Tensor, num_experts: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        route(topk_ids, num_experts)


@pytest.mark.gpu
def test_cuda_graph_replays_with_new_ids() -> None:
    buffer = torch.zeros((64, 4), dtype=torch.int64, device="cuda")
    route(buffer, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table = route(buffer, 8)
    for seed in range(3):
        topk_ids = torch.randint(-1, 9, (64, 4), generator=torch.Generator().manual_seed(seed))
        buffer.copy_(topk_ids)
        graph.replay()
        check(table, topk_ids, 8)
