"""Layers by kernels whose values between the kernels leave the range of float16."""

from __future__ import annotations

import pytest

import cutlass_moe as cm
from cutlass_moe.choose.heuristics_sm90 import every_config
from emitters.spec.registry import Config, Problem
from tests.layer.test_range import RANGES, arguments, each_range, error, problems
from tests.support.layer_cases import LIMITS

pytestmark = pytest.mark.gpu


def images() -> set[tuple[Problem, Config]]:
    asked = [problems(arguments(case, "cpu", 5)) for case in RANGES.values()]
    every = {problem for layer in asked for problem in layer if problem}
    return {(problem, config) for problem in every for config in every_config(problem)}


@each_range
@pytest.mark.parametrize("count", [1, 70, 600])
def test_layers_keep_their_numbers(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    given = arguments(RANGES[name], "cuda", count)
    out = cm.fused_moe(**given)
    assert out.isfinite().all()
    assert error(out, given) <= 1.5 * LIMITS[RANGES[name].quant, None]
