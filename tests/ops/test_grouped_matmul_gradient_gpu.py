"""The gradients of grouped_matmul by kernels, against the same formulas in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import cutlass_moe as cm
from cutlass_moe.choose.heuristics_sm90 import choose, every_config
from cutlass_moe.operands import Operands, Options
from cutlass_moe.ops.grouped_matmul_reference import grouped_matmul_backward
from emitters.spec.dtypes import DType
from emitters.spec.epilogue import Bias
from emitters.spec.gemm import GemmProblem, Major, WeightFormat
from emitters.spec.layer_steps import GatherSumProblem
from emitters.spec.registry import Config, Problem
from emitters.spec.weight_grad import Side, WeightGradProblem
from tests.layer.test_nn_gpu import no_wait, no_warning
from tests.support.cases import FLOAT, make_inputs
from tests.support.training_cases import relative

pytestmark = pytest.mark.gpu

CASES = {
    "gathered": FLOAT,
    "in_order": replace(FLOAT, gather=False, n=72, k=72),
    "few_tokens": replace(FLOAT, reads="few"),
    "outside": replace(FLOAT, reads="outside", epilogue=(Bias(DType.FP32),)),
    "gaps": replace(FLOAT, apart=3, epilogue=(Bias(DType.BF16),)),
    "gaps_in_order": replace(FLOAT, apart=3, gather=False),
    "n_major": replace(FLOAT, weight_major=Major.N, n=136),
    "fp16": replace(FLOAT, operand=DType.FP16, out=DType.FP16, epilogue=(Bias(DType.FP16),)),
    "to_fp32": replace(FLOAT, out=DType.FP32),
}
LIMITS = {DType.BF16: 8e-3, DType.FP16: 1e-3}


def images() -> set[tuple[Problem, Config]]:
    found: set[tuple[Problem, Config]] = set()
    for case in CASES.values():
        problem = case.problem
        flipped = Major.K if case.weight_major is Major.N else Major.N
        rows = DType.FP32 if case.gather and case.operand is DType.FP16 else case.operand
        turned = replace(
            problem, n=case.k, k=case.n, gather=False, epilogue=(), out=rows,
            weight=WeightFormat(case.operand, flipped),
        )  # fmt: skip
        sides, side = ((case.n, case.k), Side.RIGHT)
        if case.weight_major is Major.N:
            sides, side = sides[::-1], Side.LEFT
        experts, gathered = len(case.counts), side if case.gather else None
        problems: list[Problem] = [
            problem,
            turned,
            WeightGradProblem(case.operand, case.operand, *sides, experts, gathered),
            WeightGradProblem(case.operand, DType.FP32, 8, case.n, experts),
            GatherSumProblem(rows, case.operand, case.k),
        ]
        for one in problems:
            if isinstance(one, GemmProblem):
                tokens = case.tokens if one.gather else case.rows
                found.add((one, choose(one, tokens, case.rows / experts)))
            else:
                found |= {(one, config) for config in every_config(one)}
    return found


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody wrote is NaN; the host waits for nothing; the bits are the same again."""
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    case = CASES[name]
    inputs = make_inputs(case, "cuda")
    names = ("x", "weight", "bias")
    leaves = {n: inputs[n].requires_grad_() for n in names if inputs.get(n) is not None}
    generator = torch.Generator("cuda").manual_seed(2)
    grad = torch.randn(case.rows, case.n, generator=generator, device="cuda")
    grad = grad.to(inputs["x"].dtype).to(inputs["out_dtype"])

    def run() -> tuple[torch.Tensor, ...]:
        out = cm.grouped_matmul(**inputs)
        return torch.autograd.grad(out, list(leaves.values()), grad)

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        found = run()
    finally:
        torch.use_deterministic_algorithms(False)
    with no_warning(), no_wait():
        again = run()
    wide: dict[str, Any] = {n: inputs[n].detach().double() if n in leaves else None for n in names}
    operands = Operands(
        index=inputs["index"],
        offsets=inputs["offsets"],
        starts=inputs.get("starts"),
        **wide,
    )
    needs = (True, True, False, False, "bias" in leaves)
    x, weight, _, _, bias = grouped_matmul_backward(grad.double(), operands, Options(), needs)
    wanted = {"x": x, "weight": weight, "bias": bias}
    for leaf, got, same in zip(leaves, found, again, strict=True):
        want = wanted[leaf]
        assert want is not None and torch.equal(got, same)
        assert got.shape == want.shape and got.dtype == inputs[leaf].dtype
        assert relative(got, want) <= LIMITS[case.operand], leaf
