"""Results: the file, how runs are merged, the tables and claims made of it, the commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from perf import report, store
from perf.__main__ import main
from perf.cases import FIGURE_MODELS, FIGURE_TOKENS, of_shape, select
from perf.images import images_of, problem_of
from perf.measure import Broken
from perf.rows import claims_of, rows_of
from perf.store import RESULTS, ResultFile, load
from perf.systems import LAYERS, OURS, PRODUCTS
from tests.perf.samples import ABOUT, GPU, H200, RUN, UP, contents_of, record_of
from tests.test_house import ROOT

BEGIN, END = "<!-- perf:begin -->", "<!-- perf:end -->"
LATER = "2026-02-02T03:04:05+00:00"
FEW, SOME, MANY = (of_shape("mixtral", "up", "fp8", t) for t in (4, 64, 4096))
SEED = select(suites=["seed"], dtypes=["fp8"])[0]
LAYERS_OF_FIGURE = [of_shape(m, "layer", "fp8", t) for m in FIGURE_MODELS for t in FIGURE_TOKENS]
MEASURED = contents_of(
    [
        (FEW, {OURS: 10.0, "vllm_best": 12.0, "humming": 11.0}),
        (SOME, {OURS: 10.0, "vllm_best": 9.0, "humming": 11.0}),
        (MANY, {OURS: 100.0, "vllm_best": 130.0, "deepgemm": 125.0}),
        (replace(MANY, routing="zipf"), {OURS: 100.0, "vllm_best": 150.0}),
        (SEED, {OURS: 10.0, "vllm": 8.0}),
        (of_shape("mixtral", "up", "int8", 4), {OURS: 10.0}),
        (of_shape("mixtral", "up", "bf16", 4), {"torch": 10.0}),
        *((case, {OURS: 10.0, "vllm": 20.0, "humming": 15.0}) for case in LAYERS_OF_FIGURE),
    ]
)


def claims(contents: dict) -> dict:
    return {one.name: one for one in claims_of(rows_of(contents))}


# The file


def test_a_run_goes_on_where_it_stopped_and_another_commit_begins_anew(tmp_path) -> None:
    path = tmp_path / "gpu.json"
    first = ResultFile(path, GPU, ABOUT)
    cases = [FEW, SOME, MANY]
    assert first.left(cases) == cases
    first.add_case(SOME.id, record_of(SOME, {OURS: 1.0}))
    first.add_broken(MANY.id, "humming", "FAILED")
    again = ResultFile(path, GPU, ABOUT)
    assert again.left(cases) == [FEW, MANY]
    assert again.contents["broken"] == {MANY.id: {"humming": "FAILED"}}
    other = ResultFile(path, GPU, {**ABOUT, "commit": "other"})
    assert other.left(cases) == [FEW, MANY, SOME]  # never measured ones first
    with pytest.raises(ValueError, match="must hold results of Other GPU, got Some GPU"):
        ResultFile(path, "Other GPU", ABOUT)


def test_a_case_is_replaced_as_a_whole_and_runs_without_cases_are_dropped(tmp_path) -> None:
    path = tmp_path / "gpu.json"
    store.write(path, MEASURED)
    assert load(path) == MEASURED
    results = ResultFile(path, GPU, {**ABOUT, "commit": "new"})
    for case_id in MEASURED["cases"]:
        results.add_case(case_id, {"systems": {}, "absent": {}})
    assert list(load(path)["runs"]) == [results.run]
    assert load(path)["cases"][FEW.id] == {"systems": {}, "absent": {}, "run": results.run}
    lines = path.read_text().splitlines()
    assert len(lines) < len(MEASURED["cases"]) + 20  # a case on a line
    (tmp_path / "no.json").write_text('{"cases": {}}')
    with pytest.raises(ValueError, match="must hold results"):
        load(tmp_path / "no.json")


def test_merged_results_say_which_run_gave_what() -> None:
    other = contents_of([(SOME, {OURS: 5.0}), (UP, {OURS: 6.0})])
    other["runs"] = {LATER: {**ABOUT, "date": LATER}}
    for record in other["cases"].values():
        record["run"] = LATER
    for merged in (store.merge(MEASURED, other), store.merge(other, MEASURED)):
        assert set(merged["runs"]) == {RUN, LATER}
        assert merged["cases"][SOME.id] == other["cases"][SOME.id]
        assert merged["cases"][UP.id]["run"] == LATER
        assert merged["cases"][FEW.id]["run"] == RUN
    with pytest.raises(ValueError, match="must be of one GPU"):
        store.merge(MEASURED, {**other, "gpu": "Other"})


# Claims and tables


def test_claims_name_mean_worst_losses_and_leaders() -> None:
    found = claims(MEASURED)
    products = found["fp8 products"]
    assert products.mean == pytest.approx((1.1 * 0.9 * 1.25) ** (1 / 3))
    assert (products.worst, products.slower, len(products.rows)) == (0.9, 1, 3)
    assert products.leaders == [("humming", 1), ("vllm_best", 1), ("deepgemm", 1)]
    assert found["fp8 products, 1 to 8 tokens"].worst == pytest.approx(1.1)
    assert found["fp8 products, 16 to 256 tokens"].slower == 1
    assert found["fp8 products, 512 to 16,384 tokens"].mean == pytest.approx(1.25)
    assert found["products, skewed routing"].mean == pytest.approx(1.5)
    assert found["products, other shapes"].mean == pytest.approx(0.8)
    assert found["fp8 layers"].mean == pytest.approx(1.5)
    # a case without ours, or without another, has no ratio
    assert not any(name.startswith(("int8", "bf16")) for name in found)


def test_floor_is_the_longer_of_bytes_and_arithmetic() -> None:
    rows = {row.case.id: row for row in rows_of(MEASURED)}
    few, many = rows[FEW.id], rows[MANY.id]
    read = few.load.active_experts * 28672 * 4096 + 4 * 4096 + 8 * 28672 * 2
    assert few.floor == pytest.approx(read / 4424e3)
    assert many.floor == pytest.approx(2 * 8192 * 28672 * 4096 / 1365e6)
    assert H200.tflops("int8") == H200.tflops("fp8_block") == 1365


def test_full_report_names_the_best_in_every_case() -> None:
    text = report.full_report(MEASURED)
    peers = [name for name in PRODUCTS if name not in (OURS, "triton_kernels")]  # for 4 bits
    assert f"| ours | +-% | {' | '.join(peers)} | best | / ours |" in text
    lines = [line for line in text.splitlines() if line.startswith("| mixtral up | ")]
    assert [line.split(" | ")[-2] for line in lines[:3]] == ["humming", "vllm_best", "deepgemm"]
    assert [line.split(" | ")[-1] for line in lines[:3]] == ["1.10 |", "0.90 |", "1.25 |"]
    assert "## fp8, layers" in text and "## int8, products" in text
    assert "humming: not importable: humming (cases: 5, first models/mixtral/up/fp8/4096" in text
    assert "vllm 0.1" in text and "0123456789ab" in text and "22 cases" in text


def test_readme_has_a_column_of_each_gpu_and_says_where_others_are_faster() -> None:
    other = contents_of([(FEW, {OURS: 10.0, "vllm": 30.0})], "Other GPU")
    text = report.readme_part([MEASURED, other])
    assert "| best of the others / ours | Some GPU | Other GPU |" in text
    assert "| fp8 products | 1.07 (0.90; 1 of 3) | 3.00 (3.00; 0 of 1) |" in text
    assert "| fp8 layers | 1.50 (1.50; 0 of 15) | - |" in text
    assert "Where others are faster on an Some GPU: 2 cases." in text
    assert "| seed e8 up | fp8 | 64 | 10.0 | vllm | 8.0 | 0.80 |" in text
    front = report.front_part([MEASURED, other])
    assert "| fp8 layers | 1.50 (1.50; 0 of 15) | - |" in front and "tokens |" not in front


def test_reasons_come_once_and_failures_first() -> None:
    records = {
        "one": {"absent": {"humming": "not\nimportable", "torch": "FAILED: x"}},
        "two": {"absent": {"humming": "not importable"}},
    }
    assert report.reasons(records) == [
        "torch: FAILED: x (cases: 1, first one)",
        "humming: not importable (cases: 2, first one)",
    ]


def test_part_goes_between_the_markers() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert report.insert(text, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(ValueError, match="markers"):
        report.insert("nothing here", "new")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_tables_are_of_the_committed_results(path: Path) -> None:
    """`python -m perf report` wrote them."""
    assert path.with_suffix(".md").read_text() == report.full_report(load(path))
    files = [load(each) for each in sorted(RESULTS.glob("*.json"))]
    text = (ROOT / "perf/README.md").read_text()
    assert report.insert(text, report.readme_part(files)) == text


# Commands


def invoke(*arguments: str):
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty perf/results, and pages to write to."""
    monkeypatch.setattr("perf.__main__.BENCHMARKS", tmp_path / "perf.md")
    for module in ("perf.store", "perf.__main__"):
        monkeypatch.setattr(f"{module}.RESULTS", tmp_path / "results")
    pages = {tmp_path / "perf.md": report.readme_part, tmp_path / "front.md": report.front_part}
    for page in pages:
        page.write_text(f"# Title\n{BEGIN}\n{END}\nend\n")
    monkeypatch.setattr("perf.__main__.PAGES", pages)
    return tmp_path


def test_merge_and_report_write_all_pages(folder) -> None:
    pytest.importorskip("matplotlib")
    assert "there must be results in" in invoke("report").output
    part = folder / "part.json"
    store.write(part, MEASURED)
    assert "22 cases" in invoke("merge", str(part), str(part)).output
    answer = invoke("report")
    assert answer.exit_code == 0, answer.output
    assert {path.name for path in (folder / "results").iterdir()} == {
        "some-gpu.json", "some-gpu.md", "some-gpu-layer.svg", "some-gpu-ratios.svg",
    }  # fmt: skip
    for page in ("perf.md", "front.md"):
        text = (folder / page).read_text()
        assert text.startswith("# Title\n") and text.endswith("end\n")
        assert "| fp8 products | 1.07 (0.90; 1 of 3) |" in text
    assert "1.50x" in (folder / "results/some-gpu-layer.svg").read_text()
    (folder / "front.md").write_text("no markers")
    assert "markers" in invoke("report").output


@pytest.fixture
def gpu(monkeypatch) -> None:
    """A run without a GPU: measuring gives the sample's record."""

    def measure_all(cases, systems, broken, budget):
        for case in cases:
            if "torch" not in broken.get(case.id, {}) and case == SOME:
                raise Broken(case, "torch", "FAILED: illegal address")
            yield case, record_of(case, {OURS: 10.0, "vllm": 20.0})

    monkeypatch.setattr("perf.__main__.need_gpu", lambda: None)
    monkeypatch.setattr("perf.__main__.ceilings", lambda: H200)
    monkeypatch.setattr("perf.__main__.measure_all", measure_all)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: GPU)


def test_run_resumes_after_a_peer_broke_it(gpu, tmp_path) -> None:
    out = tmp_path / "out.json"
    words = "--model mixtral --part up --dtype fp8 --tokens 64,4 --commit abc --out"
    options = words.split(" ")
    first = invoke("run", *options, str(out))
    assert first.exit_code == 3, first.output
    assert "torch: FAILED: illegal address" in first.output
    done = set(load(out)["cases"])
    second = invoke("run", *options, str(out))
    assert second.exit_code == 0, second.output
    assert set(load(out)["cases"]) == {FEW.id, SOME.id}
    assert f"{2 - len(done)} of {2 - len(done)} cases" in second.output
    assert load(out)["runs"].popitem()[1]["commit"] == "abc"
    assert "0 of 0 cases" in invoke("run", *options, str(out)).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--suite", "nope"], "got 'nope'"),
        (["run", "--system", "nope"], "got 'nope'"),
        (["build", "--tokens", "many"], "many"),
        (["merge", "none.json"], "none.json"),
    ],
    ids=" ".join,
)
def test_commands_say_what_is_wrong(gpu, arguments, message, tmp_path) -> None:
    answer = invoke(*arguments)
    assert answer.exit_code != 0
    assert message in answer.output


# Images


def test_images_are_those_that_are_launched() -> None:
    up, down = problem_of(FEW), problem_of(of_shape("mixtral", "down", "fp8", 4))
    assert (up.n, up.k, up.gather, down.gather) == (28672, 4096, True, False)
    assert (up.x_scale, up.weight_scale) == ("token", "channel")
    assert problem_of(of_shape("mixtral", "up", "bf16", 4)).x_scale is None
    assert len(images_of([FEW])) == len(images_of([FEW, FEW])) == 1
    layer = images_of([of_shape("mixtral", "layer", "int8", 4)])
    ops = {type(problem).__name__ for problem, _ in layer}
    assert ops == {"RouteProblem", "QuantizeProblem", "GemmProblem", "CombineProblem"}
    assert sum(type(problem).__name__ == "GemmProblem" for problem, _ in layer) == 2


def test_summary_ends_with_the_number_of_cases() -> None:
    lines = report.summary(MEASURED, [FEW.id, SOME.id], 5).splitlines()
    assert lines[0].split()[:2] == ["case", "tokens"]
    assert lines[1].split()[:4] == ["mixtral", "up", "fp8", "4"]
    assert lines[-1] == "2 of 5 cases"
    assert set(LAYERS) <= set(PRODUCTS)
    assert json.loads(json.dumps(MEASURED)) == MEASURED
