"""Scales that vary along K: what grouped_matmul makes of them and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import cutlass_moe as cm
from cutlass_moe.ops.block_scales import block_granularity
from emitters.spec.dtypes import Accumulation
from emitters.spec.gemm import GemmProblem, Granularity
from tests.support.cases import BLOCK_SWIGLU, BLOCKS, Case, make_inputs

E4M3 = torch.float8_e4m3fn
_CASE = replace(BLOCKS, counts=(3, 0, 5), tokens=6, n=264, k=272)
_GATED = replace(BLOCK_SWIGLU, counts=(3, 0, 5), tokens=6, n=2 * 160, k=272)


def _inputs(case: Case = _CASE, **changes: Any) -> dict[str, Any]:
    inputs = make_inputs(case, "cpu")
    inputs.pop("accumulation")
    return {**inputs, **changes}


@pytest.mark.parametrize(
    ("blocks", "gated", "granularity"),
    [
        ((3, 3), False, Granularity.BLOCK_128),
        ((5, 3), False, Granularity.BLOCK_64),
        ((10, 3), False, Granularity.BLOCK_32),
        ((4, 3), True, Granularity.BLOCK_128),  # two of each half of 160
        ((6, 3), True, Granularity.BLOCK_64),
        ((10, 3), True, Granularity.BLOCK_32),
        ((3, 2), False, None),
        ((320, 1), False, None),
    ],
)
def test_shapes_say_the_granularity(
    blocks: tuple[int, int], gated: bool, granularity: Granularity | None
) -> None:
    weight = torch.empty(2, 320, 300, dtype=E4M3)
    assert block_granularity(torch.empty(2, *blocks), weight, gated) is granularity


def test_one_block_is_one_scale_per_expert() -> None:
    case = replace(BLOCKS, counts=(3, 5), tokens=6, n=64, k=128)
    problem = cm.grouped_matmul_problem(**_inputs(case))
    assert (problem.x_scale, problem.weight_scale) == (Granularity.TOKEN, Granularity.EXPERT)


def test_the_problem_names_the_granularities() -> None:
    problem = cm.grouped_matmul_problem(**_inputs())
    assert problem.x_scale is Granularity.TOKEN_BLOCK
    assert problem.weight_scale is Granularity.BLOCK_128
    assert problem.accumulation is Accumulation.TWO_LEVEL
    assert GemmProblem.from_json(problem.to_json()) == problem
    gated = cm.grouped_matmul_problem(**_inputs(_GATED))
    assert gated.scale_blocks == (4, 3)  # 160 gates are two blocks, and so are 160 ups


def test_scales_of_any_strides_give_the_same() -> None:
    inputs = _inputs()
    scale = inputs["per_token_scale"]
    expected = cm.grouped_matmul(**inputs)
    turned = scale.T.contiguous().T  # [K / 128, T] in memory
    assert torch.equal(cm.grouped_matmul(**{**inputs, "per_token_scale": turned}), expected)
    halved = {"per_token_scale": scale.bfloat16(), "scale": inputs["scale"].bfloat16()}
    again = {"per_token_scale": scale.bfloat16().float(), "scale": halved["scale"].float()}
    narrow, wide = (cm.grouped_matmul(**{**inputs, **scales}) for scales in (halved, again))
    assert torch.equal(narrow, wide)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"accumulation": "fast"}, ValueError, "accumulation must be None or 'two_level' for scal"),
        ({"per_token_scale": torch.ones(6)}, ValueError, r"per_token_scale must have shape \(6, 3"),
        ({"per_token_scale": torch.ones(6, 2)}, ValueError, r"shape \(6, 3\), got \(6, 2\)"),
        ({"scale": torch.ones(3, 4, 3)}, ValueError, r"scale must have shape .*\(3, 3, 3\) or .*"),
        ({"scale": torch.ones(3, 264)}, ValueError, r"per_token_scale must have shape \(6,\)"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cm.grouped_matmul(**_inputs(**changes))


def test_interleaved_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="interleaved must be False for scales that vary along K"):
        cm.grouped_matmul(**_inputs(_GATED, interleaved=True))


def test_only_float8_has_them() -> None:
    inputs = _inputs(x=torch.ones(6, 272, dtype=torch.int8))
    inputs["weight"] = torch.ones(3, 264, 272, dtype=torch.int8)
    with pytest.raises(
        TypeError, match="x must be float8 for scales that vary along K, got .*int8"
    ):
        cm.grouped_matmul(**inputs)
