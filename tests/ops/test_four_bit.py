"""grouped_matmul with packed 4-bit weights, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from emitters.spec.gemm import GemmProblem
from emitters.spec.packing import Packing
from tests.support.cases import PACKED, PACKED_CASES, Case, make_inputs
from tests.support.numerics import check, naive, opcheck, poisoned

SMALL = replace(PACKED, tokens=9, counts=(4, 0, 7), n=64, k=136, spare=0)
FEW = [name for name, case in PACKED_CASES.items() if case.rows * case.n * case.k < 2**26]


@pytest.mark.parametrize("name", FEW)
def test_products_are_those_of_the_definition(name: str) -> None:
    case = PACKED_CASES[name]
    inputs = make_inputs(case, "cpu")
    out = poisoned(case.rows, case.problem.out_columns, inputs["out_dtype"], "cpu")
    cm.grouped_matmul_out(out, **inputs)
    check(out, case, inputs)
    rest = {name: value for name, value in inputs.items() if name != "out_dtype"}
    wanted, owned = naive(**rest), case.owned
    wide = cm.grouped_matmul(**{**inputs, "out_dtype": torch.float32})
    torch.testing.assert_close(wide[owned].double(), wanted[owned], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("interleaved", [False, True])
def test_weights_that_are_packed_again_give_the_same(packing: Packing, interleaved: bool) -> None:
    """bf16 weights that 4 bits hold exactly, in either order of gates and ups."""
    case = replace(PACKED_CASES["gpt_oss_up"], n=128, k=256, packing=packing, counts=(5, 0, 9))
    inputs = make_inputs(case, "cpu", exact=True)
    inputs["interleaved"] = interleaved
    packed = inputs["weight"]
    plain = cm.dequantize_packed(packed, dtype=torch.bfloat16)
    if interleaved:
        plain = plain.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    assert torch.equal(
        cm.grouped_matmul(**inputs), cm.grouped_matmul(**{**inputs, "weight": plain})
    )


def test_problems_name_the_format() -> None:
    for packing in Packing:
        case = replace(SMALL, packing=packing)
        inputs = make_inputs(case, "cpu")
        problem = cm.grouped_matmul_problem(**inputs)
        assert problem == case.problem and problem.weight.packing is packing
        assert str(packing) in problem.words
        assert GemmProblem.from_json(problem.to_json()) == problem


@pytest.mark.parametrize("case", [SMALL, replace(PACKED_CASES["swiglu_few_rows"], spare=0)])
def test_opcheck(case: Case) -> None:
    opcheck(case, "cpu")


def test_compiled() -> None:
    inputs = make_inputs(SMALL, "cpu")
    weight = inputs.pop("weight")

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def product(x: Tensor, weight: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
        return cm.grouped_matmul(x, weight, index=index, offsets=offsets)

    for rows in (9, 5):
        x = inputs["x"][:rows]
        rest = {"index": inputs["index"].clamp(0, rows - 1), "offsets": inputs["offsets"]}
        assert torch.equal(product(x, weight, **rest), cm.grouped_matmul(x, weight, **rest))


def test_plans_take_packed_weights() -> None:
    inputs = make_inputs(SMALL, "cpu")
    first = cm.plan(**inputs)().clone()
    assert torch.equal(first, cm.grouped_matmul(**inputs))
    plan = cm.plan(**inputs)
    other = make_inputs(SMALL, "cpu", seed=1)["weight"]
    assert not torch.equal(plan(weight=other), first)


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("form", ["tensor", "list", "one_expert", "count"])
def test_index_group_matmul(packing: Packing, form: str) -> None:
    counts = (9,) if form == "one_expert" else SMALL.counts
    inputs = make_inputs(replace(SMALL, packing=packing, counts=counts), "cpu")
    weight, groups, kind = inputs["weight"], inputs["offsets"], "cumsum"
    wanted = cm.grouped_matmul(**inputs)
    if form != "tensor":
        weight = list(weight)
    if form == "count":
        groups, kind = torch.tensor(counts), "count"
    out = torch.full_like(wanted, torch.nan)
    rest = {"index": inputs["index"], "group_list_type": kind}
    cm.index_group_matmul(inputs["x"], weight, None, None, groups, out, **rest)
    assert torch.equal(out, wanted)


def test_a_list_of_packed_weights_apart_is_refused() -> None:
    inputs = make_inputs(SMALL, "cpu")
    apart = [one.clone() for one in inputs["weight"]]
    out = torch.empty(11, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="must be slices of one tensor"):
        cm.index_group_matmul(inputs["x"], apart, None, None, inputs["offsets"], out)


WEIGHT = make_inputs(SMALL, "cpu")["weight"]
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "fp16": ({"x": torch.ones(9, 136).half()}, TypeError, "bfloat16 for packed weights, got .*16"),
    "k": ({"x": torch.ones(9, 264).bfloat16()}, ValueError, r"N / 32 > 0, 3, .* K = 264, got"),
    "no_experts": ({"weight": WEIGHT[:0]}, ValueError, "E > 0"),
    "strides": ({"weight": WEIGHT[:, ::2]}, ValueError, "contiguous tensor, got strides"),
    "block_bytes": ({"weight": WEIGHT[..., :2000]}, ValueError, "2112 for int4_g128, 2304 for"),
    "dtype": ({"weight": WEIGHT.view(torch.int8)}, ValueError, "or packed uint8"),
    "interleaved": ({"interleaved": True}, ValueError, "needs a gated activation"),
}


@pytest.mark.parametrize(("change", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = make_inputs(SMALL, "cpu")
    with pytest.raises(error, match=message):
        cm.grouped_matmul(**{**inputs, **change})


def test_there_is_no_gradient() -> None:
    inputs = make_inputs(SMALL, "cpu")
    inputs["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient through packed weights"):
        cm.grouped_matmul(**inputs)
    with torch.no_grad():
        cm.grouped_matmul(**inputs)


def test_what_has_no_kernel_says_why() -> None:
    inputs = make_inputs(SMALL, "cpu")
    assert cm.why_not(**inputs) is None
    gated = {**inputs, "weight": cm.quantize_packed(torch.ones(3, 96, 136), "mxfp4")}
    assert "multiple of 64" in (cm.why_not(**gated, activation="swiglu") or "")
