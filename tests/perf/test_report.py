"""Results on disk, what is made of them, and the command line of the benchmarks."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from emitters.spec.config_sm90 import GemmSm90Config
from perf import report
from perf.__main__ import README, main
from perf.images import images_of
from perf.product.cases import SCHEDULES, ProductCase
from perf.product.figures import product_figures
from perf.product.routing import draw_topk_ids, workload
from perf.product.rows import RIVALS, ProductRow, product_row_of
from perf.rows import PUBLISHED, load_published
from perf.store import RESULTS, ResultFile, default_path, load
from perf.suites import SUITES, select
from tests.perf.samples import ABOUT, H200, PRODUCTS, SMALL

ROOT = Path(__file__).parents[2]


def record_of(
    case: ProductCase, us: dict[str, float], absent: dict[str, str] | None = None
) -> dict:
    figures = {
        name: {"us": value, "rounds": [value, 1.1 * value], "graph_us": 0.9 * value}
        for name, value in us.items()
    }
    load_ = workload(case, draw_topk_ids(case))
    return {
        "case": asdict(case),
        "workload": asdict(load_),
        "systems": figures,
        "absent": absent or {},
    }


@pytest.fixture
def results(tmp_path):
    """A results file with one model's fp8 and bf16 products and the shapes of another suite."""
    store = ResultFile(tmp_path / "some-gpu.json", ABOUT)
    suites = [suite for suite in PRODUCTS if suite != "decode"]
    for case in select(suites, ["qwen3-30b"], ["fp8", "bf16"], (1, 1024)):
        case = replace(case, tokens=min(case.tokens, 1024))
        us = {"cutlass_moe": 10.0, "triton": 20.0, "torch": 15.0}
        store.add_case(case.id, record_of(case, us, {"quack": "not importable"}))
    store.add_host("call", {"call": 9.5, "rest": 1.5})
    return store.path


def test_store_keeps_the_latest_record_of_a_case_and_the_runs_in_use(tmp_path) -> None:
    path = tmp_path / "deep" / "gpu.json"
    other = replace(SMALL, dtype="bf16")
    assert default_path("NVIDIA H200").name == "nvidia-h200.json"
    first = ResultFile(path, {**ABOUT, "commit": "first"})
    first.run = "2000-01-01"
    first.contents["runs"] = {"2000-01-01": {"commit": "first"}}
    first.add_case(SMALL.id, record_of(SMALL, {"triton": 1.0}))
    first.add_case(other.id, record_of(other, {"triton": 2.0}))

    second = ResultFile(path, {**ABOUT, "commit": "second"})
    second.add_case(SMALL.id, record_of(SMALL, {"triton": 3.0}))
    contents = load(path)
    assert contents["cases"][SMALL.id]["systems"]["triton"]["us"] == 3.0
    assert {run["commit"] for run in contents["runs"].values()} == {"first", "second"}
    second.add_case(other.id, record_of(other, {"triton": 4.0}))
    assert [run["commit"] for run in load(path)["runs"].values()] == ["second"]
    assert [file.name for file in path.parent.iterdir()] == ["gpu.json"]


def test_store_refuses_other_files(tmp_path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="must hold results"):
        load(path)


def test_row_compares_with_the_best_other_system() -> None:
    case = replace(SMALL, tokens=4096)
    published = {"deepgemm": {"tflops": 1.0}, "triton": {"us": 1.0}}
    record = record_of(case, {"cutlass_moe": 4.0, "triton": 12.0, "torch_gemm": 2.0})
    row = product_row_of(record, ABOUT, published)
    flops_us = 2 * case.rows * case.n * case.k / 1e6
    assert row.us["deepgemm"] == pytest.approx(flops_us)
    assert row.published == {"deepgemm"}  # triton was measured: the run's own figure stands
    assert (row.best_rival, row.speedup) == ("triton", 3.0)
    assert row.tflops("cutlass_moe") == pytest.approx(flops_us / 4)
    lonely = product_row_of(record_of(case, {"triton": 12.0}), ABOUT, {})
    assert (lonely.speedup, lonely.spread) == (None, None)
    assert report.cells(lonely)[-1] == "-"


def rows_with(
    cases: list[ProductCase], us: dict[str, float], **published: dict
) -> list[ProductRow]:
    return [product_row_of(record_of(case, us), ABOUT, published) for case in cases]


def figures_of(rows: list[ProductRow]) -> dict:
    return {figure.name: figure for figure in product_figures(rows)}


def test_figures_of_prefill_against_peers() -> None:
    one, two = select(["gemm"], ["mixtral"], ["fp8"], (1, 1024, 8192))[1:3]
    rows = rows_with([one], {"cutlass_moe": 10.0, "triton": 20.0, "torch": 9.0})
    rows += rows_with([two], {"cutlass_moe": 10.0, "triton": 45.0, "torch_gemm": 5.0})
    rows += rows_with(select(["gemm"], ["mixtral"], ["fp8"], (1, 32768)), {"cutlass_moe": 1.0})
    found = figures_of(rows)
    assert found["fp8: triton / ours"].cells[1:6] == ["3.000", "2.000", "-", "2", "2"]
    assert found["fp8: best peer / ours"].ratios == {one_name(one): 0.9, one_name(two): 4.5}
    assert found["fp8: best peer / ours"].cells[5:] == ["1", one_name(one)]
    assert found["fp8: torch_gemm / ours"].ratios == {one_name(two): 0.5}
    assert not any(name.startswith(("int8", "bf16")) for name in found)


def one_name(case: ProductCase) -> str:
    return f"{case.model} {case.gemm} {case.dtype} {case.tokens}"


def test_figures_mark_published_peers() -> None:
    (case,) = select(["deepgemm"])[:1]
    (row,) = rows_with([case], {"cutlass_moe": 1e3}, deepgemm={"tflops": 1000.0})
    ((name, ratio),) = figures_of([row])["deepgemm / ours, its own shapes"].ratios.items()
    assert name.endswith("32768†")
    assert ratio == pytest.approx(2 * 32768 * 6144 * 7168 / 1e18 * 1e6)


def test_figures_against_floors_and_dense_rate() -> None:
    cases = select(["gemm"], ["mixtral"], ["fp8", "bf16"], (1024, 8192))
    rows = rows_with(cases, {"cutlass_moe": 5000.0})
    found = figures_of(rows)
    dense_rate = "bf16: dense / ours, 512 rows an expert, the run's ceilings"
    above, below = (f"{span}, published ceilings" for span in ("T >= 8192", "T < 8192"))
    assert len(found[f"all: floor64 / ours, {above}"].ratios) == 4
    assert len(found[f"bf16: floor64 / ours, {below}"].ratios) == 2
    up = next(r for r in rows if (r.case.dtype, r.case.gemm, r.case.tokens) == ("bf16", "up", 8192))
    dense = found[dense_rate].ratios
    assert set(dense) == {"mixtral up bf16 8192", "mixtral down bf16 8192"}
    flops64 = 2 * up.load.rows64 * 28672 * 4096
    assert dense[up.name] == pytest.approx(flops64 / 689e6 / 5000.0)
    slow = replace(H200, bf16_tflops=344.5, fp8_tflops=1, read_gbs=1)
    slower = figures_of([replace(row, ceilings=slow) for row in rows])
    assert slower[dense_rate].ratios[up.name] == pytest.approx(2 * dense[up.name])
    published = f"all: floor64 / ours, {above}"
    assert slower[published].ratios == found[published].ratios


def test_figures_of_int8_and_of_skew_take_the_slowest() -> None:
    rows = []
    for case in select(["gemm", "schedules"], ["mixtral"], tokens=(8192,)):
        up = case.gemm == "up"
        us = {"fp8": 100.0, "int8": 104.0 if up else 98.0, "bf16": 200.0}[case.dtype]
        us *= {"balanced": 1.0, "zipf": 1.2 if up else 1.1, "half": 0.9}[case.routing]
        rows += rows_with([case], {"cutlass_moe": us})
    found = figures_of(rows)
    assert found["int8 / fp8, ours"].ratios == {
        "mixtral up int8 8192": 1.04,
        "mixtral down int8 8192": 0.98,
    }
    assert found["int8 / fp8, ours"].cells[2] == "1.040"
    assert found["zipf / balanced, ours"].cells[1:5] == ["1.149", "1.200", "-", "6"]
    assert found["half / balanced, ours"].cells[2] == "0.900"


def test_figures_of_few_tokens_and_whether_they_meet_their_targets() -> None:
    cases = select(["decode"], ["mixtral"], ["fp8"])
    us = {"triton": 11.6, "torch": 20.0, "stream": 9.5}
    rows = [
        *rows_with([c for c in cases if c.tokens <= 4], {**us, "cutlass_moe": 10.0}),
        *rows_with([c for c in cases if 4 < c.tokens <= 8], {**us, "cutlass_moe": 11.7}),
        *rows_with([c for c in cases if c.tokens > 8], {**us, "cutlass_moe": 9.8}),
    ]
    found = figures_of(rows)
    verdicts = {name.removeprefix("fp8: "): figure.verdict for name, figure in found.items()}
    assert verdicts["best peer / ours, T <= 4"] == ">= 1.15 met"
    assert verdicts["best peer / ours, T 8..512"] == ">= 1.03 met"
    assert verdicts["ours / stream, T < 16"] == "<= 1.10 met"
    assert verdicts["ours / stream, T >= 16"] == "<= 1.04 met"
    assert verdicts["ours / stream, zipf"] == "<= 1.05 met"
    assert verdicts["best peer / stream, T <= 512"] == ">= 1.00 each met"
    within = found["fp8: best peer, with our spread / ours, T <= 512"]
    assert within.verdict == ">= 1.00 each met"  # 1% slower, with a spread of 10%
    slower = [replace(row, us={**row.us, "cutlass_moe": 13.0}) for row in rows]
    assert all("MISSED" in f.verdict for n, f in figures_of(slower).items() if "/ ours, T" in n)


def test_bf16_is_held_against_the_best_of_triton_and_torch() -> None:
    cases = select(["decode"], ["mixtral"], ["bf16"])
    rows = rows_with(cases, {"cutlass_moe": 10.0, "triton": 10.4, "torch": 11.0, "quack": 9.0})
    figure = figures_of(rows)["bf16: best of triton, torch / ours, T <= 512"]
    assert figure.verdict == ">= 1.03 met"
    assert set(figure.ratios.values()) == {1.04}


def test_figures_of_the_tutorial() -> None:
    cases = select(["tutorial"], dtypes=["fp8"])
    found = figures_of(rows_with(cases, {"cutlass_moe": 400.0, "padded_bmm": 600.0}))
    padded = found["fp8: padded_bmm / ours, tutorial, ragged"]
    assert padded.ratios == {f"e8 4096x2048 fp8 {t} ragged": 1.5 for t in (1060, 33920)}
    (ratio,) = found["fp8: dense / ours, tutorial"].ratios.values()
    assert 1.0 < ratio / (2 * 32768 * 4096 * 2048 / 1365e6 / 400.0) < 1.02


def test_schedules_stand_side_by_side() -> None:
    cases = select(["schedules"], ["mixtral"])[:3]
    rows = rows_with(cases[:1], {"cutlass_moe": 10.0, "static": 11.0})
    rows += rows_with(cases[1:], {"cutlass_moe": 12.0, "static": 13.0})
    lines = [report.schedule_lines(rows)[i] for i in (0, 1, 2)]
    static = report.SCHEDULES_HEADER.index("static")
    assert [line[static] for line in lines] == ["11.0", "13.0", "13.0"]
    assert [line[-1] for line in lines] == ["-", "1.20", "1.20"]
    assert [header[0] for header, _ in report.tables(rows, [])] == ["schedules", "figure"]


def test_published_figures_name_cases_and_systems() -> None:
    published = load_published()["cases"]
    assert set(published) <= {case.id for case in select(SUITES)}
    assert {name for systems in published.values() for name in systems} <= set(RIVALS)


def test_the_full_table_fits_what_is_kept_of_a_long_output() -> None:
    us = dict.fromkeys(("cutlass_moe", "triton", "torch", "torch_gemm", "deepgemm"), 3456.7)
    tokens = (1, 16, 128, 1024, 1024)
    cases = [c for t in tokens for c in select(["gemm"], tokens=(t,))]
    (table, *_) = report.tables([product_row_of(record_of(c, us), ABOUT, {}) for c in cases], [])
    table = report.text_table(*table)
    assert len(table.splitlines()) == 91
    assert len(table) < 11_000


def test_summary_says_loudly_what_failed_and_ends_with_the_table(results) -> None:
    contents = load(results)
    ids = list(contents["cases"])[:3]
    contents["cases"][ids[1]]["absent"]["torch"] = "WRONG: relative error 0.5"
    lines = report.summary(contents, ids, 5).splitlines()
    assert lines[0] == f"WRONG: relative error 0.5: torch (cases: 1, first {ids[1]})"
    assert lines[1].startswith("not importable: quack (cases: 3")
    assert [line.split()[0] for line in lines[-5:-1]] == ["model", "e8", "e64", "e8"]
    assert lines[-1].startswith("3 of 5 cases, STOPPED by the budget, 1 kinds of FAILED")


def test_readme_table_goes_between_the_markers() -> None:
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.insert(text, "new") == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    with pytest.raises(ValueError, match="markers"):
        report.insert("nothing here", "new")


def test_report_writes_readme_table_and_plots(results, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n{report.BEGIN}\n{report.END}\nend\n")
    answer = CliRunner().invoke(
        main, ["report", "--results", str(results), "--readme", str(readme)]
    )
    assert answer.exit_code == 0, answer.output
    text = readme.read_text()
    assert text.startswith("# Title\n") and text.endswith("end\n")
    assert "| qwen3-30b up | 10.0 (1.50) | 10.0 (1.50) |" in text
    assert "torch 15.0 | 1.50 |" in text
    full = results.with_suffix(".md").read_text()
    assert "qwen3-30b up fp8 1024" in full
    assert "| bf16: torch / ours | 1.500 | 1.500 | - | 2 | 2 |" in full
    assert "| qwen3-30b up fp8 1024 half |" in full
    assert "not importable: quack (cases: 44" in full
    assert "call 9.5" in full
    assert not list(tmp_path.glob("*.svg"))  # no layers
    plots = sorted(path.name for path in tmp_path.glob("*.png"))
    assert plots == ["some-gpu-qwen3-30b-bf16.png", "some-gpu-qwen3-30b-fp8.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in plots)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--suite", "nope"], "got 'nope'"),
        (["build", "--tokens", "many"], "many"),
        (["report"], "results"),
    ],
    ids=" ".join,
)
def test_command_line_says_what_is_wrong(arguments, message, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("perf.__main__.need_gpu", lambda: None)
    monkeypatch.setattr("perf.store.RESULTS", tmp_path)
    answer = CliRunner().invoke(main, arguments)
    assert answer.exit_code != 0
    assert message in answer.output


def test_build_compiles_what_each_schedule_launches(monkeypatch) -> None:
    config = GemmSm90Config(64, 64)
    monkeypatch.setattr("cutlass_moe.choose.heuristics_sm90.candidates", lambda problem: (config,))
    monkeypatch.setattr(
        "cutlass_moe.choose.heuristics_sm90.choose",
        lambda problem, tokens, rows, schedule: replace(config, group_m=SCHEDULES.index(schedule)),
    )
    case = select(["schedules"])[0]
    assert images_of([replace(case, suite="gemm")]) == [(case.problem, config)]
    groups = [config.group_m for _, config in images_of([case])]
    assert groups == [config.group_m, *range(len(SCHEDULES))]


def test_committed_tables_are_of_the_committed_results() -> None:
    """`python -m perf report` wrote them."""
    (path,) = RESULTS.glob("*.json")
    contents = load(path)
    rows = report.rows_of(contents)
    text = README.read_text()
    assert report.insert(text, report.readme_table(contents, *rows)) == text
    assert path.with_suffix(".md").read_text() == report.full_report(contents, *rows)
    assert path.with_name(f"{path.stem}-layer.svg").name in (ROOT / "README.md").read_text()


def test_published_json_states_its_source() -> None:
    contents = json.loads(PUBLISHED.read_text())
    assert "H200" in contents["source"]
    assert contents["ceilings"]["read_gbs"] == 4424
