"""Operands that kernels cannot read where they lie: the answers are those of plain ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.operands import Operands
from cutlass_moe.ops._copies import at_address
from cutlass_moe.ops.dispatch import operand_addresses
from cutlass_moe.runtime import fallback
from emitters.spec.epilogue import Bias
from tests.support.cases import BF16, FP32, SCALES, Case, make_inputs
from tests.support.layouts import LAYOUTS, MISALIGNED, misaligned, padded, plain, strided
from tests.support.numerics import naive_gradients, poisoned, same_bits

EIGHT_BIT = Case(tokens=9, counts=(4, 0, 7), n=24, k=32, epilogue=(*SCALES, Bias(FP32)), spare=2)
FLOAT = replace(EIGHT_BIT, operand=BF16)
CASES = {"fp8": EIGHT_BIT, "bf16": FLOAT}
each_layout = pytest.mark.parametrize(
    ("name", "layout"), LAYOUTS, ids=[f"{name}, {layout}" for name, layout in LAYOUTS]
)


@pytest.fixture(autouse=True)
def _told_nothing_yet() -> Iterator[None]:
    fallback.announce_copy.cache_clear()
    yield


def owned(case: Case, product: Tensor) -> Tensor:
    return product[case.owned]


def both(case: Case, name: str, layout: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call with this layout, and the plain call that it must equal."""
    inputs = make_inputs(case, "cpu")
    given = LAYOUTS[name, layout](inputs[name])
    return {**inputs, name: given}, {**inputs, name: plain(name, given, inputs)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@each_layout
def test_the_product_is_that_of_plain_operands(case: Case, name: str, layout: str) -> None:
    given, plain_call = both(case, name, layout)
    before = given[name].clone()
    want = owned(case, cm.grouped_matmul(**plain_call))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # the second finds its signature
            assert same_bits(owned(case, cm.grouped_matmul(**given)), want)
        out = torch.empty(case.rows, case.n, dtype=torch.bfloat16)
        cm.grouped_matmul_out(out, **given)
    assert same_bits(owned(case, out), want)
    assert torch.equal(given[name].double(), before.double())


@each_layout
def test_problems_and_references_take_them_too(name: str, layout: str) -> None:
    given, plain_call = both(FLOAT, name, layout)
    problem, of_plain = cm.grouped_matmul_problem(**given), cm.grouped_matmul_problem(**plain_call)
    if name != "scale":  # one scale per expert is another problem
        assert problem == of_plain
    want = owned(FLOAT, cm.grouped_matmul_reference(**plain_call))
    assert same_bits(owned(FLOAT, cm.grouped_matmul_reference(**given)), want)


@each_layout
def test_index_group_matmul_takes_them_too(name: str, layout: str) -> None:
    given, plain_call = both(EIGHT_BIT, name, layout)
    got, want = (poisoned(EIGHT_BIT.rows, 24, torch.bfloat16, "cpu") for _ in range(2))
    for out, call in ((got, given), (want, plain_call)):
        cm.index_group_matmul(
            call["x"], call["weight"], call["scale"], call["per_token_scale"], call["offsets"], out,
            index=call["index"], bias=call["bias"],
        )  # fmt: skip
    assert same_bits(got, want)


@each_layout
def test_as_one_compiled_graph(name: str, layout: str) -> None:
    given, plain_call = both(FLOAT, name, layout)
    torch._dynamo.reset()
    compiled = torch.compile(cm.grouped_matmul, fullgraph=True, backend="aot_eager")
    want = owned(FLOAT, cm.grouped_matmul(**plain_call))
    assert same_bits(owned(FLOAT, compiled(**given)), want)


@pytest.mark.parametrize(
    ("name", "layout"),
    [key for key in LAYOUTS if key[0] in ("x", "per_token_scale", "scale", "bias")],
    ids=str,
)
def test_gradients_have_the_shape_and_dtype_of_what_was_given(name: str, layout: str) -> None:
    given, plain_call = both(FLOAT, name, layout)
    given[name] = leaf = given[name].detach().requires_grad_()
    out = cm.grouped_matmul(**given)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    (found,) = torch.autograd.grad(out, [leaf], grad)
    assert (found.shape, found.dtype) == (leaf.shape, leaf.dtype)
    order = ("x", "weight", "per_token_scale", "scale", "bias")
    tensors = {n: t for n, t in plain_call.items() if isinstance(t, Tensor)}
    want = naive_gradients(grad, tensors)[order.index(name)]
    if found.numel() < want.numel():
        want = want.sum(1) if name == "scale" and found.numel() == len(want) else want.sum()
    rtol = 2**-7 if found.dtype != torch.float32 else 1e-4
    torch.testing.assert_close(found.double(), want.reshape(found.shape), rtol=rtol, atol=1e-5)


# Outputs.


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("layout", [padded, strided], ids=["padded", "strided"])
def test_a_strided_out_is_written(case: Case, layout: Any) -> None:
    inputs = make_inputs(case, "cpu")
    plain_out = poisoned(case.rows, case.n, torch.bfloat16, "cpu")
    out = layout(plain_out)
    assert not out.is_contiguous()
    cm.grouped_matmul_out(plain_out, **inputs)
    cm.grouped_matmul_out(out, **inputs)
    assert same_bits(out.contiguous(), plain_out)  # rows of nobody, too


def test_a_strided_out_of_index_group_matmul_is_written() -> None:
    inputs = make_inputs(replace(EIGHT_BIT, epilogue=SCALES), "cpu")
    names = ("x", "weight", "scale", "per_token_scale", "offsets")
    plain_out = poisoned(EIGHT_BIT.rows, 24, torch.bfloat16, "cpu")
    out = padded(plain_out)
    for target in (plain_out, out):
        cm.index_group_matmul(*(inputs[name] for name in names), target, index=inputs["index"])
    assert same_bits(out.contiguous(), plain_out)


# Addresses.


@pytest.mark.parametrize("name", [*MISALIGNED, "out"])
def test_a_misaligned_tensor_is_copied_and_told_of_once(name: str) -> None:
    inputs = make_inputs(FLOAT, "cpu")
    inputs["out"] = poisoned(FLOAT.rows, FLOAT.n, torch.bfloat16, "cpu")
    given = {**inputs, name: misaligned(inputs[name])}
    cm.grouped_matmul_out(**inputs)
    with pytest.warns(UserWarning, match=f"address of {name} is not a multiple of .*every call"):
        cm.grouped_matmul_out(**given)
    assert same_bits(given["out"], inputs["out"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cm.grouped_matmul_out(**given)


@pytest.mark.parametrize("name", [*MISALIGNED, "out"])
def test_a_misaligned_tensor_of_index_group_matmul_is_copied(name: str) -> None:
    inputs = make_inputs(EIGHT_BIT, "cpu")
    arguments = {n: inputs[n] for n in ("x", "weight", "scale", "per_token_scale", "index", "bias")}
    arguments["out"] = poisoned(EIGHT_BIT.rows, 24, torch.bfloat16, "cpu")
    arguments["group_list"] = inputs["offsets"]
    given = {**arguments, name: misaligned(arguments[name])}
    cm.index_group_matmul(**arguments)
    with pytest.warns(UserWarning, match=f"address of {name} is not a multiple"):
        cm.index_group_matmul(**given)
    assert same_bits(given["out"], arguments["out"])


def test_a_misaligned_weight_is_refused() -> None:
    inputs = make_inputs(FLOAT, "cpu")
    cm.grouped_matmul(**inputs)
    inputs["weight"] = misaligned(inputs["weight"])
    wanted = "address of weight must be a multiple of 16 bytes, got 0x.*; a clone"
    with pytest.raises(ValueError, match=wanted):  # of a signature that is known
        cm.grouped_matmul(**inputs)
    with pytest.raises(ValueError, match=wanted):  # and of a new one
        cm.grouped_matmul(**{**inputs, "expected_rows": 77})


# The meta device.


def to_meta(inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: t.to("meta") if isinstance(t, Tensor) else t for n, t in inputs.items()}


@pytest.mark.parametrize("warm", [False, True], ids=["new", "warm"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_meta_tensors_give_the_shape(case: Case, warm: bool) -> None:
    inputs = make_inputs(replace(case, tokens=10 + warm, counts=(3, 1)), "cpu")
    want = cm.grouped_matmul(**inputs) if warm else torch.empty(6, 24, dtype=torch.bfloat16)
    got = cm.grouped_matmul(**to_meta(inputs))
    assert got.is_meta and (got.shape, got.dtype) == (want.shape, want.dtype)
    cm.grouped_matmul_out(got, **to_meta(inputs))
    with pytest.raises(TypeError, match="offsets must be torch.int32"):
        cm.grouped_matmul(**to_meta({**inputs, "offsets": inputs["offsets"].float()}))


@pytest.mark.parametrize("name", ["x", "weight", "index", "offsets", "scale", "bias", "out"])
def test_meta_and_cpu_tensors_do_not_mix(name: str) -> None:
    inputs = make_inputs(EIGHT_BIT, "cpu")
    inputs["out"] = torch.empty(EIGHT_BIT.rows, EIGHT_BIT.n, dtype=torch.bfloat16)
    cm.grouped_matmul_out(**inputs)
    inputs[name] = inputs[name].to("meta")
    with pytest.raises(ValueError, match="must be on (cpu|meta), got one on (cpu|meta)"):
        cm.grouped_matmul_out(**inputs)


def test_meta_tensors_of_the_other_ops() -> None:
    ids = torch.zeros(5, 2, dtype=torch.int32, device="meta")
    table = cm.route(ids, 4)
    assert table.index.is_meta and table.index.shape == (10,)
    weights, chosen = cm.topk_router(torch.empty(5, 8, device="meta"), 2)
    assert weights.is_meta and chosen.shape == (5, 2)
    table, weights, _ = cm.route_logits(torch.empty(5, 8, device="meta"), 2)
    assert table.offsets.is_meta and table.offsets.shape == (8,)
    q, scale = cm.quantize_per_token(torch.empty(5, 8, device="meta"), torch.int8)
    assert q.is_meta and scale.shape == (5,)
    out = cm.combine(torch.empty(10, 8, device="meta"), weights, ids)
    assert out.is_meta and out.shape == (5, 8)
    assert cm.combine(torch.empty(10, 8, device="meta"), weights, ids, out=out) is out


def test_meta_tensors_of_index_group_matmul_are_checked() -> None:
    inputs = to_meta(make_inputs(replace(EIGHT_BIT, epilogue=SCALES), "cpu"))
    names = ("x", "weight", "scale", "per_token_scale", "offsets")
    tensors = [inputs[name] for name in names]
    out = torch.empty(EIGHT_BIT.rows, 24, dtype=torch.bfloat16, device="meta")
    cm.index_group_matmul(*tensors, out, index=inputs["index"])
    with pytest.raises(ValueError, match="out must have shape"):
        cm.index_group_matmul(*tensors, out[1:], index=inputs["index"])
    with pytest.raises(ValueError, match="out must be on meta, got one on cpu"):
        cm.index_group_matmul(*tensors, torch.empty(13, 24), index=inputs["index"])


def test_a_copy_for_the_sake_of_an_address_keeps_the_strides() -> None:
    given = torch.arange(200, dtype=torch.uint8)[1:].as_strided((5, 16), (32, 1))
    with pytest.warns(UserWarning, match="address of x"):
        copy = at_address("x", given)
    assert copy.data_ptr() % 16 == 0 and copy.stride() == (32, 1) and torch.equal(copy, given)


@pytest.mark.parametrize("name", ["x", "weight", "scale", "bias", "out"])
def test_a_misaligned_tensor_is_refused(name: str) -> None:
    buffer = torch.zeros(65)
    given = {**dict.fromkeys(Operands._fields), "out": None, name: buffer[1:]}
    for needed in ("x", "weight", "offsets", "out"):
        given[needed] = buffer[:64] if given[needed] is None else given[needed]
    out = given.pop("out")
    assert out is not None
    multiple = 8 if name in ("scale", "bias") else 16
    words = f"the address of {name} must be a multiple of {multiple} bytes, got 0x"
    with pytest.raises(ValueError, match=words):
        operand_addresses(Operands(**given), out)
