"""Routing on a GPU."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.ops.route import (
    RoutingTable,
    find_route,
    launch_route,
    route_reference,
    route_scratch,
    row_capacity,
)
from emitters.spec.layer_steps import RouteProblem, Step, StepConfig

pytestmark = pytest.mark.gpu

EXPERTS = (1, 8, 128, 512, 1024)
TOKENS = (0, 1, 7, 128, 8192, 65536)
BITS = {32: torch.int32, 64: torch.int64}
POISON = -77


@dataclass(frozen=True)
class Ids:
    """How topk_ids are drawn. hot: nine of ten pairs go to the last expert; outside: a third are
    no expert's."""

    tokens: int
    experts: int
    k: int = 8
    how: str = "uniform"

    def __str__(self) -> str:
        return f"T{self.tokens}_E{self.experts}_k{self.k}_{self.how}"

    def make(self, seed: int = 0) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        shape = (self.tokens, self.k)
        ids = torch.randint(0, self.experts, shape, generator=draw)
        drawn = torch.rand(shape, generator=draw)
        if self.how == "hot":
            ids[drawn < 0.9] = self.experts - 1
        if self.how == "outside":
            outside = torch.tensor([-1, self.experts, -(2**31), 2**31 - 1])
            ids = ids.where(drawn > 0.3, outside[torch.randint(0, 4, shape, generator=draw)])
        if self.how == "none":
            ids.fill_(-1)
        return ids


CASES = [
    *(Ids(t, e) for t, e in itertools.product(TOKENS, EXPERTS)),
    *(Ids(t, 128, how=how) for t in (7, 8192) for how in ("hot", "outside", "none")),
    *(Ids(t, 512, k) for t in (1, 4095, 4097) for k in (1, 10, 16)),
]


def images() -> set[tuple[Step, StepConfig]]:
    """Every (problem, config) that these tests may run."""
    problems = [RouteProblem(e, bits) for e in EXPERTS for bits in BITS]
    return {(problem, config) for problem in problems for config in every_config(problem)}


def poisoned(topk_ids: Tensor, num_experts: int) -> RoutingTable:
    table = RoutingTable.empty(topk_ids, num_experts)
    for tensor in (table.index, table.offsets, table.inverse):
        tensor.fill_(POISON)
    return table


def check(got: RoutingTable, want: RoutingTable) -> None:
    for name in ("offsets", "index", "inverse"):
        torch.testing.assert_close(getattr(got, name).cpu(), getattr(want, name), rtol=0, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Ids, bits: int) -> None:
    ids = case.make().to(BITS[bits])
    on_device = ids.cuda()
    table = poisoned(on_device, case.experts)
    words = route_scratch(ids.numel(), case.experts)
    scratch = torch.full((words,), POISON, dtype=torch.int32, device="cuda")
    kernel = find_route(case.experts, ids.dtype, ids.numel(), 0)
    assert kernel is not None
    launch_route(kernel, on_device, None, ids.numel(), table, scratch)
    check(table, route_reference(ids, case.experts))


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 1.25, 100.0])
@pytest.mark.parametrize("case", [Ids(128, 8), Ids(8192, 128), Ids(8192, 128, how="hot")], ids=str)
def test_capacity(case: Ids, factor: float) -> None:
    ids = case.make()
    got = cm.route(ids.cuda(), case.experts, capacity_factor=factor)
    check(got, route_reference(ids, case.experts, capacity_factor=factor))
    assert (
        got.offsets.diff(prepend=got.offsets.new_zeros(1))
        <= row_capacity(ids, case.experts, factor)
    ).all()


@pytest.mark.parametrize("tokens", [7, 8192])
def test_expert_map(tokens: int) -> None:
    ids = Ids(tokens, 512, how="outside").make()
    local = torch.full((512,), -1, dtype=torch.int32)
    local[torch.randperm(512, generator=torch.Generator().manual_seed(0))[:128]] = torch.arange(
        128
    ).int()
    local[3] = 128  # none of the 128 here
    got = cm.route(ids.cuda(), 128, expert_map=local.cuda())
    check(got, route_reference(ids, 128, expert_map=local))


@pytest.mark.parametrize("tokens", [128, 8192])
def test_graph_replays_with_new_ids(tokens: int) -> None:
    case = Ids(tokens, 128, how="outside")
    ids = case.make().cuda()
    cm.route(ids, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table = cm.route(ids, 128)
    for seed in range(1, 4):
        ids.copy_(case.make(seed))
        for tensor in (table.index, table.offsets, table.inverse):
            tensor.fill_(POISON)
        graph.replay()
        check(table, route_reference(case.make(seed), 128))


def test_no_wait_for_the_device() -> None:
    ids = Ids(128, 128).make().cuda()
    cm.route(ids, 128)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cm.route(ids, 128, capacity_factor=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_strided_ids() -> None:
    ids = Ids(128, 8).make()
    check(cm.route(ids.cuda().T.contiguous().T[::2], 8), route_reference(ids[::2], 8))
