"""Benchmarks, as far as a CPU can tell: cases, floors, checks, files, reports. Nothing is timed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from click.testing import CliRunner

from cutlass_moe import grouped_matmul_problem
from perf import measure, report
from perf.__main__ import main
from perf.cases import (
    ROUTINGS,
    SUITES,
    Case,
    Ceilings,
    Workload,
    draw_topk_ids,
    floor_us,
    moved_bytes,
    select,
    workload,
)
from perf.operands import Operands, Weights, relative_error
from perf.peers import SYSTEMS, Absent, Prepared, aligned_rows, ours
from perf.store import Store, default_path, load
from perf.timing import GRAPH_LAUNCHES, divided, launches_captured, launches_within, summarise

H200 = Ceilings(4424, 4255, 1365, 906, 689, 2.0)
SMALL = Case("gemm", "m", "up", "fp8", num_experts=5, top_k=2, n=48, k=32, tokens=37)
SMALL_CASES = {
    "up": SMALL,
    "down": replace(SMALL, gemm="down"),
    "one token": replace(SMALL, tokens=1),
    "hot": replace(SMALL, routing="hot"),
    "zipf": replace(SMALL, routing="zipf"),
    "every expert": replace(SMALL, top_k=5),
    "int8": replace(SMALL, dtype="int8"),
    "bf16": replace(SMALL, dtype="bf16"),
}
small_cases = pytest.mark.parametrize("case", SMALL_CASES.values(), ids=SMALL_CASES)


def operands_of(case: Case) -> Operands:
    return Operands.of(case, Weights.of(case, "cpu"))


# Cases and their routing


def test_the_whole_table_has_distinct_names_and_shares_weights_among_neighbours() -> None:
    cases = select(SUITES)
    assert len({case.id for case in cases}) == len(cases) == 6 + 8 + 90
    changes = sum(a.weights_id != b.weights_id for a, b in zip(cases, cases[1:], strict=False))
    assert changes + 1 == len({case.weights_id for case in cases})


@pytest.mark.parametrize(
    "wrong",
    [
        {"suites": ["gem"]},
        {"models": ["gpt"]},
        {"dtypes": ["fp4"]},
        {"routings": ["even"]},
        {"tokens": [0]},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_unknown_names_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"expected one of|must be positive"):
        select(**{"suites": ["gemm"], **wrong})


@pytest.mark.parametrize("case", select(SUITES, tokens=(1, 16)), ids=lambda case: case.id)
def test_every_case_routes_each_token_to_distinct_experts(case: Case) -> None:
    few = replace(case, tokens=min(case.tokens, 64))
    ids = draw_topk_ids(few)
    assert ids.shape == (few.tokens, few.top_k)
    assert ids.min() >= 0 and ids.max() < few.num_experts
    assert all(len(set(row)) == few.top_k for row in ids.tolist())


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing_is_what_its_name_says(routing: str) -> None:
    case = replace(SMALL, num_experts=64, top_k=1, tokens=4096, routing=routing)
    ids = draw_topk_ids(case)
    assert torch.equal(ids, draw_topk_ids(replace(case, dtype="bf16")))
    most = {"balanced": (64, 128), "zipf": (700, 1000), "hot": (4096, 4096)}[routing]
    assert most[0] <= workload(case, ids).max_rows <= most[1]


def test_workload_counts_active_experts_and_whole_blocks_of_rows() -> None:
    case = replace(SMALL, num_experts=4, top_k=1, tokens=66)
    ids = torch.tensor([[0]] * 65 + [[3]])
    assert workload(case, ids) == Workload(active_experts=2, max_rows=65, rows64=192)


# Floors


@pytest.mark.parametrize(
    ("name", "active", "expected"),
    [
        ("gemm/qwen3-30b/up/fp8/1/balanced", 8, 5.7),
        ("gemm/dsv3-ep8/down/fp8/1/balanced", 1, 3.3),
        ("gemm/qwen3-30b/up/fp8/8192/balanced", 128, 302.1),
        ("gemm/mixtral/up/fp8/128/balanced", 8, 215.8),
        ("gemm/mixtral/down/fp8/8192/balanced", 8, 1409.6),
        ("gemm/dsv3-ep8/down/fp8/1024/balanced", 32, 110.0),
    ],
)
def test_floor_of_fp8(name: str, active: int, expected: float) -> None:
    (case,) = (case for case in select(["gemm"]) if case.id == name)
    load_ = Workload(active, case.rows, case.rows)
    assert floor_us(case, load_, H200) == pytest.approx(expected, abs=0.05)


def test_floor_of_other_dtypes() -> None:
    case = replace(SMALL, num_experts=8, n=4096, k=4096, tokens=8192)
    load_ = Workload(8, 8192, case.rows)
    floors = {d: floor_us(replace(case, dtype=d), load_, H200) for d in ("fp8", "int8", "bf16")}
    assert floors["int8"] == floors["fp8"] == pytest.approx(2 * 16384 * 4096**2 / 1365e6)
    assert floors["bf16"] == pytest.approx(floors["fp8"] * 1365 / 689)
    by_rows64 = floor_us(case, replace(load_, rows64=2 * case.rows), H200, round_rows=True)
    assert by_rows64 == pytest.approx(2 * floors["fp8"])


def test_moved_bytes_count_each_thing_once() -> None:
    load_ = Workload(active_experts=3, max_rows=0, rows64=0)
    rows = 74
    weights, out = 3 * 48 * 32, rows * 48 * 2
    assert moved_bytes(SMALL, load_) == weights + 37 * 32 + out
    assert moved_bytes(replace(SMALL, gemm="down"), load_) == weights + rows * 32 + out
    bf16 = replace(SMALL, dtype="bf16")
    assert moved_bytes(bf16, load_) == 2 * (weights + 37 * 32) + out


# Operands, checks and peers


@small_cases
def test_expected_rows_are_the_product(case: Case) -> None:
    operands = operands_of(case)
    pairs = operands.order
    token, expert = pairs // case.slots, operands.topk_ids.flatten()[pairs]
    assert torch.equal(expert.sort().values, expert)
    assert operands.index.tolist() == token.tolist()
    product = torch.einsum(
        "rk,rnk->rn", operands.x[token].double(), operands.weight[expert].double()
    )
    if operands.scale is not None and operands.per_token_scale is not None:
        product *= operands.per_token_scale[token, None] * operands.scale[expert]
    assert relative_error(operands.expected(), product[operands.sample]) < 1e-6


@small_cases
def test_case_poses_the_problem_of_the_call(case: Case) -> None:
    operands = operands_of(case)
    posed = grouped_matmul_problem(operands.x, operands.weight, **operands.options)
    assert posed == case.problem


def wrong(broken: float, *arguments: object) -> Prepared:
    prepared = ours(*arguments)
    return replace(prepared, rows=lambda numbers: prepared.rows(numbers) * broken)


def raising(error: Exception, *arguments: object) -> Prepared:
    raise error


@pytest.mark.parametrize(
    ("system", "reason"),
    [
        (ours, None),
        (partial(wrong, 1.02), "WRONG"),
        (partial(wrong, float("nan")), "WRONG"),
        (partial(raising, RuntimeError("broken")), "FAILED: RuntimeError: broken"),
        (partial(raising, Absent("not here")), "not here"),
    ],
    ids=["right", "off by 2%", "NaN", "raises", "absent"],
)
def test_only_systems_with_the_right_product_are_timed(system, reason, monkeypatch) -> None:
    monkeypatch.setitem(SYSTEMS, "it", system)
    operands = operands_of(SMALL)
    measurement = measure.Measurement(SMALL, operands, torch.empty(0))
    measurement.admit("it", operands.expected())
    assert ("it" in measurement.prepared) == (reason is None)
    assert measurement.absent.get("it", "").startswith(reason or "")


@pytest.mark.parametrize("counts", [[0, 3, 0, 130, 128, 0], [1], [0, 0]], ids=str)
def test_aligned_rows(counts: list[int]) -> None:
    offsets = torch.tensor(counts).cumsum(0).int()
    place, experts, padded = aligned_rows(offsets, 128)
    starts, total = {}, 0
    for expert, count in enumerate(counts):
        starts[expert], total = total, total + -(-count // 128) * 128
    assert padded == total
    assert experts.tolist() == [e for e, count in enumerate(counts) for _ in range(count)]
    assert place.tolist() == [starts[e] + i for e, count in enumerate(counts) for i in range(count)]


@small_cases
def test_triton_blocks_hold_every_pair_once_with_its_expert(case: Case) -> None:
    align = pytest.importorskip("perf.triton_moe", exc_type=ImportError).align
    ids = draw_topk_ids(case)
    pairs, experts, padded = align(ids, case.num_experts, 16)
    assert len(pairs) == 16 * len(experts) == padded.item()
    real = pairs < case.rows
    assert pairs[real].sort().values.tolist() == list(range(case.rows))
    expert_of_place = experts.repeat_interleave(16)
    assert torch.equal(ids.flatten()[pairs[real].long()].int(), expert_of_place[real])


# Timing, as arithmetic


def test_summary_of_samples() -> None:
    timing = summarise([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
    assert (timing.us, timing.rounds, timing.samples) == (3.0, (2.0, 4.0), 6)
    assert (timing.p20, timing.p80) == (2.0, 4.0)
    assert timing.spread == pytest.approx(2 / 3)
    assert divided(timing, 2).us == 1.5
    with pytest.raises(ValueError, match="at least one sample"):
        summarise([[1.0], []])


@pytest.mark.parametrize(
    ("seconds", "us", "launches"), [(0.0, 10.0, 3), (1e-3, 33.0, 9), (9.0, 10.0, 50)]
)
def test_launches_fill_a_budget_within_bounds(seconds: float, us: float, launches: int) -> None:
    assert launches_within(seconds, us) == launches


@pytest.mark.parametrize("distinct", [1, 5, 24, 100])
def test_a_graph_takes_each_launch_as_often(distinct: int) -> None:
    assert launches_captured(distinct) % distinct == 0
    assert launches_captured(distinct) >= GRAPH_LAUNCHES


# Files and reports


ABOUT = {
    "commit": "0123456789ab",
    "command": "python -m perf run",
    "versions": {"gpu": "Some GPU", "driver": "1", "cuda": "13.0", "torch": "2", "triton": "3"},
    "ceilings": asdict(H200),
}


def record_of(case: Case, us: dict[str, float], absent: dict[str, str] | None = None) -> dict:
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
    store = Store(tmp_path / "some-gpu.json", ABOUT)
    for case in select(SUITES, ["qwen3-30b"], ["fp8", "bf16"], (1, 1024)):
        case = replace(case, tokens=min(case.tokens, 1024))
        us = {"cutlass_moe": 10.0, "triton": 20.0, "torch": 15.0}
        store.add_case(case.id, record_of(case, us, {"quack": "not importable"}))
    store.add_host("call", {"call": 9.5, "rest": 1.5})
    return store.path


def test_store_keeps_the_latest_record_of_a_case_and_the_runs_in_use(tmp_path) -> None:
    path = tmp_path / "deep" / "gpu.json"
    other = replace(SMALL, dtype="bf16")
    assert default_path("NVIDIA H200").name == "nvidia-h200.json"
    first = Store(path, {**ABOUT, "commit": "first"})
    first.run = "2000-01-01"
    first.contents["runs"] = {"2000-01-01": {"commit": "first"}}
    first.add_case(SMALL.id, record_of(SMALL, {"triton": 1.0}))
    first.add_case(other.id, record_of(other, {"triton": 2.0}))

    second = Store(path, {**ABOUT, "commit": "second"})
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
    with pytest.raises(ValueError, match="expected results"):
        load(path)


def test_row_compares_with_the_best_other_system() -> None:
    case = replace(SMALL, tokens=4096)
    published = {"deepgemm": {"tflops": 1.0}, "triton": {"us": 1.0}}
    record = record_of(case, {"cutlass_moe": 4.0, "triton": 12.0, "torch_gemm": 2.0})
    row = report.row_of(record, ABOUT, published)
    flops_us = 2 * case.rows * case.n * case.k / 1e6
    assert row.us["deepgemm"] == pytest.approx(flops_us)
    assert row.published == {"deepgemm"}  # triton was measured: the run's own figure stands
    assert (row.best_rival, row.speedup) == ("triton", 3.0)
    assert row.tflops("cutlass_moe") == pytest.approx(flops_us / 4)
    lonely = report.row_of(record_of(case, {"triton": 12.0}), ABOUT, {})
    assert (lonely.speedup, lonely.spread) == (None, None)
    assert report.cells(lonely)[-1] == "-"


def test_published_figures_name_cases_and_systems() -> None:
    published = report.published_cases()
    assert set(published) <= {case.id for case in select(SUITES)}
    assert {name for systems in published.values() for name in systems} <= set(report.RIVALS)


def test_the_full_table_fits_what_is_kept_of_a_long_output() -> None:
    us = dict.fromkeys(("cutlass_moe", "triton", "torch", "torch_gemm", "deepgemm"), 3456.7)
    tokens = (1, 16, 128, 1024, 1024)
    cases = [c for t in tokens for c in select(["gemm"], tokens=(t,))]
    table = report.text_table([report.row_of(record_of(c, us), ABOUT, {}) for c in cases])
    assert len(table.splitlines()) == 91
    assert len(table) < 11_000


def test_summary_says_loudly_what_failed_and_ends_with_the_table(results) -> None:
    contents = load(results)
    ids = list(contents["cases"])[:3]
    contents["cases"][ids[1]]["absent"]["torch"] = "WRONG: relative error 0.5"
    lines = report.summary(contents, ids, 5).splitlines()
    assert lines[0] == f"WRONG: relative error 0.5: torch (cases: 1, first {ids[1]})"
    assert lines[1].startswith("not importable: quack (cases: 3")
    assert [line.split()[0] for line in lines[-6:-2]] == ["model", "e8", "e64", "e8"]
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
    assert "not importable: quack (cases: 28" in full
    assert "call 9.5" in full
    plots = sorted(path.name for path in tmp_path.glob("*.png"))
    assert plots == ["some-gpu-qwen3-30b-bf16.png", "some-gpu-qwen3-30b-fp8.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in plots)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--suite", "nope"], "suite 'nope'"),
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


def test_published_json_states_its_source() -> None:
    contents = json.loads(report.PUBLISHED.read_text())
    assert "H200" in contents["source"]
    assert contents["ceilings"]["read_gbs"] == 4424
