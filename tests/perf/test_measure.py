"""A run over cases of both kinds, on the CPU. Nothing is timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import cutlass_moe
from perf import measure, systems
from perf.cases import Case
from perf.measure import Broken, measure_all
from perf.operands import ProductInputs, weights_of
from perf.peers import torch_ops
from perf.peers.prepared import Absent, Prepared
from tests.perf.samples import UP

LAYER = replace(UP, part="layer")
OURS = systems.OURS

pytestmark = pytest.mark.filterwarnings("ignore:no kernel")


@pytest.fixture
def run(monkeypatch, no_clocks) -> Callable:
    """`measure_all` on the CPU; made: the units whose weights were made."""
    made: list[tuple[str, ...]] = []

    def make(case: Case):
        made.append(case.unit)
        return weights_of(case, "cpu")

    def fused_moe(hidden, w13, w2, topk_weights, topk_ids, *, out, workspace, **options):
        assert len(workspace) == 64
        out.copy_(
            cutlass_moe.fused_moe_reference(hidden, w13, w2, topk_weights, topk_ids, **options)
        )

    monkeypatch.setattr(measure, "weights_of", make)
    monkeypatch.setattr(cutlass_moe, "fused_moe", fused_moe)
    monkeypatch.setattr(cutlass_moe, "fused_moe_workspace_size", lambda *_, **__: 64)

    def run(cases: list[Case], *wanted: str, broken=(), budget: float = 100.0):
        records = dict(measure_all(cases, wanted, dict(broken), budget))
        return json.loads(json.dumps({case.id: each for case, each in records.items()})), made

    return run


def only(monkeypatch, make: Callable, kind: dict = systems.PRODUCTS) -> None:
    """Puts one system in place of a peer."""
    monkeypatch.setitem(kind, "torch", make)


def test_cases_of_both_kinds_are_measured_and_share_weights(run) -> None:
    cases = [UP, replace(UP, tokens=3), LAYER, replace(LAYER, dtype="bf16")]
    records, made = run(cases, OURS, "vllm")
    assert list(records) == [case.id for case in cases]
    assert made == [UP.unit, LAYER.unit, cases[3].unit]
    for case in cases:
        record = records[case.id]
        assert Case(**record["case"]) == case
        assert record["systems"][OURS]["us"] == 10.0
        assert 0 < record["systems"][OURS]["error"] < 2e-2
        assert set(record["systems"] | record["absent"]) == {OURS, "vllm"}


@pytest.mark.parametrize("dtype", ["fp8", "int8", "bf16", "mxfp4", "int4_g128"])
@pytest.mark.parametrize("part", ["up", "down"])
def test_our_products_are_right(run, dtype: str, part: str) -> None:
    case = replace(UP, dtype=dtype, part=part, inter=128)
    records, _ = run([case], OURS)
    assert list(records[case.id]["systems"]) == [OURS]


def test_no_case_is_begun_after_the_budget(run) -> None:
    assert run([UP], budget=0.0) == ({}, [])


def test_what_is_wrong_fails_or_is_left_unwritten_is_not_timed(run, monkeypatch) -> None:
    def wrong(inputs: ProductInputs, quick) -> Prepared:
        return Prepared(lambda: None, lambda rows: torch.ones(len(rows), inputs.n))

    def unwritten(inputs: ProductInputs, quick) -> Prepared:
        out = inputs.new_out(inputs.case.rows, inputs.n)
        return Prepared(lambda: None, lambda rows: out[rows])

    def failing(inputs: ProductInputs, quick) -> Prepared:
        raise RuntimeError("out of memory")

    def absent(inputs: ProductInputs, quick) -> Prepared:
        raise Absent("not importable: x")

    for make, reason in (
        (wrong, "WRONG: relative error 1"),
        (unwritten, "WRONG: relative error nan"),
        (failing, "FAILED: RuntimeError: out of memory"),
        (absent, "not importable: x"),
    ):
        only(monkeypatch, make)
        records, _ = run([UP], OURS, "torch")
        assert list(records[UP.id]["systems"]) == [OURS]
        assert records[UP.id]["absent"]["torch"].startswith(reason)


def test_a_layer_must_be_right_when_its_graph_is_replayed(run, monkeypatch) -> None:
    def once(inputs, quick) -> Prepared:
        """Writes its output the first time alone, as if the graph had missed the launch."""
        out, calls = torch.full_like(inputs.hidden, torch.nan), []

        def launch() -> None:
            calls.append(1)
            if len(calls) == 1:
                everything = inputs.picked
                inputs.picked = torch.arange(len(out))
                out.copy_(inputs.expected())
                inputs.picked = everything

        return Prepared(launch, lambda t: out[t], clear=lambda: out.fill_(torch.nan))

    only(monkeypatch, once, systems.LAYERS)
    records, _ = run([LAYER], "torch")
    assert records[LAYER.id]["absent"]["torch"].startswith("WRONG: relative error nan")


def test_a_peer_that_breaks_the_gpu_ends_the_run_and_is_not_run_again(run, monkeypatch) -> None:
    def breaking(inputs: ProductInputs, quick) -> Prepared:
        raise RuntimeError("illegal memory access")

    only(monkeypatch, breaking)
    monkeypatch.setattr(measure, "alive", lambda: False)
    with pytest.raises(Broken, match="torch: FAILED: RuntimeError: illegal") as raised:
        run([UP], OURS, "torch")
    assert (raised.value.case, raised.value.system) == (UP, "torch")
    broken = {UP.id: {"torch": raised.value.reason}}
    records, _ = run([UP], OURS, "torch", broken=broken)
    assert records[UP.id]["absent"] == broken[UP.id]


def test_a_case_that_breaks_while_it_is_timed_is_left_out(run, monkeypatch) -> None:
    def breaking(*_):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(measure, "interleaved", breaking)
    with pytest.raises(Broken, match="timing: FAILED: illegal") as raised:
        run([UP], OURS)
    broken = {UP.id: {raised.value.system: raised.value.reason}}
    assert run([UP], OURS, broken=broken)[0] == {}


def test_padded_products_are_right(run, monkeypatch) -> None:
    scaled = torch._scaled_mm

    def scaled_mm(a, b, scale_a, scale_b, *, out_dtype, use_fast_accum):
        product = (a.double() @ b.double()) * scale_a.double() * scale_b.double()
        return product.to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    ways = torch_ops._ways
    monkeypatch.setattr(torch_ops, "_ways", lambda *given: ways(*given)[:1])
    assert scaled is not scaled_mm
    cases = [replace(UP, suite="tutorial", dtype=dtype) for dtype in ("fp8", "int8", "bf16")]
    records, _ = run(cases, "padded_bmm")
    assert all(list(record["systems"]) == ["padded_bmm"] for record in records.values())
    (other,) = run([UP], "padded_bmm")[0].values()
    assert other["absent"] == {"padded_bmm": "measured on the tutorial's shapes only"}
