"""The forms of test_accept.py by kernels: equal bits, errors, graphs, and nothing that waits."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.layer.accept import conversions, convert
from cutlass_moe.layer.checks import problems_of
from cutlass_moe.operands import FP8_BLOCK, LayerOperands, LayerOptions
from emitters.spec.registry import Config, Problem
from tests.support.layer_cases import ALL_QUANTS, LIMITS, SMALL, tokens, weights
from tests.support.layer_forms import FORMS

pytestmark = pytest.mark.gpu
MORE: dict[str, tuple[str | None, dict[str, Any]]] = {  # other ways to ask, with their quant
    "clamped": (None, {"limit": 0.5, "alpha": 1.5, "beta": 0.25}),
    "clamped_int8": ("int8", {"limit": 0.5}),
    "geglu_tanh": ("int8", {"activation": "geglu_tanh"}),
    "weighted": (None, {"reduce": "weighted"}),
    "unweighted": ("fp8", {"reduce": "none"}),
    "max_rows": (None, {"max_rows": 700}),
    "max_rows_int8": ("int8", {"max_rows": 33}),
    "static": ("fp8", {"hidden_scale": 0.02, "active_scale": 0.05}),
    "static_int8": ("int8", {"hidden_scale": 0.04, "active_scale": 0.01}),
    "batch_invariant": (None, {"batch_invariant": True}),
    "batch_invariant_fp8": ("fp8", {"batch_invariant": True}),
    "batch_invariant_blocks": (FP8_BLOCK, {"batch_invariant": True}),
}


def arguments(count: int, quant: str | None, device: str = "cuda", **others: Any) -> dict[str, Any]:
    plain = {**tokens(SMALL, count, device), **weights(SMALL, quant, device), "quant": quant}
    for name, value in others.items():
        plain[name] = torch.tensor([value], device=device) if name.endswith("_scale") else value
    return plain


def images() -> set[tuple[Problem, Config]]:
    found: set[tuple[Problem, Config]] = set()
    asked = [form.make(arguments(5, form.quant, "cpu")) for form in FORMS.values()]
    asked += [(arguments(5, quant, "cpu", **others),) for quant, others in MORE.values()]
    one = arguments(5, None, "cpu")
    ones = {name: one[name][:, :1].contiguous() for name in ("topk_ids", "topk_weights")}
    asked.append((one | ones,))
    for given in (given for pair in asked for given in pair):
        options = LayerOptions(**{n: given[n] for n in LayerOptions._fields if n in given})
        layer = LayerOperands(**{n: given.get(n) for n in LayerOperands._fields})
        layer = convert(layer, conversions(layer, options))
        for problem in filter(None, problems_of(layer, options)):
            found |= {(problem, config) for config in every_config(problem)}
    return found


def error(out: Tensor, given: dict[str, Any]) -> float:
    expected = cm.fused_moe_reference(**given, compute_dtype=torch.float64)
    return float((out.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("count", [1, 6, 300])
@pytest.mark.parametrize("name", FORMS)
def test_forms_mean_the_same(name: str, count: int) -> None:
    form = FORMS[name]
    plain, given = form.make(arguments(count, form.quant))
    want = cm.fused_moe(**plain)
    assert error(want, plain) < 1.5 * LIMITS[form.quant, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if form.warns else "error")
        got = cm.fused_moe(**given)
    assert torch.equal(got.view(want.shape), want)


@pytest.mark.parametrize("count", [1, 6, 300])
@pytest.mark.parametrize("name", MORE)
def test_other_ways_to_ask(name: str, count: int) -> None:
    quant, others = MORE[name]
    given = arguments(count, quant, **others)
    out = cm.fused_moe(**given)
    assert error(out, given) < 1.5 * LIMITS[quant, None]
    assert torch.equal(cm.fused_moe(**given), out)


@pytest.mark.parametrize("quant", [None, "int8"])
def test_overflow_is_counted_on_the_device_in_a_graph(quant: str | None) -> None:
    overflow = torch.full((1,), -7, dtype=torch.int32, device="cuda")
    given = arguments(300, quant, max_rows=100, overflow=overflow)
    out = torch.empty_like(given["hidden"])
    cm.fused_moe(**given, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cm.fused_moe(**given, out=out)
    for last in (300, 10, 50):
        given["topk_ids"].copy_(arguments(300, quant)["topk_ids"])
        given["topk_ids"][last:] = -1
        graph.replay()
        rows = int((given["topk_ids"] >= 0).sum())
        assert overflow.item() == max(0, rows - 100)
        kept = cm.route(given["topk_ids"], len(given["w2"])).inverse < 100
        ids = given["topk_ids"].where(kept, -1)
        assert torch.equal(out, cm.fused_moe(**arguments(300, quant) | {"topk_ids": ids}))


def test_weight_on_input() -> None:
    given = arguments(40, None)
    one = {name: given[name][:, :1].contiguous() for name in ("topk_ids", "topk_weights")}
    out = cm.fused_moe(**given | one, weight_on_input=True)
    assert error(out, given | one | {"weight_on_input": True}) < 1.5 * LIMITS[None, None]


@pytest.mark.parametrize("quant", ALL_QUANTS)
def test_batch_invariant_results_do_not_depend_on_the_batch(quant: str | None) -> None:
    given = arguments(512, quant, batch_invariant=True)
    whole = cm.fused_moe(**given)
    for first, last in ((0, 1), (3, 8), (100, 164), (0, 511)):
        part = {n: given[n][first:last] for n in ("hidden", "topk_ids", "topk_weights")}
        assert torch.equal(cm.fused_moe(**given | part), whole[first:last])
