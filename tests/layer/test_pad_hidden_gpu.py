"""Layers whose hidden size is no multiple of 16 bytes, by kernels."""

from __future__ import annotations

import pytest
import torch

import cutlass_moe as cm
from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.layer.checks import problems_of
from emitters.spec.registry import Config, Problem
from tests.layer.test_pad_hidden import CASES, arguments, each_case, pad, split
from tests.support.layer_cases import LIMITS
from tests.support.numerics import same_bits

pytestmark = pytest.mark.gpu


def images() -> set[tuple[Problem, Config]]:
    asked = [problems_of(*split(pad(arguments(*case, "cpu", 5)))) for case in CASES]
    problems = {problem for layer in asked for problem in layer if problem}
    return {(problem, config) for problem in problems for config in every_config(problem)}


@each_case
@pytest.mark.parametrize("count", [1, 70])
def test_padded_layers_by_kernels(
    hidden: int, quant: str | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the reference on experts as they came; also in a graph."""
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    given = arguments(hidden, quant, "cuda", count)
    wide = pad(given)
    out = cm.fused_moe(**wide)
    want = cm.fused_moe_reference(**given, compute_dtype=torch.float64)
    assert (out.double() - want).norm() <= 1.5 * LIMITS[quant, None] * want.norm()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = cm.fused_moe(**wide)
    graph.replay()
    assert same_bits(again, out)
