"""Prepared calls, and launches that depend on one another, on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.choose.heuristics_sm90 import choose
from cutlass_moe.operands import Operands, Options
from cutlass_moe.ops import dispatch
from emitters.spec.config_sm90 import GemmSm90Config
from emitters.spec.config_swap_sm90 import GemmSwapSm90Config
from emitters.spec.gemm import GemmProblem
from emitters.spec.registry import GemmConfig
from emitters.spec.staged_sm90 import Schedule
from tests.support.cases import CASES, FLOAT, Case, make_inputs, skewed
from tests.support.numerics import check, poisoned, same_bits

pytestmark = pytest.mark.gpu

PLANNED = ("ragged", "one_token_8_experts", "bias_fp32", "no_index", "expert_scale", "k_7168")
# Every row of a product is a row of the next one's x.
LINK = replace(FLOAT, tokens=64, counts=skewed(8, 64), spare=0, n=1024, k=1024)
LINKS: dict[str, GemmConfig] = {
    "swap": GemmSwapSm90Config(k_boxes=2, stages=4, ctas_per_sm=2),
    "swap_split": GemmSwapSm90Config(stages=4, split_k=4, ctas_per_sm=2),
    "swap_large": GemmSwapSm90Config(tile_m=16, tile_n=128),
    "pingpong": GemmSm90Config(64, 128, pingpong=True),
    "cluster": GemmSm90Config(64, 128, cluster_m=2),
    "dynamic": GemmSm90Config(64, 128, schedule=Schedule.DYNAMIC),
}
CHAINS = {**{name: (name,) for name in LINKS}, "all": tuple(LINKS)}


def dynamic(case: Case) -> GemmConfig:
    return choose(case.problem, case.tokens, case.rows / len(case.counts), "dynamic")


def images() -> set[tuple[GemmProblem, GemmConfig]]:
    """Every (problem, config) that these tests load and others don't."""
    chained = {(LINK.problem, config) for config in LINKS.values()}
    return chained | {(CASES["ragged"].problem, dynamic(CASES["ragged"]))}


def tensors(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if torch.is_tensor(value)}


@pytest.mark.parametrize("name", PLANNED)
def test_calls_with_the_same_and_with_other_tensors(name: str) -> None:
    case = CASES[name]
    inputs, others = (make_inputs(case, "cuda", exact=True, seed=seed) for seed in (0, 1))
    out, into = (poisoned(case.rows, case.n, inputs["out_dtype"], "cuda") for _ in range(2))
    plan = cm.plan(**inputs, out=out)
    assert plan() is out
    check(out, case, inputs, exact=True)
    assert plan(out=into, **tensors(others)) is into
    check(into, case, others, exact=True)
    check(out, case, inputs, exact=True)


def test_dynamic_schedule_on_two_streams() -> None:
    case = CASES["ragged"]
    inputs = make_inputs(case, "cuda", exact=True)
    out = poisoned(case.rows, case.n, inputs["out_dtype"], "cuda")
    plan = cm.plan(**inputs, out=out, schedule="dynamic")
    torch.cuda.synchronize()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            for _ in range(20):
                plan()
        stream.synchronize()
    check(out, case, inputs, exact=True)


def test_graph_is_replayed_with_what_its_tensors_then_hold() -> None:
    case = CASES["ragged"]
    inputs, others = (make_inputs(case, "cuda", exact=True, seed=seed) for seed in (0, 1))
    out = poisoned(case.rows, case.n, inputs["out_dtype"], "cuda")
    plan = cm.plan(**inputs, out=out)
    plan()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan()
    for name, tensor in tensors(inputs).items():
        tensor.copy_(others[name])
    graph.replay()
    check(out, case, others, exact=True)


def test_calls_allocate_nothing() -> None:
    inputs = make_inputs(CASES["ragged"], "cuda")
    plan = cm.plan(**inputs)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(3):
        plan(inputs["x"])
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_address_that_the_kernel_cannot_take() -> None:
    inputs = make_inputs(CASES["ragged"], "cuda")
    plan = cm.plan(**inputs)
    x = inputs["x"]
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape)
    with pytest.raises(ValueError, match="the address of x must be a multiple of 16 bytes"):
        plan(shifted)


def run_chain(names: tuple[str, ...], inputs: dict[str, Any], overlap: bool) -> Tensor:
    """24 products, each of the one before, through two buffers that take turns."""
    buffers = [torch.empty(LINK.rows, LINK.n, dtype=torch.bfloat16, device="cuda") for _ in "ab"]
    x, launches = inputs["x"], []
    for i in range(24):
        with dispatch.forced_config(LINKS[names[i % len(names)]]):
            choice = dispatch.choose_launch(
                LINK.problem, 0, LINK.tokens, LINK.rows, inputs["weight"].stride(), Options()
            )
        operands = Operands(
            x, inputs["weight"], inputs["index"], inputs["offsets"], None, None, None
        )
        x = buffers[i % 2]
        choice = choice._replace(overlap=overlap and i > 0)
        launches.append(choice.prepare(dispatch.operand_addresses(operands, x)))
    stream = torch.cuda.current_stream().cuda_stream
    for launch in launches:
        launch(stream)
    return x


@pytest.mark.parametrize("names", CHAINS.values(), ids=CHAINS)
def test_chain_of_overlapping_launches_changes_no_bit(names: tuple[str, ...]) -> None:
    for seed in range(3):
        inputs = make_inputs(LINK, "cuda", seed=seed)
        expected = run_chain(names, inputs, overlap=False)
        assert expected.isfinite().all() and expected.float().std() > 0.1
        for _ in range(10):
            assert same_bits(run_chain(names, inputs, overlap=True), expected)


def test_captured_chain_of_overlapping_launches_changes_no_bit() -> None:
    inputs, others = (make_inputs(LINK, "cuda", seed=seed) for seed in (0, 1))
    run_chain(CHAINS["all"], inputs, overlap=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run_chain(CHAINS["all"], inputs, overlap=True)
    for name, tensor in tensors(inputs).items():
        tensor.copy_(others[name])
    expected = run_chain(CHAINS["all"], others, overlap=False)
    for _ in range(20):
        out.zero_()
        graph.replay()
        assert same_bits(out, expected)
