"""A layer inside vLLM: its tensors on a rank, and the report; nothing is timed, vLLM not needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import cutlass_moe as cm
from perf import vllm_layer
from perf.cases import MODELS, UNPACKED, of_shape
from perf.operands import WORST_ERROR, weights_of


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of eight, and a layer of one rank, of few columns."""
    for name, of in (("rank", "dsv3-ep8"), ("alone", "qwen3-30b")):
        shape = replace(MODELS[of], name=name, hidden=256, inter=128)
        monkeypatch.setitem(MODELS, name, shape)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", UNPACKED)
@pytest.mark.parametrize("model", ["rank", "alone"])
@pytest.mark.parametrize("tokens", [1, 16])
def test_what_is_expected_of_a_rank(model: str, dtype: str, tokens: int) -> None:
    case = of_shape(model, "layer", dtype, tokens)
    inputs = vllm_layer.RankInputs(case, weights_of(case, "cpu"))
    assert inputs.ids.shape == (tokens, 8) and len(inputs.picked) >= 1
    assert (inputs.expert_map is None) == (model == "alone")
    out = cm.fused_moe_reference(
        inputs.hidden,
        inputs.up.w,
        inputs.down.w,
        inputs.topk_weights,
        inputs.ids,
        quant=vllm_layer.quant_of(case),
        w13_scale=inputs.up.scale,
        w2_scale=inputs.down.scale,
        expert_map=inputs.expert_map,
    )
    want = inputs.expected()
    difference = (out[inputs.picked].double() - want).norm() / want.norm()
    assert difference <= WORST_ERROR["layer"][dtype]


@pytest.mark.parametrize("dtype", UNPACKED)
@pytest.mark.parametrize("model", vllm_layer.SERVED)
def test_layers_that_are_measured_have_kernels(model: str, dtype: str) -> None:
    experts = vllm_layer.served(of_shape(model, "layer", dtype, 1))
    assert vllm_layer.serving.why_not(experts, "engine", -1) is None


def record(model: str, **us: float) -> dict[str, Any]:
    systems = {name: {"us": value, "note": f"experts of {name}"} for name, value in us.items()}
    case = vars(of_shape(model, "layer", "int8", 16))
    return {"case": case, "systems": systems, "absent": {} if "vllm" in us else {"vllm": "broke"}}


def test_means_are_geometric_over_what_both_ran() -> None:
    records = [
        record("qwen3-30b", cutlass_moe=10.0, vllm=20.0),
        record("glm-4.5-air", cutlass_moe=20.0, vllm=10.0),
        record("dsv3-ep8", cutlass_moe=5.0),
    ]
    first, second, third, mean = vllm_layer.lines(records)
    assert first == ["qwen3-30b", "int8", "16", "10.0", "20.0", "0.50", "experts of vllm"]
    assert second[5] == "2.00" and third[3:] == ["5.0", "-", "-", "{'vllm': 'broke'}"]
    assert mean == ["mean", "int8", "16", "", "", "1.00", "of 2"]


def test_cases_share_weights_in_turn() -> None:
    cases = vllm_layer.cases(["qwen3-30b", "dsv3-ep8"], ["int8"], [1, 16])
    assert [(case.model, case.tokens) for case in cases] == [
        ("qwen3-30b", 1), ("qwen3-30b", 16), ("dsv3-ep8", 1), ("dsv3-ep8", 16),
    ]  # fmt: skip
