"""Prepared calls on the CPU, where the reference stands for the kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cutlass_moe as cm
from emitters.spec.gemm import Granularity
from tests.support.cases import BASE, FLOAT, make_inputs
from tests.support.numerics import check, poisoned, same_bits

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
    with pytest.raises(ValueError, match=r"weight must be .* got \(3, 24, 16\)"):
        cm.plan(**{**inputs, "weight": inputs["weight"][..., :16]})


# What grouped_matmul copies; a scale that takes only a view is served.


def misaligned(tensor):
    """The same values at an address that is 2 bytes off."""
    room = torch.empty(tensor.nbytes + 18, dtype=torch.uint8)
    start = -room.data_ptr() % 16 + 2
    return room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


STALE = {
    "x": lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1],
    "index": lambda index: index.long(),
    "offsets": lambda offsets: offsets.long(),
    "per_token_scale": lambda scale: scale[:1].expand(len(scale)),
    "scale": lambda scale: scale.bfloat16(),
    "out": lambda out: torch.stack([out, out], 1)[:, 0],
}


@pytest.mark.parametrize("name", STALE)
def test_a_plan_keeps_no_copies(name):
    inputs, out, _ = planned()
    tensors = {**inputs, "out": out}
    wanted = f"{name} must be a contiguous tensor for a plan, .*because a copy would go stale: got"
    with pytest.raises(ValueError, match=wanted):
        cm.plan(**{**tensors, name: STALE[name](tensors[name])})


@pytest.mark.parametrize("name", ["x", "weight", "out"])
def test_misaligned_tensors_are_refused_on_every_device(name):
    case = replace(FLOAT, tokens=20, counts=(7, 0, 9), n=24, k=32)
    inputs, out, plan = planned(case)
    tensors = {**inputs, "out": out}
    tensor = misaligned(tensors[name])
    wanted = f"the address of {name} must be a multiple of 16 bytes"
    for call in (lambda: cm.plan(**{**tensors, name: tensor}), lambda: plan(**{name: tensor})):
        with pytest.raises(ValueError, match=wanted):
            call()


def test_rows_of_x_at_a_stride_are_read_in_place():
    inputs, out, _ = planned()
    x = torch.cat([inputs["x"]] * 2, 1)[:, :32]
    plan = cm.plan(**{**inputs, "x": x}, out=out)
    x.zero_()
    assert not plan()[: -CASE.spare].any()
    x.copy_(inputs["x"])
    plan()
    check(out, CASE, inputs, exact=True)


def test_a_scale_per_expert_may_be_a_column():
    case = replace(CASE, epilogue=(Granularity.TOKEN, Granularity.EXPERT))
    inputs, out, _ = planned(case)
    cm.plan(**{**inputs, "scale": inputs["scale"][:, None]}, out=out)()
    check(out, case, inputs, exact=True)


def test_meta_tensors_are_refused():
    inputs = {n: t.to("meta") if torch.is_tensor(t) else t for n, t in planned()[0].items()}
    with pytest.raises(ValueError, match="x must be on the CPU or a GPU for a plan, got .* meta"):
        cm.plan(**inputs)


REFUSED = {
    "wrong x": lambda new: {"x": new["x"][:-1]},
    "wrong index": lambda new: {"x": new["x"], "out": new["out"], "index": new["index"].long()},
    "wrong out": lambda new: {"x": new["x"], "out": new["out"].float()},
    "wrong scale, last": lambda new: {**new, "scale": new["scale"].bfloat16()},
    "unknown name": lambda new: {**new, "bias": torch.zeros(3, 24)},
    "no tensor": lambda new: {**new, "index": None},
}


@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED)
def test_a_refused_call_replaces_nothing(arguments):
    inputs, out, plan = planned()
    plan()
    others = make_inputs(CASE, "cpu", exact=True, seed=1)
    new = {name: t for name, t in others.items() if torch.is_tensor(t)}
    new["out"] = poisoned(CASE.rows, CASE.n, out.dtype, "cpu")
    untouched = new["out"].clone()
    with pytest.raises((TypeError, ValueError)):
        plan(**arguments(new))
    out[: -CASE.spare] = float("nan")
    assert plan() is out
    check(out, CASE, inputs, exact=True)
    assert same_bits(new["out"], untouched)


def test_no_rows():
    inputs, out, plan = planned(replace(CASE, counts=(0, 0, 0), spare=0))
    assert plan() is out and out.shape == (0, 24)
