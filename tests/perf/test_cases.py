"""Cases, their order, their routing and what they must move."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from cutlass_moe.models import shapes
from perf.cases import (
    BLOCK,
    DTYPES,
    FIGURE_MODELS,
    FIGURE_TOKENS,
    MODELS,
    RAGGED_ROWS,
    Case,
    Load,
    all_cases,
    moved_bytes,
    of_shape,
    select,
)
from perf.routing import draw_topk_ids, load_of
from tests.perf.samples import UP

CASES = all_cases()


def test_every_case_is_there_once() -> None:
    assert len({case.id for case in CASES}) == len(CASES)
    assert set(MODELS) == {*shapes.MODELS, "gpt-oss-20b", "qwen3-30b-tp4"}
    plain = [case for case in CASES if case.suite == "models" and not case.skewed]
    # no layers of fp8_block, nothing of int4_g128
    cut = [shape for shape in MODELS.values() if shape.inter % BLOCK]
    assert len(plain) == 15 * (len(MODELS) * 3 * len(DTYPES) - 4 * len(cut))
    assert {case.tokens for case in plain} == {2**i for i in range(15)}
    special = Counter(case.suite for case in CASES)
    assert (special["seed"], special["tutorial"], special["deepgemm"]) == (6, 9, 16)


def test_the_figure_comes_first() -> None:
    first = CASES[: len(FIGURE_MODELS) * len(FIGURE_TOKENS)]
    assert {(case.part, case.dtype) for case in first} == {("layer", "fp8")}
    assert {(c.model, c.tokens) for c in first} == {
        (m, t) for m in FIGURE_MODELS for t in FIGURE_TOKENS
    }


@pytest.mark.parametrize("most", [200, 350, 500])
def test_wherever_a_budget_ends_the_sample_is_balanced(most: int) -> None:
    some = [case for case in CASES if case.suite == "models" and not case.skewed][15:most]
    by_part = Counter(case.part for case in some)
    assert max(by_part.values()) < 1.8 * min(by_part.values())
    by_dtype = Counter(case.dtype for case in some if case.part == "up")
    assert max(by_dtype.values()) < 2.5 * min(by_dtype.values())
    spans = Counter(min(len(bin(case.tokens)) // 6, 2) for case in some)
    assert min(spans.values()) > len(some) / 6  # of 15 numbers of tokens, 3 are below 8
    assert len({case.model for case in some}) >= len(MODELS) - 2


def test_neighbours_share_their_weights() -> None:
    changes = sum(a.unit != b.unit for a, b in zip(CASES, CASES[1:], strict=False))
    assert changes < len(CASES) / 2.5


def test_selection_keeps_the_order_and_refuses_unknown_names() -> None:
    some = select(models=["mixtral"], parts=["down"], dtypes=["int8", "bf16"], tokens=[1, 8192])
    assert some == [case for case in CASES if case in some]
    assert {(c.model, c.part) for c in some} == {("mixtral", "down")}
    assert len(some) == 4
    for wrong in (
        {"suites": ["x"]},
        {"models": ["x"]},
        {"parts": ["x"]},
        {"dtypes": ["x"]},
        {"tokens": [3]},
    ):
        with pytest.raises(ValueError, match=r"must be one of .*, got "):
            select(**wrong)


def test_products_are_those_of_the_layer() -> None:
    layer = of_shape("mixtral", "layer", "fp8", 16)
    assert layer.products == {"up": (28672, 4096), "down": (4096, 14336)}
    assert of_shape("mixtral", "up", "fp8", 16).products == {"up": (28672, 4096)}
    deepgemm = select(suites=["deepgemm"])
    assert {case.products[case.part] for case in deepgemm} == {
        (6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048),
    }  # fmt: skip
    assert [case.products["up"] for case in select(suites=["seed"], dtypes=["fp8"])] == [
        (2048, 128),
        (2048, 128),
    ]


def test_moved_bytes_count_each_thing_once() -> None:
    load = Load(active_experts=3, max_rows=0, rows64=0)
    rows = 74
    assert moved_bytes(UP, load) == 3 * 128 * 128 + 37 * 128 + rows * 128 * 2
    down = replace(UP, part="down")
    assert moved_bytes(down, load) == 3 * 128 * 64 + rows * 64 + rows * 128 * 2
    layer = replace(UP, part="layer", dtype="bf16")
    assert moved_bytes(layer, load) == 2 * 3 * 3 * 128 * 64 + 2 * 37 * 128 * 2
    assert layer.flops == 2 * rows * 3 * 128 * 64


# Routing


@pytest.mark.parametrize("routing", ["balanced", "zipf", "half"])
def test_routing_is_what_its_name_says(routing: str) -> None:
    case = replace(UP, num_experts=64, top_k=1, tokens=4096, routing=routing)
    ids = draw_topk_ids(case)
    assert torch.equal(ids, draw_topk_ids(replace(case, dtype="bf16", part="layer")))
    least, most = {
        "balanced": (64, 128),
        "zipf": (700, 1000),
        "half": (2048, 2048),
    }[routing]
    assert least <= load_of(case, ids).max_rows <= most


@pytest.mark.parametrize("case", CASES[::40], ids=lambda case: case.id)
def test_every_case_routes_each_token_to_distinct_experts(case: Case) -> None:
    few = replace(case, tokens=min(case.tokens, 64))
    ids = draw_topk_ids(few)
    assert ids.shape == (few.tokens, few.top_k)
    assert ids.min() >= 0 and ids.max() < few.num_experts
    if case.routing not in ("half", "ragged"):
        assert all(len(set(row)) == few.top_k for row in ids.tolist())


@pytest.mark.parametrize("times", [1, 32])
def test_ragged_rows_are_the_tutorials(times: int) -> None:
    rows = tuple(times * row for row in RAGGED_ROWS)
    case = next(case for case in select(suites=["tutorial"]) if case.tokens == sum(rows))
    ids = draw_topk_ids(case)
    assert tuple(torch.bincount(ids.flatten()).tolist()) == rows
    assert not torch.equal(ids, ids.sort(0).values)


def test_load_counts_active_experts_and_whole_blocks_of_rows() -> None:
    case = replace(UP, num_experts=4, top_k=1, tokens=66)
    ids = torch.tensor([[0]] * 65 + [[3]])
    assert load_of(case, ids) == Load(active_experts=2, max_rows=65, rows64=192)
