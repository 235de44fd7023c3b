"""Operands that kernels cannot read where they lie, on a GPU: the bits of plain operands."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.runtime import fallback
from emitters.spec.epilogue import Bias
from emitters.spec.gemm import GemmProblem, Granularity
from emitters.spec.registry import GemmConfig
from tests.support.cases import BF16, FP32, SCALES, Case, make_inputs, skewed
from tests.support.layouts import LAYOUTS, MISALIGNED, misaligned, padded, plain
from tests.support.numerics import poisoned, same_bits

pytestmark = pytest.mark.gpu

EIGHT_BIT = Case(tokens=50, counts=skewed(8, 100), epilogue=(*SCALES, Bias(FP32)))
FLOAT = replace(EIGHT_BIT, operand=BF16)
PER_EXPERT = (Granularity.TOKEN, Granularity.EXPERT, Bias(FP32))
CASES = {"fp8": EIGHT_BIT, "bf16": FLOAT}
each_layout = pytest.mark.parametrize(
    ("name", "layout"), LAYOUTS, ids=[f"{name}, {layout}" for name, layout in LAYOUTS]
)


def images() -> set[tuple[GemmProblem, GemmConfig]]:
    """Every (problem, config) that these tests load and others don't."""
    cases = [
        replace(case, epilogue=e) for case in CASES.values() for e in (case.epilogue, PER_EXPERT)
    ]
    return {(case.problem, case.config) for case in cases}


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No reference in a kernel's place; no copy was told of yet."""
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    fallback.announce_copy.cache_clear()
    yield


def both(case: Case, name: str, layout: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call with this layout, and the plain call that it must equal."""
    inputs = make_inputs(case, "cuda")
    given = LAYOUTS[name, layout](inputs[name])
    return {**inputs, name: given}, {**inputs, name: plain(name, given, inputs)}


def check_bits(case: Case, got: Tensor, want: Tensor, name: str, given: Tensor) -> None:
    """One scale per expert is another kernel, which multiplies in another order."""
    got, want = got[case.owned.cuda()], want[case.owned.cuda()]
    if name == "scale" and given.numel() <= len(case.counts):
        torch.testing.assert_close(got.float(), want.float(), rtol=2**-7, atol=1e-3)
    else:
        assert same_bits(got, want)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@each_layout
def test_the_product_is_that_of_plain_operands(case: Case, name: str, layout: str) -> None:
    given, plain_call = both(case, name, layout)
    want = cm.grouped_matmul(**plain_call)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # the second finds its signature
            check_bits(case, cm.grouped_matmul(**given), want, name, given[name])
        out = poisoned(case.rows, case.n, given["out_dtype"], "cuda")
        cm.grouped_matmul_out(out, **given)
    check_bits(case, out, want, name, given[name])


@each_layout
def test_index_group_matmul_takes_them_too(name: str, layout: str) -> None:
    given, plain_call = both(EIGHT_BIT, name, layout)
    got, want = (poisoned(EIGHT_BIT.rows, EIGHT_BIT.n, torch.bfloat16, "cuda") for _ in range(2))
    for out, call in ((got, given), (want, plain_call)):
        cm.index_group_matmul(
            call["x"], call["weight"], call["scale"], call["per_token_scale"], call["offsets"], out,
            index=call["index"], bias=call["bias"],
        )  # fmt: skip
    check_bits(EIGHT_BIT, got, want, name, given[name])


@each_layout
def test_graphs_copy_anew(name: str, layout: str) -> None:
    given, plain_call = both(FLOAT, name, layout)
    want = cm.grouped_matmul(**plain_call)
    cm.grouped_matmul(**given)  # loads the kernel
    value = given[name].clone()
    if 0 not in given[name].stride():
        given[name].zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cm.grouped_matmul(**given)
    if 0 not in given[name].stride():
        given[name].copy_(value)
    graph.replay()
    check_bits(FLOAT, out, want, name, given[name])


@pytest.mark.parametrize("name", [*MISALIGNED, "out"])
def test_a_misaligned_tensor_is_copied_and_told_of_once(name: str) -> None:
    inputs = make_inputs(FLOAT, "cuda")
    inputs["out"] = poisoned(FLOAT.rows, FLOAT.n, torch.bfloat16, "cuda")
    given = {**inputs, name: misaligned(inputs[name])}
    cm.grouped_matmul_out(**inputs)
    with pytest.warns(UserWarning, match=f"address of {name} is not a multiple of .*every call"):
        cm.grouped_matmul_out(**given)
    assert same_bits(given["out"], inputs["out"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cm.grouped_matmul_out(**given)


def test_a_strided_out_is_written() -> None:
    inputs = make_inputs(FLOAT, "cuda")
    plain_out = poisoned(FLOAT.rows, FLOAT.n, torch.bfloat16, "cuda")
    out = padded(plain_out)
    cm.grouped_matmul_out(plain_out, **inputs)
    cm.grouped_matmul_out(out, **inputs)
    assert same_bits(out.contiguous(), plain_out)


def test_a_misaligned_weight_is_refused() -> None:
    inputs = make_inputs(FLOAT, "cuda")
    cm.grouped_matmul(**inputs)
    inputs["weight"] = misaligned(inputs["weight"])
    with pytest.raises(ValueError, match="address of weight must be a multiple of 16 bytes"):
        cm.grouped_matmul(**inputs)


def test_a_refused_call_of_a_plan_replaces_nothing() -> None:
    inputs, others = (make_inputs(FLOAT, "cuda", seed=seed) for seed in (0, 1))
    out = poisoned(FLOAT.rows, FLOAT.n, torch.bfloat16, "cuda")
    plan = cm.plan(**inputs, out=out)
    want = plan().clone()
    with pytest.raises(ValueError, match="index must be .* as planned"):
        plan(others["x"], index=others["index"].long())
    out.zero_()
    owned = FLOAT.owned.cuda()
    assert plan() is out and same_bits(out[owned], want[owned])
    with pytest.raises(TypeError, match="x must be a tensor"):
        plan("text")
