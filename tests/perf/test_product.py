"""Benchmarks of products, as far as a CPU can tell: cases, floors, peers, checks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from cutlass_moe import grouped_matmul_problem
from perf.product import peers
from perf.product.cases import (
    DECODE_TOKENS,
    RAGGED_ROWS,
    ROUTINGS,
    SCHEDULES,
    ProductCase,
    Workload,
    floor64_us,
    floor_us,
    moved_bytes,
)
from perf.product.measure import ProductMeasurement
from perf.product.operands import ProductTensors, ProductWeights
from perf.product.peers import (
    SYSTEMS,
    PreparedProduct,
    aligned_rows,
    batched_products,
    ours,
    padded_bmm,
    usual_systems,
)
from perf.product.routing import draw_topk_ids, workload
from perf.suites import SUITES, select
from perf.systems import Absent, relative_error
from tests.perf.samples import H200, PRODUCTS, SMALL

SMALL_CASES = {
    "up": SMALL,
    "down": replace(SMALL, gemm="down"),
    "one token": replace(SMALL, tokens=1),
    "hot": replace(SMALL, routing="hot"),
    "zipf": replace(SMALL, routing="zipf"),
    "half": replace(SMALL, routing="half"),
    "every expert": replace(SMALL, top_k=5),
    "int8": replace(SMALL, dtype="int8"),
    "bf16": replace(SMALL, dtype="bf16"),
}
small_cases = pytest.mark.parametrize("case", SMALL_CASES.values(), ids=SMALL_CASES)


def tensors_of(case: ProductCase) -> ProductTensors:
    return ProductTensors.of(case, ProductWeights.of(case, "cpu"))


# Cases and their routing


def test_the_whole_table_has_distinct_names_and_shares_weights_among_neighbours() -> None:
    cases = select(SUITES)
    products = 6 + 8 + 9 + 54 + 2 * 6 * (15 + 1) + 6 * (11 + 1)
    assert len({case.id for case in cases}) == len(cases) == products + 45 + 10
    changes = sum(a.weights_id != b.weights_id for a, b in zip(cases, cases[1:], strict=False))
    assert changes + 1 == len({case.weights_id for case in cases})


def test_decode_is_the_gemm_suite_at_few_tokens() -> None:
    fp8 = select(["decode"], ["mixtral"], ["fp8"])
    assert {case.suite for case in fp8} == {"gemm"}
    zipf = [case for case in fp8 if case.routing == "zipf"]
    assert [(case.gemm, case.tokens) for case in zipf] == [("up", 128), ("down", 128)]
    assert sorted({case.tokens for case in fp8}) == list(DECODE_TOKENS) == [2**i for i in range(10)]
    both = select(["gemm", "decode"], ["mixtral"], ["fp8"])
    assert set(both) == {*fp8, *select(["gemm"], ["mixtral"], ["fp8"])}


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
    with pytest.raises(ValueError, match=r"must be one of|must be positive"):
        select(**{"suites": ["gemm"], **wrong})


@pytest.mark.parametrize("case", select(PRODUCTS, tokens=(1, 16)), ids=lambda case: case.id)
def test_every_case_routes_each_token_to_distinct_experts(case: ProductCase) -> None:
    few = replace(case, tokens=min(case.tokens, 64))
    ids = draw_topk_ids(few)
    assert ids.shape == (few.tokens, few.top_k)
    assert ids.min() >= 0 and ids.max() < few.num_experts
    if case.routing != "half":
        assert all(len(set(row)) == few.top_k for row in ids.tolist())


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing_is_what_its_name_says(routing: str) -> None:
    case = replace(SMALL, num_experts=64, top_k=1, tokens=4096, routing=routing)
    ids = draw_topk_ids(case)
    assert torch.equal(ids, draw_topk_ids(replace(case, dtype="bf16")))
    least, most = {
        "balanced": (64, 128),
        "zipf": (700, 1000),
        "half": (2048, 2048),
        "hot": (4096, 4096),
    }[routing]
    assert least <= workload(case, ids).max_rows <= most


@pytest.mark.parametrize("model", ["qwen3-30b", "mixtral", "dsv3-ep8"])
def test_half_of_all_rows_whatever_the_tokens_take(model: str) -> None:
    case = next(case for case in select(["schedules"], [model]) if case.routing == "half")
    counts = torch.bincount(draw_topk_ids(case).flatten(), minlength=case.num_experts)
    most, others = counts.max(), counts.sort().values[:-1]
    assert most == case.rows / 2
    assert others.sum() == case.rows / 2
    assert others.max() < 3 * max(8, others.float().mean())


@pytest.mark.parametrize("times", [1, 32])
def test_ragged_rows_are_the_tutorials(times: int) -> None:
    rows = tuple(times * row for row in RAGGED_ROWS)
    case = next(case for case in select(["tutorial"]) if case.tokens == sum(rows))
    ids = draw_topk_ids(case)
    assert tuple(torch.bincount(ids.flatten()).tolist()) == rows
    assert not torch.equal(ids, ids.sort(0).values)


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
    by_rows64 = floor64_us(case, replace(load_, rows64=2 * case.rows), H200)
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
def test_expected_rows_are_the_product(case: ProductCase) -> None:
    tensors = tensors_of(case)
    pairs = tensors.order
    token, expert = pairs // case.slots, tensors.topk_ids.flatten()[pairs]
    assert torch.equal(expert.sort().values, expert)
    assert tensors.index.tolist() == token.tolist()
    product = torch.einsum("rk,rnk->rn", tensors.x[token].double(), tensors.weight[expert].double())
    if tensors.scale is not None and tensors.per_token_scale is not None:
        product *= tensors.per_token_scale[token, None] * tensors.scale[expert]
    assert relative_error(tensors.expected(), product[tensors.sample]) < 1e-6


@small_cases
def test_case_poses_the_problem_of_the_call(case: ProductCase) -> None:
    tensors = tensors_of(case)
    posed = grouped_matmul_problem(tensors.x, tensors.weight, **tensors.options)
    assert posed == case.problem


def wrong(broken: float, *arguments: object) -> PreparedProduct:
    prepared = ours(*arguments)
    return replace(prepared, rows=lambda numbers: prepared.rows(numbers) * broken)


def raising(error: Exception, *arguments: object) -> PreparedProduct:
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
    measurement = ProductMeasurement(SMALL, ProductWeights.of(SMALL, "cpu"), torch.empty(0))
    expected, systems = measurement.tensors.expected(), measurement.systems
    systems.admit("it", partial(measurement.attempt, "it", expected))
    assert ("it" in systems.admitted) == (reason is None)
    assert systems.absent.get("it", "").startswith(reason or "")


@pytest.mark.parametrize("counts", [[0, 3, 0, 130, 128, 0], [1], [0, 0]], ids=str)
def test_aligned_rows(counts: list[int]) -> None:
    offsets = torch.tensor(counts).cumsum(0).int()
    targets, experts, padded = aligned_rows(offsets, 128)
    starts, total = {}, 0
    for expert, count in enumerate(counts):
        starts[expert], total = total, total + -(-count // 128) * 128
    assert padded == total
    assert experts.tolist() == [e for e, count in enumerate(counts) for _ in range(count)]
    assert targets.tolist() == [
        starts[e] + i for e, count in enumerate(counts) for i in range(count)
    ]


@small_cases
def test_padded_products_are_the_product(case: ProductCase, monkeypatch) -> None:
    monkeypatch.setattr(peers, "quick_us", lambda *_: 1.0)  # of fp8's ways, the one a CPU has
    tensors = tensors_of(case)
    try:
        prepared = padded_bmm(case, tensors, torch.empty(0))
    except RuntimeError as error:  # torch 2.11's, of scales per row
        if "only supports per-tensor scaling" not in str(error):
            raise
        pytest.skip(f"torch {torch.__version__} scales no rows on the CPU")
    prepared.launch(tensors.weight)
    assert relative_error(prepared.rows(tensors.sample), tensors.expected()) < 1e-2
    most = workload(case, tensors.topk_ids).max_rows
    assert int(prepared.note.split()[1]) - 16 < most <= int(prepared.note.split()[1])


@pytest.mark.parametrize("dtype", ["fp8", "int8", "bf16"])
def test_every_way_of_a_padded_product_is_a_legal_call(dtype: str) -> None:
    case = replace(SMALL, dtype=dtype)
    weight, scale = (
        ProductWeights.of(case, "cpu").weight.to("meta"),
        torch.ones(5, 48, device="meta"),
    )
    x = torch.empty(5, 208, 32, dtype=weight.dtype, device="meta")
    for way in batched_products(dtype, x, torch.ones(5, 208, device="meta"), scale):
        assert [tuple(product.shape) for product in way(weight)] == [(208, 48)] * 5


def test_the_fastest_padded_product_is_taken(monkeypatch) -> None:
    tensors = tensors_of(SMALL)
    us = {"scaled_mm": 2.0, "scaled_grouped_mm": 1.0}
    monkeypatch.setattr(peers, "quick_us", lambda call, flush: us[call.func.__name__])
    assert padded_bmm(SMALL, tensors, torch.empty(0)).note.startswith("scaled_grouped_mm")


def test_schedules_and_padding_are_measured_in_their_suites_alone() -> None:
    systems = {(c.suite, c.tokens): set(usual_systems(c)) for c in select(PRODUCTS)}
    assert systems["schedules", 1024] == {"cutlass_moe", *SCHEDULES}
    assert systems["gemm", 512] == set(SYSTEMS) - {*SCHEDULES, "padded_bmm"}
    assert systems["gemm", 1024] == systems["gemm", 512] - {"stream"}
    assert systems["tutorial", 32768] == systems["gemm", 1024] | {"padded_bmm"}


def test_a_named_schedule_reaches_the_call_and_the_note(monkeypatch) -> None:
    seen = {}
    config = peers.heuristics.choose(SMALL.problem, 37, 14.8)
    monkeypatch.setattr(peers.heuristics, "choose", lambda *_, schedule: config)
    monkeypatch.setattr(
        peers.cutlass_moe, "grouped_matmul_out", lambda *_, **options: seen.update(options)
    )
    tensors = tensors_of(SMALL)
    SYSTEMS["static"](SMALL, tensors, torch.empty(0)).launch(tensors.weight)
    assert seen["schedule"] == "static"
    assert seen["offsets"] is tensors.offsets


@small_cases
def test_triton_blocks_hold_every_pair_once_with_its_expert(case: ProductCase) -> None:
    align = pytest.importorskip("perf.product.triton", exc_type=ImportError).align
    ids = draw_topk_ids(case)
    pairs, experts, padded = align(ids, case.num_experts, 16)
    assert len(pairs) == 16 * len(experts) == padded.item()
    real = pairs < case.rows
    assert pairs[real].sort().values.tolist() == list(range(case.rows))
    expert_of_pair = experts.repeat_interleave(16)
    assert torch.equal(ids.flatten()[pairs[real].long()].int(), expert_of_pair[real])
