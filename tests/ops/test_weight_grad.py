"""grouped_weight_grad on the CPU: its definition, its contract as an op, its errors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.runtime import fallback
from tests.support.layouts import misaligned, padded, strided
from tests.support.weight_grads import NAN, definition, make_inputs


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    m=st.integers(0, 5),
    n=st.integers(1, 9),
    gathered=st.sampled_from([None, "left", "right"]),
    gaps=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_definition(
    counts: list[int],
    m: int,
    n: int,
    gathered: str | None,
    gaps: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    arguments = make_inputs(counts, m, n, gathered, gaps=gaps, dtype=dtype, seed=seed)
    want = definition(**arguments)
    got = cm.grouped_weight_grad(**arguments)
    assert got.dtype == dtype and torch.equal(got.double(), want)
    for out_dtype in (dtype, torch.float32):
        out = torch.full_like(got, NAN, dtype=out_dtype)
        assert cm.grouped_weight_grad(**arguments, out=out, out_dtype=out_dtype) is out
        assert torch.equal(out.double(), want)
        before = torch.randint(-9, 9, out.shape).to(out_dtype)
        out.copy_(before)
        assert cm.grouped_weight_grad(**arguments, out=out, accumulate=True) is out
        assert torch.equal(out.double(), before.double() + want)
        assert cm.grouped_weight_grad(**arguments, out_dtype=out_dtype).dtype == out_dtype


@pytest.mark.parametrize("gathered", [None, "left", "right"])
def test_it_is_the_gradient_of_grouped_matmul(gathered: str | None) -> None:
    x = torch.randn(7, 8, dtype=torch.bfloat16)
    index = None if gathered is None else torch.tensor([3, 0, 3, 6, 9, -1, 2], dtype=torch.int32)
    weight = torch.randn(3, 16, 8, dtype=torch.bfloat16, requires_grad=True)
    offsets = torch.tensor([2, 2, 6], dtype=torch.int32)
    grad = torch.randn(7, 16, dtype=torch.bfloat16)
    out = cm.grouped_matmul(x, weight, index=index, offsets=offsets)
    (want,) = torch.autograd.grad(out, weight, grad)
    if gathered == "left":  # of weights stored as [E, K, N]
        got = cm.grouped_weight_grad(x, grad, offsets, left_index=index).transpose(1, 2)
    else:
        got = cm.grouped_weight_grad(grad, x, offsets, right_index=index)
    torch.testing.assert_close(got, want)


def test_an_expert_without_rows_gets_zeros_or_nothing() -> None:
    left, right = torch.ones(4, 8).half(), torch.ones(4, 16).half()
    for offsets in ([0, 4, 4], [0, 0, 0]):
        ends, out = torch.tensor(offsets), torch.full((3, 8, 16), NAN).half()
        empty = torch.tensor([0, offsets[1] == 0, 2]) != 1
        cm.grouped_weight_grad(left, right, ends, out=out, accumulate=True)
        assert out[empty].isnan().all()
        cm.grouped_weight_grad(left, right, ends, out=out)
        assert not out[[0, 2]].any() and (out[1] == offsets[1]).all()


def test_sums_are_rounded_once() -> None:
    left = torch.tensor([1, 2**-9]).bfloat16()[:, None].expand(2, 8)
    out = torch.full((1, 8, 8), 256.0).bfloat16()
    ends = torch.tensor([2])
    cm.grouped_weight_grad(left, torch.ones_like(left), ends, out=out, accumulate=True)
    assert (out == 258).all()  # of 257.002; the sum alone, rounded, is 1, and 257 would give 256


def test_reference_is_differentiable_in_float64() -> None:
    left = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    right = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    index, offsets = torch.tensor([0, 3, 3, 7, 1, 2]), torch.tensor([2, 2, 5])

    def product(left: Tensor, right: Tensor) -> Tensor:
        return cm.grouped_weight_grad_reference(left, right, offsets, right_index=index)

    assert torch.autograd.gradcheck(product, (left, right))
    assert cm.grouped_weight_grad_reference(left, right, offsets[:0]).shape == (0, 3, 2)


@pytest.mark.parametrize("gathered", [None, "left", "right"])
def test_op(gathered: str | None) -> None:
    arguments = make_inputs([2, 0, 3], 8, 16, gathered, spare=0)
    names = ("left", "right", "offsets", "left_index", "right_index", "starts")
    tensors = [arguments.get(name) for name in names]
    tensors[:2] = [tensor.nan_to_num() for tensor in tensors[:2]]  # NaNs differ from one another
    torch.library.opcheck(
        torch.ops.cutlass_moe.grouped_weight_grad.default, (*tensors, torch.float32)
    )
    out = torch.zeros(3, 8, 16)
    torch.library.opcheck(
        torch.ops.cutlass_moe.grouped_weight_grad_out.default, (out, *tensors, True, None)
    )


def test_compiled() -> None:
    arguments = make_inputs([2, 0, 3], 8, 16, "right")
    want = cm.grouped_weight_grad(**arguments)
    compiled = torch.compile(cm.grouped_weight_grad, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**arguments), want)
    out = torch.ones(3, 8, 16)
    assert compiled(**arguments, out=out, accumulate=True) is out
    assert torch.equal(out, want.float() + 1)


# What callers hand over in other forms.

GIVEN: dict[str, Callable[[Tensor], Tensor]] = {
    "left": padded,
    "left, every second": strided,
    "right": lambda right: right.T.contiguous().T,
    "right, odd pitch": lambda right: torch.cat([right, right[:, :1]], 1)[:, :-1],
    "offsets": strided,
    "offsets, int64": lambda offsets: offsets.long(),
    "right_index": strided,
    "right_index, int64": lambda index: index.long().where(index >= 0, 2**32),
    "starts, int64": lambda starts: starts.long(),
    "out": padded,
    "out, transposed": lambda out: out.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("accumulate", [False, True], ids=["write", "add"])
@pytest.mark.parametrize("given", GIVEN)
def test_other_forms_give_the_same_sums(given: str, accumulate: bool) -> None:
    arguments = make_inputs([3, 0, 2], 8, 16, "right", gaps=True)
    arguments["out"] = torch.ones(3, 8, 16, dtype=torch.bfloat16)
    name = given.partition(",")[0]
    other = {**arguments, name: GIVEN[given](arguments[name].clone())}
    want = cm.grouped_weight_grad(**arguments, accumulate=accumulate)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cm.grouped_weight_grad(**other, accumulate=accumulate) is other["out"]
    assert torch.equal(other["out"], want)


@pytest.mark.parametrize("name", ["left", "right", "out"])
def test_misaligned_tensors_are_copied_with_one_warning(name: str) -> None:
    fallback.announce_copy.cache_clear()
    arguments = make_inputs([3, 0, 2], 8, 16, "left")
    arguments["out"] = torch.ones(3, 8, 16, dtype=torch.bfloat16)
    want = cm.grouped_weight_grad(**arguments, accumulate=True).clone()
    arguments["out"].fill_(1)
    other = {**arguments, name: misaligned(arguments[name])}
    with pytest.warns(UserWarning, match=f"address of {name} is not a multiple of 16 bytes"):
        assert torch.equal(cm.grouped_weight_grad(**other, accumulate=True), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cm.grouped_weight_grad(**other), want - 1)


LEFT, RIGHT = torch.zeros(6, 8).bfloat16(), torch.zeros(6, 16).bfloat16()
ENDS, INDEX = torch.tensor([2, 5], dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
OUT = torch.zeros(2, 8, 16)
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "float32": ({"left": LEFT.float()}, TypeError, "left must be .* or torch.float16, got torch.f"),
    "other dtype": ({"right": RIGHT.half()}, TypeError, "right must be torch.bfloat16, got torch."),
    "1-D": ({"left": LEFT[0]}, ValueError, r"left must be \[R, M\] .* got \(8,\) and \(6, 16\)"),
    "3-D": ({"right": OUT.bfloat16()}, ValueError, r"right \[R, N\], got \(6, 8\) and \(2, 8, 16"),
    "rows": ({"right": RIGHT[:5]}, ValueError, r"right must have shape \(6, 16\) like left, got"),
    "two indices": ({"left_index": INDEX, "right_index": INDEX}, ValueError, "None, got both"),
    "short left_index": ({"left_index": INDEX[:5]}, ValueError, r"left_index must have shape \(6,"),
    "long right_index": ({"right_index": INDEX.repeat(2)}, ValueError, r"right_index .* got \(12,"),
    "int16": ({"right_index": INDEX.short()}, TypeError, "right_index must be torch.int32, got"),
    "float offsets": ({"offsets": ENDS.float()}, TypeError, "offsets must be torch.int32, got"),
    "no experts": ({"offsets": ENDS[:0]}, ValueError, r"offsets must have shape \(E > 0,\), got"),
    "2-D offsets": ({"offsets": ENDS[None]}, ValueError, r"offsets must .* got \(1, 2\)"),
    "starts": ({"starts": ENDS[:1]}, ValueError, r"starts must have shape \(2,\), got \(1,\)"),
    "narrow out": ({"out": OUT[..., :8]}, ValueError, r"out must have shape \(2, 8, 16\), got"),
    "half out": ({"out": OUT.half()}, TypeError, "out must be torch.bfloat16 or torch.float32, go"),
    "out_dtype": ({"out_dtype": torch.float16}, TypeError, "out_dtype must be torch.bfloat16 or t"),
    "out_dtype of out": (
        {"out": OUT, "out_dtype": torch.bfloat16},
        TypeError,
        "out_dtype must be torch.float32 like out, got torch.bfloat16",
    ),
    "no out": ({"accumulate": True}, ValueError, "out must be given with accumulate=True, got No"),
    "device": ({"offsets": ENDS.to("meta")}, ValueError, "offsets must be on cpu, got one on meta"),
    "type": ({"left": [1.0]}, TypeError, "left must be a tensor, got a list"),
    "type of accumulate": ({"accumulate": 3}, TypeError, "accumulate must be a bool, got 3"),
}


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        cm.grouped_weight_grad(**{"left": LEFT, "right": RIGHT, "offsets": ENDS, **changes})
    assert re.search(message, str(raised.value))


@pytest.mark.parametrize("name", ["left", "right", "out"])
def test_a_gradient_is_not_lost_in_silence(name: str) -> None:
    arguments = {"left": LEFT, "right": RIGHT, "offsets": ENDS, "out": OUT.clone()}
    arguments[name] = arguments[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        cm.grouped_weight_grad(**arguments)
    with torch.no_grad():
        assert not cm.grouped_weight_grad(**arguments).any()


def test_meta_tensors() -> None:
    left, right, ends = (tensor.to("meta") for tensor in (LEFT, RIGHT, ENDS))
    out = cm.grouped_weight_grad(left, right, ends, out_dtype=torch.float32)
    assert out.is_meta and out.shape == (2, 8, 16) and out.dtype == torch.float32
    assert cm.grouped_weight_grad(left, right, ends, out=out, accumulate=True) is out
