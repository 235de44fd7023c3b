"""The problems of training's steps: their JSON, and why one is illegal."""

from __future__ import annotations

import pytest

from emitters.spec.dtypes import DType
from emitters.spec.epilogue import ActivationFunction
from emitters.spec.layer_steps import (
    ActivateBackwardProblem,
    ActivateProblem,
    GatherSumProblem,
    Step,
)
from emitters.spec.registry import problem_from_json, why_illegal

SWIGLU, RELU = ActivationFunction.SWIGLU, ActivationFunction.RELU
PROBLEMS: dict[Step, str | None] = {
    ActivateProblem(SWIGLU, DType.BF16, 768, True): None,
    ActivateBackwardProblem(RELU, DType.FP16, 8): None,
    GatherSumProblem(DType.FP32, DType.FP16, 72): None,
    ActivateProblem(SWIGLU, DType.FP32, 768): "rows must be one of bf16, fp16, got fp32",
    ActivateProblem(SWIGLU, DType.BF16, 12): "I must be a multiple of 8 up to 32768, got 12",
    ActivateBackwardProblem(RELU, DType.BF16, 8, True): "only gated activations can be interleaved",
    GatherSumProblem(DType.INT8, DType.BF16, 64): "rows must be one of bf16, fp16, fp32, got int8",
    GatherSumProblem(DType.BF16, DType.BF16, 12): "N must be a multiple of 8 up to 32768, got 12",
}


@pytest.mark.parametrize(("problem", "reason"), PROBLEMS.items(), ids=map(str, PROBLEMS))
def test_problems(problem: Step, reason: str | None) -> None:
    assert problem_from_json(problem.to_json()) == problem
    found = why_illegal(problem)
    assert found is None if reason is None else reason in (found or "")
    assert problem.op in problem.words
