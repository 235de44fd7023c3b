"""A run over cases of both kinds, and the arrow between their folders. Nothing is timed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from perf import images, measure
from perf.cases import BenchCase
from perf.product import peers
from perf.product.rows import product_row_of
from perf.systems import Admission
from tests.perf.samples import ABOUT, H200, LAYERS, SMALL
from tests.test_house import FILES, ROOT, imports


@pytest.fixture
def run(monkeypatch, no_clocks):
    """`measure_all` on the CPU, where the weights that were made are listed."""
    made = []

    def make(of, case: BenchCase):
        made.append(case.weights_id)
        return of(case, device="cpu")

    kinds = {kind: (partial(make, of), last) for kind, (of, last) in measure.KINDS.items()}
    monkeypatch.setattr(measure, "KINDS", kinds)
    monkeypatch.setattr(measure, "flush_buffer", lambda: torch.empty(0))

    def run(cases: list[BenchCase], *systems: str, budget: float = 100.0):
        records = dict(measure.measure_all(cases, systems, H200, budget))
        return json.loads(json.dumps({case.id: each for case, each in records.items()})), made

    return run


@pytest.mark.filterwarnings("ignore:no kernel")
def test_cases_of_both_kinds_are_measured_in_order_and_share_weights(run) -> None:
    layer = replace(LAYERS[0], suite="chain")  # whose systems include no_pdl
    cases = [SMALL, replace(SMALL, tokens=3), layer]
    records, made = run(cases, "cutlass_moe", "torch", "no_pdl")
    assert list(records) == [case.id for case in cases]
    assert made == [SMALL.weights_id, layer.weights_id]
    product = records[SMALL.id]
    row = product_row_of(product, ABOUT, {})
    assert (row.case, row.us["cutlass_moe"], row.graph_us["cutlass_moe"]) == (SMALL, 10.0, 10.0)
    assert product["systems"]["cutlass_moe"]["error"] < 1e-2
    assert "no_pdl" not in product["systems"] | product["absent"]
    asked = records[layer.id]["systems"] | records[layer.id]["absent"]
    assert set(asked) == {"cutlass_moe", "no_pdl"}


def test_no_case_is_begun_after_the_budget(run) -> None:
    assert run([SMALL], budget=0.0) == ({}, [])


def test_a_product_that_cannot_be_captured_is_timed_without_a_graph(run, monkeypatch) -> None:
    def fail(*_) -> None:
        raise RuntimeError("asks the host")

    monkeypatch.setattr("perf.product.measure.capture", fail)
    monkeypatch.setitem(peers.SYSTEMS, "it", peers.padded_bmm)
    monkeypatch.setattr(peers, "quick_us", lambda *_: 1.0)
    records, _ = run([replace(SMALL, dtype="bf16")], "it")
    ((_, record),) = records.items()
    assert (record["systems"]["it"]["us"], record["systems"]["it"]["graph_us"]) == (10.0, None)
    assert record["absent"] == {"it, captured": "FAILED: RuntimeError: asks the host"}


def test_every_kind_of_case_can_be_measured_and_built() -> None:
    assert set(measure.KINDS) == set(images.KINDS) == set(BenchCase.__subclasses__())


def test_admission_takes_back_what_it_refuses() -> None:
    systems: Admission[str] = Admission(0.1)
    systems.admit("it", lambda: ("system", 0.05))
    assert (systems.admitted, systems.errors) == ({"it": "system"}, {"it": 0.05})
    systems.refuse("it", "WRONG: after all")
    assert (systems.admitted, systems.errors) == ({}, {})
    assert systems.absent == {"it": "WRONG: after all"}


@pytest.mark.parametrize("path", FILES["perf"], ids=lambda path: str(path.relative_to(ROOT)))
def test_layers_know_products_and_not_the_other_way_round(path) -> None:
    if path.parent.name == "product":
        assert not any(name.startswith("perf.layer") for name in imports(path))
    shared = {"cases", "machine", "rows", "store", "systems", "timing"}
    if path.parent.name == "perf" and path.stem in shared:
        assert not any(name.startswith(("perf.layer", "perf.product")) for name in imports(path))
