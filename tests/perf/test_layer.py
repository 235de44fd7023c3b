"""Benchmarks of layers and chains, as far as a CPU can tell. Nothing is timed."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import cutlass_moe
from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.models.problems import problems_of_shape
from perf.images import images_of
from perf.layer import steps as layer_steps
from perf.layer.cases import CHAIN_LAYERS, MoeLayerCase, layer_floor_us
from perf.layer.measure import LayerMeasurement, layer_weights
from perf.layer.operands import LayerInputs, LayerWeights, chosen_by_torch, expected
from perf.layer.peers import LAYER_SYSTEMS, usual_layer_systems
from perf.layer.rows import layer_row_of
from perf.product.routing import draw_topk_ids
from perf.suites import select
from perf.systems import Absent
from tests.perf.samples import ABOUT, CHAIN, H200, LAYERS, SHAPE, dense, each_case

NO_FLUSH = torch.empty(0)


def layer_by_fake(hidden, *weights_and_choice, out, workspace, pdl, quant, activation, **options):
    assert workspace.dtype == torch.uint8 and len(workspace) == 64
    assert activation == "swiglu"
    out.copy_(dense(hidden, *weights_and_choice, **options))


@pytest.fixture
def library(monkeypatch, no_clocks) -> SimpleNamespace:
    """The library's layer functions replaced by what a CPU can run."""
    fakes = SimpleNamespace(
        fused_moe=layer_by_fake,
        fused_moe_workspace_size=lambda *_, **__: 64,
        fused_moe_reference=dense,
        topk_router=lambda logits, k, *, pdl: chosen_by_torch(logits, k),
        combine=lambda rows, topk_weights, inverse: (
            rows[inverse.long()] * topk_weights[..., None]
        ).sum(1),
        grouped_matmul=lambda x, weight, activation=None, **_: torch.zeros(
            74, weight.shape[1] // (2 if activation else 1), dtype=torch.bfloat16
        ),
    )
    for name, fake in vars(fakes).items():
        monkeypatch.setattr(cutlass_moe, name, fake, raising=False)
    monkeypatch.delitem(LAYER_SYSTEMS, "triton")
    return fakes


def measured(case: MoeLayerCase) -> dict:
    weights = layer_weights(case, "cpu")
    return LayerMeasurement(case, weights, NO_FLUSH).run((), H200, 0.1)


# Cases and operands


def test_layers_and_chains_are_those_of_the_issues() -> None:
    layers, chains = select(["layer"]), select(["chain"])
    assert len(layers) == 3 * 3 * 5 and len(chains) == 2 * 5
    assert {case.model for case in layers} == {"qwen3-30b", "mixtral", "dsv3-ep8"}
    assert sorted({case.tokens for case in layers}) == [1, 16, 128, 1024, 8192]
    assert sorted({case.tokens for case in chains}) == [1, 2, 4, 16, 32]
    assert {(c.model, c.layers) for c in chains} == {("qwen3-30b", CHAIN_LAYERS)}
    assert "no_pdl" in usual_layer_systems(chains[0])
    assert "no_pdl" not in usual_layer_systems(layers[0])


def test_floor_reads_active_weights_once_or_computes_all_rows() -> None:
    one, many = (MoeLayerCase("layer", "mixtral", "fp8", tokens) for tokens in (1, 8192))
    weights = 2 * 3 * 4096 * 14336
    assert layer_floor_us(one, 2, H200) == pytest.approx((weights + 4 * 4096) / 4424e3)
    flops = 2 * 16384 * 3 * 4096 * 14336
    assert layer_floor_us(many, 8, H200) == pytest.approx(flops / 1365e6)
    chain = MoeLayerCase("chain", "mixtral", "bf16", 1, layers=4)
    assert layer_floor_us(chain, 8, H200) == pytest.approx(4 * (2 * weights + 4 * 4096) / 4424e3)


@each_case
def test_inputs_are_the_same_for_every_dtype_and_route_as_drawn(case: MoeLayerCase) -> None:
    inputs, other = (LayerInputs.of(c, "cpu") for c in (case, replace(case, dtype="bf16")))
    assert torch.equal(inputs.hidden, other.hidden)
    choices = list(inputs.choices(lambda logits: chosen_by_torch(logits, 2)))
    assert len(choices) == case.layers
    for topk_weights, ids in choices:
        assert ids.dtype == torch.int32 and ids.shape == topk_weights.shape == (case.tokens, 2)
        assert torch.allclose(topk_weights.sum(1), torch.ones(case.tokens))
        assert (ids[:, 0] != ids[:, 1]).all() and ids.min() >= 0 and ids.max() < 5
    if case.suite == "layer":
        assert torch.equal(choices[0][1].long(), draw_topk_ids(case.up))
    else:
        assert not torch.equal(choices[0][1], choices[1][1])


@each_case
def test_products_of_random_weights_are_about_normal(case: MoeLayerCase) -> None:
    first, second = LayerWeights.of(case, 1, "cpu"), LayerWeights.of(case, 2, "cpu")
    for w, scale in ((first.w13, first.w13_scale), (first.w2, first.w2_scale)):
        assert (scale is None) == (case.dtype == "bf16")
        values = w.double() * (1 if scale is None else scale[..., None].double())
        columns = torch.randn(w.shape[2], 50, dtype=torch.float64)
        assert 0.7 < float((values @ columns).std()) < 1.4
    assert not torch.equal(first.w13.float(), second.w13.float())


def test_expected_follows_the_chain_and_samples_a_layer(library) -> None:
    weights, inputs = layer_weights(CHAIN, "cpu"), LayerInputs.of(CHAIN, "cpu")
    hidden = inputs.hidden
    for layer, logits in zip(weights, inputs.logits, strict=True):
        choice = chosen_by_torch(logits, 2)
        hidden = dense(hidden.bfloat16(), layer.w13, layer.w2, *choice, residual=hidden.bfloat16(),
                       **layer.options)  # fmt: skip
    assert torch.equal(expected(CHAIN, weights, inputs, inputs.sample()), hidden)
    (case, *_), some = LAYERS, torch.tensor([3, 30])
    weights, inputs = layer_weights(case, "cpu"), LayerInputs.of(case, "cpu")
    every = expected(case, weights, inputs, torch.arange(case.tokens))
    assert torch.allclose(expected(case, weights, inputs, some), every[some])


# Measurements


@each_case
def test_a_measurement_checks_times_and_takes_apart(case: MoeLayerCase, library) -> None:
    record = json.loads(json.dumps(measured(case)))
    assert record["absent"] == {}
    assert all(0 < s["error"] < 5e-3 and s["us"] == 10.0 for s in record["systems"].values())
    row = layer_row_of(record, ABOUT, {})
    if case.suite == "chain":
        assert set(row.us) == {"cutlass_moe", "no_pdl"} and not row.steps
        return
    copied = {"quantize", "quantize_act"} if case.element.quantized else set()
    assert set(row.steps) == {"route", "route_torch", "up", "down", "combine", *copied}
    width = 2 if case.dtype == "bf16" else 1
    if copied:
        assert row.steps["quantize"]["bytes"] == 37 * (32 * (2 + width) + 4)
        assert row.steps["quantize_act"]["bytes"] == 74 * (48 * (2 + width) + 4)
    assert row.steps["combine"]["bytes"] == 74 * 32 * 2 + 74 * 4 * 2 + 37 * 32 * 2


def broken(factor: float):
    def layer(hidden, *tensors, out, **options) -> None:
        layer_by_fake(hidden, *tensors, out=out, **options)
        out *= factor

    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (broken(1.1), "WRONG: relative error"),
        (broken(float("nan")), "WRONG: relative error nan"),
        (lambda *_, **__: None, "WRONG: relative error nan"),
    ],
    ids=["off by 10%", "NaN", "writes nothing"],
)
def test_a_wrong_layer_is_recorded_and_not_timed(layer, reason, library, monkeypatch) -> None:
    monkeypatch.setattr(cutlass_moe, "fused_moe", layer)
    record = measured(LAYERS[1])
    assert record["systems"] == record["steps"] == {}
    assert record["absent"]["cutlass_moe"].startswith(reason)


def test_failures_and_absences_end_no_run(library, monkeypatch) -> None:
    def absent(*_) -> None:
        raise Absent("not here")

    monkeypatch.setitem(LAYER_SYSTEMS, "triton", absent)
    monkeypatch.delattr(cutlass_moe, "combine")
    record = measured(LAYERS[1])
    assert record["absent"]["triton"] == "not here"
    assert record["absent"]["steps"].startswith("FAILED: AttributeError")
    assert set(record["systems"]) == {"cutlass_moe"}


def test_dependent_launch_that_changes_a_bit_counts_for_nothing(library, monkeypatch) -> None:
    def layer(hidden, *tensors, out, pdl, **options) -> None:
        layer_by_fake(hidden, *tensors, out=out, pdl=pdl, **options)
        if pdl:
            out[0, 0] *= 1.01

    monkeypatch.setattr(cutlass_moe, "fused_moe", layer)
    record = measured(CHAIN)
    assert set(record["systems"]) == {"no_pdl"}
    assert record["absent"]["cutlass_moe"].startswith("WRONG: the output is not bitwise")


@pytest.mark.parametrize("moved", [1, 10 << 20, 1 << 30])
def test_copies_exceed_l2_or_fill_the_graph(moved: int) -> None:
    number = len(layer_steps.copies(torch.zeros(1), moved))
    assert number == {1: 24, 10 << 20: 24, 1 << 30: 2}[moved]


def test_build_covers_a_layers_images() -> None:
    for case in (LAYERS[0], CHAIN):
        asked = set(images_of([case]))
        for problem in filter(None, problems_of_shape(SHAPE, case.dtype)):
            assert {(problem, config) for config in every_config(problem)} <= asked
