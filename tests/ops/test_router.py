"""topk_router and route_logits on a CPU: the ops around the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from emitters.spec.dtypes import DType
from emitters.spec.layer_steps import (
    RouteLogitsProblem,
    RouteProblem,
    Step,
    StepConfig,
    TopkProblem,
)
from emitters.spec.registry import problem_from_json, why_illegal
from tests.support.topk_cases import OPTIONS, Case, check

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_topk_router(options: dict[str, Any]) -> None:
    logits, options = Case(7, 16, 3, options=options).make()
    check(
        cm.topk_router(logits, 3, **options), cm.topk_router_reference(logits, 3, **options), True
    )


@pytest.mark.parametrize("factor", [None, 0.5], ids=str)
@pytest.mark.parametrize("tokens", [0, 7])
def test_route_logits(tokens: int, factor: float | None) -> None:
    logits, options = Case(tokens, 16, 3, options=OPTIONS["threshold"]).make()
    table, weights, ids = cm.route_logits(logits, 3, capacity_factor=factor, **options)
    check((weights, ids), cm.topk_router(logits, 3, **options), True)
    want = cm.route_reference(ids, 16, capacity_factor=factor)
    assert all(torch.equal(getattr(table, name), value) for name, value in vars(want).items())


def test_route_logits_with_a_map() -> None:
    expert_map = torch.full((16,), -1, dtype=torch.int32)
    expert_map[4:8] = torch.arange(4, dtype=torch.int32)
    table, _, ids = cm.route_logits(X, 3, num_experts=4, expert_map=expert_map)
    want = cm.route_reference(ids, 4, expert_map=expert_map)
    assert all(torch.equal(getattr(table, name), value) for name, value in vars(want).items())


def test_ops() -> None:
    bias = torch.randn(16)
    for arguments in (
        (X, 4, "softmax", True, 1, 1, None, 1.0, None),
        (X.bfloat16(), 4, "sigmoid", False, 4, 2, bias, 2.5, 0.1),
    ):
        torch.library.opcheck(torch.ops.cutlass_moe.topk_router.default, (*arguments, True))
        for factor in (None, 1.0):
            op = torch.ops.cutlass_moe.route_logits.default
            torch.library.opcheck(op, (*arguments, factor, True))


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(cm.route_logits, fullgraph=True, backend="aot_eager")
    table, weights, ids = compiled(X, 4)
    check((weights, ids), cm.topk_router(X, 4), True)
    assert torch.equal(table.inverse, cm.route_reference(ids, 16).inverse)


@pytest.mark.parametrize("op", [cm.topk_router, cm.route_logits])
@pytest.mark.parametrize(
    ("logits", "k", "options", "error", "message"),
    [
        (X.int(), 2, {}, TypeError, "must have a floating-point dtype, got torch.int32"),
        (X[0], 2, {}, ValueError, r"must be \[T, E > 0\], got \[16\]"),
        (X, 0, {}, ValueError, "k must be 1 to 16, the number of experts to choose from, got 0"),
        (X, 9, {"num_groups": 2}, ValueError, "k must be 1 to 8"),
        (X, 2, {"num_groups": 3}, ValueError, "must be a divisor of 16 experts, got 3"),
        (X, 2, {"num_groups": 4, "topk_groups": 5}, ValueError, "must be 1 to num_groups 4, got 5"),
        (
            X,
            2,
            {"scoring": "tanh"},
            ValueError,
            "sqrtsoftplus, got 'tanh'",
        ),
        (X, 2, {"correction_bias": X[0, :3]}, ValueError, r"must be \[16\], got \[3\]"),
        (X, 2, {"correction_bias": X[0].int()}, TypeError, "floating-point dtype, got torch.int32"),
        (X, 2, {"correction_bias": X[0].to("meta")}, ValueError, "must be on cpu, got one on meta"),
        (X, 2, {"scale": float("inf")}, ValueError, "scale must be a finite float32, got inf"),
        (X, 2, {"threshold": float("nan")}, ValueError, "threshold must be a finite float32"),
    ],
)
def test_errors(
    op: Any, logits: Tensor, k: int, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        op(logits, k, **options)


def test_capacity_factor_is_checked() -> None:
    with pytest.raises(ValueError, match="capacity_factor must be 0 or more and finite, got nan"):
        cm.route_logits(X, 2, capacity_factor=float("nan"))


PROBLEMS = {
    RouteProblem(1024, 64): None,
    RouteProblem(0, 32): "experts must be 1 to 1024, got 0",
    RouteProblem(1025, 32): "experts must be 1 to 1024, got 1025",
    RouteProblem(8, 16): "ids must have 32 or 64 bits, got 16",
    TopkProblem(1024, DType.FP16, "sigmoid", 32): None,
    TopkProblem(1025, DType.FP16, "sigmoid", 1): "experts must be 1 to 1024, got 1025",
    TopkProblem(8, DType.INT8, "softmax", 1): "logits must be one of bf16, fp16, fp32, got int8",
    TopkProblem(8, DType.FP32, "tanh", 1): "sqrtsoftplus, got 'tanh'",
    TopkProblem(64, DType.FP32, "softmax", 64): "and a divisor of 64 experts, got 64",
    TopkProblem(10, DType.FP32, "softmax", 4): "must be 1 to 32 and a divisor of 10 experts, got 4",
    RouteLogitsProblem(512, DType.BF16, "softmax", 1): None,
    RouteLogitsProblem(513, DType.BF16, "softmax", 1): "experts must be at most 512, got 513",
}


@pytest.mark.parametrize(("problem", "reason"), PROBLEMS.items(), ids=map(str, PROBLEMS))
def test_problems(problem: Step, reason: str | None) -> None:
    assert problem_from_json(problem.to_json()) == problem
    found = why_illegal(problem)
    assert found is None if reason is None else reason in (found or "")


def test_a_thread_for_each_expert() -> None:
    problem = RouteProblem(1024, 32)
    assert why_illegal(problem, StepConfig(1024)) is None
    reason = why_illegal(problem, StepConfig(992)) or ""
    assert "threads must be at least one per expert (1024), got 992" in reason
