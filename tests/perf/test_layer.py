"""Benchmarks of layers and chains, as far as a CPU can tell. Nothing is timed."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import cutlass_moe
from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.models.problems import problems_of_shape
from cutlass_moe.models.shapes import MODELS, MoeShape
from perf import report
from perf.__main__ import images_of, main
from perf.layer import measure as measure_layers
from perf.layer import peers as layer_peers
from perf.layer.cases import CHAIN_LAYERS, LayerCase, layer_floor_us
from perf.layer.figures import layer_figures
from perf.layer.measure import LayerMeasurement, layer_weights
from perf.layer.operands import LayerInputs, LayerWeights, chosen_by_torch, expected
from perf.layer.peers import LAYER_SYSTEMS, usual_layer_systems
from perf.layer.rows import LayerRow, layer_row_of, layer_tables
from perf.product.cases import draw_topk_ids
from perf.product.operands import relative_error
from perf.product.peers import Absent
from perf.store import Store
from perf.suites import select
from perf.timing import Timing
from tests.perf.test_product import H200
from tests.perf.test_report import ABOUT

SHAPE = MoeShape("small", num_experts=5, top_k=2, hidden=32, inter=48)
DTYPES = ("fp8", "int8", "bf16")
LAYERS = [LayerCase("layer", SHAPE.name, dtype, 37) for dtype in DTYPES]
CHAIN = LayerCase("chain", SHAPE.name, "int8", 3, layers=3)
each_case = pytest.mark.parametrize("case", [*LAYERS, CHAIN], ids=lambda case: case.id)
NO_FLUSH = torch.empty(0)


@pytest.fixture(autouse=True)
def small_shape(monkeypatch) -> None:
    monkeypatch.setitem(MODELS, SHAPE.name, SHAPE)


def dense(
    hidden, w13, w2, topk_weights, topk_ids, *, residual=None, w13_scale=None, w2_scale=None, **_
) -> torch.Tensor:
    """Every expert on every token, in float64; quantises weights alone."""
    up, down = (
        w.double() * (1 if scale is None else scale[..., None].double())
        for w, scale in ((w13, w13_scale), (w2, w2_scale))
    )
    gate, up = torch.einsum("th,enh->etn", hidden.double(), up).chunk(2, -1)
    each = torch.einsum("eti,ehi->eth", torch.nn.functional.silu(gate) * up, down)
    shares = torch.zeros(len(hidden), len(w13), dtype=torch.float64)
    shares.scatter_(1, topk_ids.long(), topk_weights.double())
    out = torch.einsum("te,eth->th", shares, each)
    return out if residual is None else out + residual.double()


class FakeGraph:
    """Replays what was captured by running it again."""

    def __init__(self, launches, number: int) -> None:
        self.launches, self.number = launches, number
        self.replay()

    def replay(self) -> None:
        for i in range(self.number):
            self.launches[i % len(self.launches)]()


def timed(calls, *_) -> dict[str, Timing]:
    return {name: Timing(10.0, 9.0, 11.0, (10.0, 10.5), 5) for name in calls}


def layer_by_fake(hidden, *weights_and_choice, out, workspace, pdl, quant, activation, **options):
    assert workspace.dtype == torch.uint8 and len(workspace) == 64
    assert activation == "swiglu"
    out.copy_(dense(hidden, *weights_and_choice, **options))


@pytest.fixture
def library(monkeypatch) -> SimpleNamespace:
    """The library's layer functions, graphs and clocks replaced by what a CPU can run."""
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
    monkeypatch.setattr(measure_layers, "capture", FakeGraph)
    monkeypatch.setattr(measure_layers, "interleaved", timed)
    monkeypatch.setattr(measure_layers, "captured", timed)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.delitem(LAYER_SYSTEMS, "triton")
    return fakes


def measured(case: LayerCase) -> dict:
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
    one, many = (LayerCase("layer", "mixtral", "fp8", tokens) for tokens in (1, 8192))
    weights = 2 * 3 * 4096 * 14336
    assert layer_floor_us(one, 2, H200) == pytest.approx((weights + 4 * 4096) / 4424e3)
    flops = 2 * 16384 * 3 * 4096 * 14336
    assert layer_floor_us(many, 8, H200) == pytest.approx(flops / 1365e6)
    chain = LayerCase("chain", "mixtral", "bf16", 1, layers=4)
    assert layer_floor_us(chain, 8, H200) == pytest.approx(4 * (2 * weights + 4 * 4096) / 4424e3)


@each_case
def test_inputs_are_the_same_for_every_dtype_and_route_as_drawn(case: LayerCase) -> None:
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
def test_products_of_random_weights_are_about_normal(case: LayerCase) -> None:
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
def test_a_measurement_checks_times_and_takes_apart(case: LayerCase, library) -> None:
    record = json.loads(json.dumps(measured(case)))
    assert record["absent"] == {}
    assert all(0 < s["error"] < 5e-3 and s["us"] == 10.0 for s in record["systems"].values())
    row = layer_row_of(record, ABOUT, {})
    if case.suite == "chain":
        assert set(row.us) == {"cutlass_moe", "no_pdl"} and not row.parts
        return
    copied = {"quantize", "quantize_act"} if case.quantized else set()
    assert set(row.parts) == {"route", "route_torch", "up", "down", "combine", *copied}
    width = 2 if case.dtype == "bf16" else 1
    if copied:
        assert row.parts["quantize"]["bytes"] == 37 * (32 * (2 + width) + 4)
        assert row.parts["quantize_act"]["bytes"] == 74 * (48 * (2 + width) + 4)
    assert row.parts["combine"]["bytes"] == 74 * 32 * 2 + 74 * 4 * 2 + 37 * 32 * 2


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
    assert record["systems"] == record["parts"] == {}
    assert record["absent"]["cutlass_moe"].startswith(reason)


def test_failures_and_absences_end_no_run(library, monkeypatch) -> None:
    def absent(*_) -> None:
        raise Absent("not here")

    monkeypatch.setitem(LAYER_SYSTEMS, "triton", absent)
    monkeypatch.delattr(cutlass_moe, "combine")
    record = measured(LAYERS[1])
    assert record["absent"]["triton"] == "not here"
    assert record["absent"]["parts"].startswith("FAILED: AttributeError")
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
    number = len(layer_peers.copies(torch.zeros(1), moved))
    assert number == {1: 24, 10 << 20: 24, 1 << 30: 2}[moved]


def test_build_covers_a_layers_images() -> None:
    for case in (LAYERS[0], CHAIN):
        asked = set(images_of([case]))
        for problem in filter(None, problems_of_shape(SHAPE, case.dtype)):
            assert {(problem, config) for config in every_config(problem)} <= asked


# Reports


def rows_with(cases: list[LayerCase], us: dict[str, float], **parts: dict) -> list[LayerRow]:
    return [layer_row_of(record_of(case, us, parts), ABOUT, {}) for case in cases]


def record_of(case: LayerCase, us: dict[str, float], parts: dict | None = None) -> dict:
    systems = {
        name: {"us": value, "rounds": [value, 1.1 * value], "error": 0.004}
        for name, value in us.items()
    }
    return {
        "case": asdict(case),
        "workload": {"active_experts": case.layers},
        "systems": systems,
        "parts": parts or {},
        "absent": {},
    }


def test_figures_of_layers_against_triton() -> None:
    cases = [c for c in select(["layer"], dtypes=["fp8"]) if c.tokens in (1, 128)]
    rows = rows_with([c for c in cases if c.tokens == 1], {"cutlass_moe": 6.0, "triton": 10.0})
    rows += rows_with([c for c in cases if c.tokens == 128], {"cutlass_moe": 9.8, "triton": 10.0})
    rows[0] = replace(rows[0], published=9.0)
    found = {figure.name: figure for figure in layer_figures(rows)}
    assert found["fp8: layer, ours / triton, T = 1"].cells[1:5] == [
        "0.600", "0.600", "<= 0.65 met", "3",
    ]  # fmt: skip
    assert found["fp8: layer, ours / triton, T = 128"].verdict == "<= 0.97 MISSED"
    published = found["fp8: layer, ours / triton's published time, T = 1"]
    assert published.cells[1:5] == ["0.667", "0.667", "<= 0.65 MISSED", "1"]
    assert found["layer, triton / its published time"].verdict == "<= 1.05 each MISSED"
    assert found["fp8: layer, our error / 0.01"].cells[1:4] == [
        "0.400",
        "0.400",
        "<= 1.00 each met",
    ]


def test_figures_of_parts_hold_copies_and_route_to_their_bounds() -> None:
    (case,) = (c for c in select(["layer"], ["qwen3-30b"], ["fp8"]) if c.tokens == 8192)
    moved = 4255 * 10_000  # 10 us at the copy rate
    (row,) = rows_with(
        [case],
        {"cutlass_moe": 1.0},
        quantize={"us": 16.0, "bytes": moved},
        combine={"us": 16.1, "bytes": moved},
        route={"us": 11.0, "bytes": 0},
        route_torch={"us": 44.0, "bytes": 0},
    )
    found = {figure.name: figure for figure in layer_figures([row])}
    assert found["quantize / (1.3 x copy + 3 us)"].verdict == "<= 1.00 each met"
    assert found["combine / (1.3 x copy + 3 us)"].verdict == "<= 1.00 each MISSED"
    assert found["route, T = 8192 / 12 us"].verdict == "<= 1.00 each met"
    assert found["route, torch / ours, T = 8192"].cells[1] == "4.000"
    assert not any("quantize_act" in name for name in found)


def test_figures_of_chains() -> None:
    cases = select(["chain"], dtypes=["int8"])
    us = {"cutlass_moe": 8.0, "no_pdl": 10.0, "triton": 12.0}
    found = {figure.name: figure for figure in layer_figures(rows_with(cases, us))}
    assert {name: figure.verdict for name, figure in found.items()} == {
        "int8: chain, ours / no_pdl, T <= 4": "<= 0.85 each met",
        "int8: chain, ours / triton, T <= 4": "<= 0.70 each met",
        "int8: chain, ours / no_pdl, T 16..32": "<= 0.95 each met",
        "int8: chain, ours / triton, T 16..32": "<= 0.93 each met",
    }


def test_tables_show_what_is_there() -> None:
    (case,), (chain,) = select(["layer"], ["mixtral"], ["fp8"])[:1], select(["chain"])[:1]
    rows = rows_with([case], {"triton": 20.0}, combine={"us": 4.0, "bytes": 8000})
    rows += rows_with([chain], {"cutlass_moe": 8.0, "no_pdl": 10.0})
    (header, (layer,)), (chain_header, (line,)) = layer_tables(rows)
    assert len(layer) == len(header) and len(line) == len(chain_header)
    shown = dict(zip(header, layer, strict=True))
    assert (shown["ours"], shown["triton"], shown["ours / triton"]) == ("-", "20.0", "-")
    assert shown["combine"] == "4.0 (2)"
    assert dict(zip(chain_header, line, strict=True))["ours / no_pdl"] == "0.80"


def test_report_has_layers_chains_and_their_plots(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    store = Store(tmp_path / "gpu.json", ABOUT)
    for case in select(["layer", "chain"], dtypes=["fp8"]):
        us = {"cutlass_moe": 10.0, "triton": 15.0}
        store.add_case(case.id, record_of(case, us))
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    arguments = ["report", "--results", str(store.path), "--readme", str(readme)]
    answer = CliRunner().invoke(main, arguments)
    assert answer.exit_code == 0, answer.output
    text = readme.read_text()
    assert "| tokens | 1 | 16 | 128 | 1024 | 8192 |" in text
    assert "| mixtral fp8 | 10.0 (1.50) |" in text
    assert "| tokens | 1 | 2 | 4 | 16 | 32 |" in text
    full = store.path.with_suffix(".md").read_text()
    assert "fp8: layer, ours / triton, T = 1 " in full and "| qwen3-30b fp8 32 |" in full
    plots = sorted(path.name for path in tmp_path.glob("*.png"))
    assert plots == ["gpu-chain.png", "gpu-layer-fp8.png"]
    summary = report.summary(store.contents, list(store.contents["cases"]), 20)
    assert "layer, tokens" in summary and "chain, tokens" in summary


# The Triton pipeline: on a GPU, or on the CPU where TRITON_INTERPRET=1


@pytest.fixture
def device() -> str:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1")
    return "cpu"


@pytest.mark.parametrize("tokens", [1, 37, 700])
def test_triton_lists_every_pair_once_with_its_expert(device: str, tokens: int) -> None:
    from perf.layer.triton import TritonLayer
    from perf.product.triton import Tiling, align

    ids = draw_topk_ids(LayerCase("layer", SHAPE.name, "bf16", tokens).up).int().to(device)
    ids[ids == 3] = 4  # an expert without rows
    layer = TritonLayer(SHAPE, "bf16", tokens, Tiling(16, 64, 64, 1, 4, 3), torch.device(device))
    for _ in range(2):
        layer.align(ids)
        pairs, experts, padded = align(ids, SHAPE.num_experts, 16)
        assert layer.num_padded.item() == padded.item()
        assert torch.equal(layer.experts[: len(experts)], experts)
        for expert in experts.unique():
            got, want = (
                p[: len(pairs)].view(-1, 16)[experts == expert] for p in (layer.pairs, pairs)
            )
            assert torch.equal(got.flatten().sort().values, want.flatten().sort().values)


def test_triton_chooses_what_torch_chooses(device: str) -> None:
    from perf.layer.triton import topk

    logits = torch.randn(9, 37, device=device)
    weights, ids = topk(logits, 3)
    right = chosen_by_torch(logits, 3)
    assert torch.equal(ids, right[1])
    assert torch.allclose(weights, right[0], atol=1e-6)


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.dtype)
def test_triton_computes_the_layer(case: LayerCase, device: str) -> None:
    from perf.layer.triton import TritonLayer
    from perf.product.triton import Tiling

    if device == "cpu" and case.dtype != "int8":
        pytest.skip("the interpreter multiplies no bf16 and rounds fp8 otherwise")
    weights, inputs = LayerWeights.of(case, 1, device), LayerInputs.of(case, device)
    layer = TritonLayer(SHAPE, case.dtype, 37, Tiling(16, 64, 64, 1, 4, 3), torch.device(device))
    assert inputs.choice is not None
    for residual in (None, inputs.hidden):
        out = torch.full_like(inputs.hidden, torch.nan)
        layer(inputs.hidden, weights, *inputs.choice, out, residual)
        tensors = (inputs.hidden, weights.w13, weights.w2, *inputs.choice)
        options = {name: scale.cpu() for name, scale in weights.options.items()}
        right = dense(
            *(t.cpu() for t in tensors),
            residual=None if residual is None else residual.cpu(), **options,
        )  # fmt: skip
        assert relative_error(out.cpu(), right) < 6e-2  # `dense` quantises no activation
