"""Prepared calls on the CPU, where the reference stands for the kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cutlass_moe as cm
from tests.support.cases import BASE, FLOAT, make_inputs
from tests.support.numerics import check, poisoned

CASE = replace(BASE, tokens=20, counts=(7, 0, 9), n=24, k=32)


def planned(case=CASE):
    inputs = make_inputs(case, "cpu", exact=True)
    out = poisoned(case.rows, case.n, inputs["out_dtype"], "cpu")
    return inputs, out, cm.plan(**inputs, out=out)


def test_every_call_computes_the_product():
    inputs, out, plan = planned()
    for _ in range(2):
        out[: -CASE.spare] = float("nan")
        assert plan() is out
        check(out, CASE, inputs, exact=True)


def test_what_is_given_anew_stays():
    inputs, out, plan = planned()
    others = make_inputs(CASE, "cpu", exact=True, seed=1)
    new = {name: t for name, t in others.items() if torch.is_tensor(t)}
    into = poisoned(CASE.rows, CASE.n, out.dtype, "cpu")
    for arguments in ({"out": into, **new}, {}):
        into[: -CASE.spare] = float("nan")
        assert plan(**arguments) is into
        check(into, CASE, others, exact=True)
    assert out.isnan().all()


def test_output_of_its_own():
    inputs = make_inputs(CASE, "cpu", exact=True)
    plan = cm.plan(**inputs)
    assert plan() is plan()
    assert torch.equal(plan()[: -CASE.spare], cm.grouped_matmul(**inputs)[: -CASE.spare])


@pytest.mark.parametrize("name", ["x", "weight", "index", "offsets", "scale", "out"])
def test_other_shape_dtype_or_stride(name):
    inputs, out, plan = planned()
    tensor = {**inputs, "out": out}[name]
    wrong = [tensor[:-1], tensor.to(torch.float64), torch.stack([tensor, tensor], -1)[..., 0]]
    for other in wrong:
        with pytest.raises(ValueError, match=rf"{name} must be .* as planned; got {other.dtype}"):
            plan(**{name: other})
    plan()
    check(out, CASE, inputs, exact=True)


def test_argument_that_was_not_planned():
    _, _, plan = planned()
    with pytest.raises(
        TypeError,
        match="name must be one that was planned, x, weight, index, offsets, per_.*, got 'bias'",
    ):
        plan(bias=torch.zeros(3, 24))


def test_no_gradient_is_lost():
    case = replace(FLOAT, tokens=20, counts=(7, 0, 9), n=24, k=32)
    inputs, out, plan = planned(case)
    x = inputs["x"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="a plan has no gradient and x requires one"):
        plan(x)
    with pytest.raises(RuntimeError, match="an argument requires one"):
        cm.plan(**{**inputs, "x": x})
    with torch.no_grad():
        plan(x)
    check(out, case, inputs, exact=True)


def test_planning_checks_as_the_op_does():
    inputs = make_inputs(CASE, "cpu")
    with pytest.raises(TypeError, match="out must be torch.bfloat16, got torch.float32"):
        cm.plan(**inputs, out=torch.empty(CASE.rows, CASE.n))
    with pytest.raises(ValueError, match="x must be a contiguous tensor"):
        cm.plan(**{**inputs, "x": torch.empty(32, 20, dtype=inputs["x"].dtype).t()})


def test_no_rows():
    inputs, out, plan = planned(replace(CASE, counts=(0, 0, 0), spare=0))
    assert plan() is out and out.shape == (0, 24)
