"""What is made of the results of layers and chains: figures, tables, plots."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from click.testing import CliRunner

from perf import report
from perf.__main__ import main
from perf.layer.cases import MoeLayerCase
from perf.layer.figures import layer_figures
from perf.layer.rows import LayerRow, layer_row_of, layer_tables
from perf.store import ResultFile
from perf.suites import select
from tests.perf.samples import ABOUT


def rows_with(cases: list[MoeLayerCase], us: dict[str, float], **steps: dict) -> list[LayerRow]:
    return [layer_row_of(record_of(case, us, steps), ABOUT, {}) for case in cases]


def record_of(case: MoeLayerCase, us: dict[str, float], steps: dict | None = None) -> dict:
    systems = {
        name: {"us": value, "rounds": [value, 1.1 * value], "error": 0.004}
        for name, value in us.items()
    }
    return {
        "case": asdict(case),
        "workload": {"active_experts": case.layers},
        "systems": systems,
        "steps": steps or {},
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


def test_figures_of_steps_hold_copies_and_route_to_their_bounds() -> None:
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
    store = ResultFile(tmp_path / "gpu.json", ABOUT)
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
    figure = (tmp_path / "gpu-layer.svg").read_text()
    assert "our own Triton pipeline" in figure and figure.count("1.50x") == 15
    assert len(figure) < 60_000
    summary = report.summary(store.contents, list(store.contents["cases"]), 20)
    assert "layer, tokens" in summary and "chain, tokens" in summary
