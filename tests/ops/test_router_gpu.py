"""topk_router and route_logits on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import cutlass_moe as cm
from cutlass_moe.choose.heuristics_sm90 import step_config
from emitters.spec.layer_steps import RouteProblem, Step, StepConfig
from tests.support.topk_cases import OPTIONS, Case, check

pytestmark = pytest.mark.gpu

SHAPES = {
    "mixtral": Case(128, 8, 2, torch.bfloat16),
    "qwen3": Case(128, 128, 8, torch.bfloat16),
    "deepseek": Case(128, 256, 8),
    "qwen3_next": Case(128, 512, 10, torch.float16),
    "largest": Case(128, 1024, 16),
    "ragged": Case(100, 40, 3),
}
CASES = {
    **{f"{s}_{o}": replace(c, options=OPTIONS[o]) for s, c in SHAPES.items() for o in OPTIONS},
    **{
        f"{how}_{o}": Case(200, 40, 6, how=how, options=OPTIONS[o])
        for how in ("ties", "special")
        for o in OPTIONS
    },
    "one_expert": Case(5, 1, 1),
    "most_choices": Case(33, 64, 32),
    "all_choices": Case(33, 5, 5),
    "one_token": Case(1, 128, 8),
    "many_tokens": Case(65536, 128, 8, torch.bfloat16),
}
FUSED = {name: case for name, case in CASES.items() if case.experts <= 512}


def images() -> set[tuple[Step, StepConfig]]:
    """Every (problem, config) that these tests may run."""
    problems: set[Step] = {case.problem() for case in CASES.values()}
    problems |= {case.fused() for case in FUSED.values()}
    problems |= {RouteProblem(case.experts, 32) for case in FUSED.values()}
    return {(problem, step_config(problem)) for problem in problems}


def on_device(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_topk_router(case: Case) -> None:
    logits, options = case.make()
    weights, ids = cm.topk_router(logits.cuda(), case.k, **on_device(options))
    want = cm.topk_router_reference(logits, case.k, **options)
    check((weights.cpu(), ids.cpu()), want, case.exact)


@pytest.mark.parametrize("tokens", [0, 1, 7, 16, 17, 300])
@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED.keys())
def test_route_logits(case: Case, tokens: int) -> None:
    """Bit for bit what one op after the other gives."""
    logits, options = replace(case, tokens=tokens).make()
    logits, options = logits.cuda(), on_device(options)
    factor = 0.75 if case.how == "ties" else None
    table, weights, ids = cm.route_logits(logits, case.k, capacity_factor=factor, **options)
    alone = cm.topk_router(logits, case.k, **options)
    assert torch.equal(weights, alone[0]) and torch.equal(ids, alone[1])
    want = cm.route_reference(ids, case.experts, capacity_factor=factor)
    for name, value in vars(want).items():
        torch.testing.assert_close(getattr(table, name), value, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [7, 300])
def test_graph_replays_with_new_logits(tokens: int) -> None:
    case = Case(tokens, 128, 8, torch.bfloat16)
    logits = case.make()[0].cuda()
    cm.route_logits(logits, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table, weights, ids = cm.route_logits(logits, 8)
    for seed in range(1, 4):
        fresh, _ = case.make(seed)
        logits.copy_(fresh)
        for tensor in (table.index, table.offsets, table.inverse, weights, ids):
            tensor.fill_(-77)
        graph.replay()
        check((weights.cpu(), ids.cpu()), cm.topk_router_reference(fresh, 8), True)
        want = cm.route_reference(ids, 128)
        assert all(torch.equal(getattr(table, name), value) for name, value in vars(want).items())


def test_strided_logits() -> None:
    logits, _ = SHAPES["qwen3"].make()
    weights, ids = cm.topk_router(logits.cuda().T.contiguous().T, 8)
    check((weights.cpu(), ids.cpu()), cm.topk_router_reference(logits, 8), True)
