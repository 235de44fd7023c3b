"""grouped_mm on a GPU: products and gradients against the definition, without a wait."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.choose.heuristics_sm90 import every_config
from emitters.spec.dtypes import DType
from emitters.spec.registry import Config, Problem
from emitters.spec.weight_grad import WeightGradProblem
from tests.layer.test_nn_gpu import no_wait, no_warning, randn

pytestmark = pytest.mark.gpu

E, K, N = 8, 256, 192
SIZES = {"ragged": [70, 0, 1, 129, 0, 8, 64, 28], "one_hot": [0] * 7 + [300], "no_rows": [0] * 8}


def images() -> set[tuple[Problem, Config]]:
    """Every (problem, config) that these tests may run: products and gradients."""
    offs = torch.zeros(E, dtype=torch.int32)
    k_dense, n_dense = torch.empty(E, N, K).bfloat16(), torch.empty(E, K, N).bfloat16().mT
    problems: set[Problem] = {
        WeightGradProblem(DType.BF16, DType.BF16, m, n, E) for m, n in ((K, N), (N, K))
    }
    for weight in (k_dense, n_dense):
        problems.add(cm.grouped_matmul_problem(torch.empty(1, K).bfloat16(), weight, offsets=offs))
        turned = weight.transpose(1, 2)
        problems.add(cm.grouped_matmul_problem(torch.empty(1, N).bfloat16(), turned, offsets=offs))
    return {(problem, config) for problem in problems for config in every_config(problem)}


@pytest.mark.parametrize("k_dense", [True, False], ids=["k_dense", "n_dense"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_products_and_gradients(sizes: list[int], k_dense: bool) -> None:
    offs = torch.tensor(sizes, device="cuda").cumsum(0, dtype=torch.int32)
    rows = sum(sizes)
    a = randn(rows, K).requires_grad_()
    weight = (randn(E, N, K, seed=1) if k_dense else randn(E, K, N, seed=1)).requires_grad_()
    grad = randn(rows, N, seed=2)

    def run(a: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        out = cm.grouped_mm(a, weight.transpose(1, 2) if k_dense else weight, offs)
        return (out, *torch.autograd.grad(out, (a, weight), grad))

    run(a, weight)
    with no_warning(), no_wait():
        got = run(a, weight)
    wide_a, wide = (t.detach().double().requires_grad_() for t in (a, weight))
    out = cm.grouped_mm_reference(wide_a, wide.transpose(1, 2) if k_dense else wide, offs)
    want = (out, *torch.autograd.grad(out, (wide_a, wide), grad.double()))
    for mine, right in zip(got, want, strict=True):
        error = (mine.double() - right).norm()
        assert error <= 3e-3 * right.norm()


def test_compiled() -> None:
    offs = torch.tensor(SIZES["ragged"], device="cuda").cumsum(0, dtype=torch.int32)
    a, weight = randn(300, K).requires_grad_(), randn(E, N, K, seed=1).requires_grad_()

    def step(a: Tensor, weight: Tensor) -> Tensor:
        return cm.grouped_mm(a, weight.transpose(1, 2), offs).float().square().mean()

    want = torch.autograd.grad(step(a, weight), (a, weight))
    compiled = torch.compile(step, fullgraph=True)
    for mine, right in zip(
        torch.autograd.grad(compiled(a, weight), (a, weight)), want, strict=True
    ):
        torch.testing.assert_close(mine, right, rtol=2e-2, atol=1e-6)
