"""The reference against the definition written out row by row, and against autograd of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cutlass_moe.operands import split_product
from cutlass_moe.ops import grouped_matmul_reference as reference
from cutlass_moe.ops.grouped_matmul_reference import (
    grouped_matmul_backward,
    grouped_matmul_reference,
    grouped_matmul_reference_out,
)
from emitters.spec.epilogue import Activation, ActivationFunction, Bias
from emitters.spec.gemm import Granularity
from tests.support.cases import BF16, CASES, FP32, INT8, SCALES, Case, make_inputs
from tests.support.numerics import (
    DIFFERENTIABLE,
    GRADIENTS,
    check,
    errors,
    gradient_inputs,
    naive,
    naive_gradients,
    poisoned,
)

SMALL = {
    "no_tokens": Case(tokens=0, counts=(0, 0), spare=0),
    "no_rows": Case(tokens=5, counts=(0, 0), spare=0),
    "only_spare_rows": Case(tokens=5, counts=(0, 0)),
    "rows_without_tokens": Case(tokens=0, counts=(3, 2), reads="outside"),
    "one_row": Case(tokens=1, counts=(0, 1), spare=0),
    "fp8": Case(tokens=9, counts=(4, 0, 7)),
    "duplicates": Case(tokens=9, counts=(4, 0, 7), reads="few"),
    "outside": Case(tokens=9, counts=(4, 0, 7), reads="outside"),
    "int8": Case(tokens=9, counts=(4, 0, 7), operand=INT8, out=FP32),
    "no_index": Case(counts=(0, 4, 7), gather=False),
    "bf16": Case(tokens=9, counts=(4, 0, 7), operand=BF16, epilogue=()),
    "bias": Case(tokens=9, counts=(4, 0, 7), epilogue=(*SCALES, Bias(BF16)), reads="outside"),
    "expert_scale": Case(tokens=9, counts=(4, 7), epilogue=(Granularity.TOKEN, Granularity.EXPERT)),
    "starts": Case(tokens=9, counts=(4, 0, 7), apart=2),
}
for _i, _activation in enumerate(ActivationFunction):
    _epilogue = (*SCALES, Bias(BF16), Activation(_activation))
    SMALL[str(_activation)] = Case(tokens=9, counts=(4, 0, 7), epilogue=_epilogue)
    if _activation.gated:
        SMALL[f"{_activation}_interleaved"] = replace(SMALL[str(_activation)], interleaved=True)


def definition(inputs: dict[str, Any]) -> Tensor:
    return naive(**{k: v for k, v in inputs.items() if k not in ("out_dtype", "accumulation")})


@pytest.mark.parametrize("block", [1 << 24, 700], ids=["one_block", "blocks_of_2_rows"])
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_is_the_definition(case: Case, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", block)
    inputs = make_inputs(case, "cpu")
    want = definition(inputs)
    got = grouped_matmul_reference(**{**inputs, "out_dtype": torch.float64})
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    rounded = grouped_matmul_reference(**inputs)
    assert rounded.dtype == inputs["out_dtype"]
    torch.testing.assert_close(rounded, got.to(rounded.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("exact", [False, True], ids=["normal", "exact"])
@pytest.mark.parametrize("name", ["no_rows", "ragged", "outside", "bias_fp32", "no_index", "k_16"])
def test_out_form_passes_the_check_of_kernels(name: str, exact: bool) -> None:
    case = CASES[name]
    inputs = make_inputs(case, "cpu", exact)
    out = poisoned(case.rows, case.problem.out_columns, inputs["out_dtype"], "cpu")
    grouped_matmul_reference_out(out, **inputs)
    check(out, case, inputs, exact)


def _swap_rows(out: Tensor) -> None:
    out[[0, 1]] = out[[1, 0]]


def _write_spare_row(out: Tensor) -> None:
    out[-1] = 0


def _write_behind(out: Tensor) -> None:
    out.as_strided((1,), (1,), out.numel())[0] = 0


def _skip_element(out: Tensor) -> None:
    out[7, -1] = poisoned(1, 1, out.dtype, "cpu")[0, 0]


def _err_by_one_percent(out: Tensor) -> None:
    out[3] *= 1.01


def _err_in_one_element(out: Tensor) -> None:
    out[5, 9] += out[5].std() / 10


@pytest.mark.parametrize(
    "fault",
    [
        _swap_rows,
        _write_spare_row,
        _write_behind,
        _skip_element,
        _err_by_one_percent,
        _err_in_one_element,
    ],
)
def test_the_check_finds_faults(fault: Any) -> None:
    case = CASES["ragged"]
    inputs = make_inputs(case, "cpu")
    out = poisoned(case.rows, case.problem.out_columns, inputs["out_dtype"], "cpu")
    grouped_matmul_reference_out(out, **inputs)
    fault(out)
    with pytest.raises(AssertionError):
        check(out, case, inputs)


def test_the_check_wants_zeros_for_indices_outside() -> None:
    case = CASES["outside"]
    inputs = make_inputs(case, "cpu")
    out = poisoned(case.rows, case.problem.out_columns, inputs["out_dtype"], "cpu")
    grouped_matmul_reference_out(out, **inputs)
    out[0] = 1e-30
    with pytest.raises(AssertionError, match="must be zeros"):
        check(out, case, inputs)


@pytest.mark.parametrize("name", CASES.keys())
def test_exact_inputs_need_few_bits(name: str) -> None:
    """Sums of exact inputs fit fp32's 24 bits, those of fp8 the 13 that fast accumulation keeps.

    float32 does not hide sums that are larger, and takes half of float64's time. Columns are drawn
    alike: 128 of them stand for all.
    """
    case = CASES[name]
    inputs = make_inputs(case, "cpu", exact=True)
    inputs = {k: v for k, v in inputs.items() if k in ("x", "weight", "index", "offsets")}
    inputs["weight"] = inputs["weight"][:, :128]
    sums = grouped_matmul_reference(**inputs, out_dtype=torch.float32).abs()
    bits = 13 if case.operand in ("e4m3", "e5m2") else 22  # 2 more for scales of 1/4
    assert not sums.numel() or sums.max() < 2**bits


def test_int8_sums_are_exact() -> None:
    x = torch.full((1, 2**15), -127, dtype=torch.int8)
    weight = torch.full((1, 1, 2**15), 127, dtype=torch.int8)
    weight[0, 0, 0] = 126
    got = grouped_matmul_reference(
        x, weight, offsets=torch.tensor([1], dtype=torch.int32), out_dtype=torch.float64
    )
    assert got.item() == -(127 * 127 * 2**15) + 127


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_index_outside_gives_zeros_whatever_the_weights_hold(value: float) -> None:
    x = torch.ones(3, 8)
    weight = torch.full((1, 4, 8), value)
    index = torch.tensor([-1, 3, 2**31 - 1, -(2**31)], dtype=torch.int32)
    offsets = torch.tensor([4], dtype=torch.int32)
    bias = torch.ones(1, 4)
    out = grouped_matmul_reference(x, weight, index=index, offsets=offsets, bias=bias)
    assert out.tolist() == [[0.0] * 4] * 4


def test_offsets_past_the_rows_end_at_them() -> None:
    x, weight = torch.ones(3, 8), torch.ones(2, 4, 8)
    offsets = torch.tensor([2, 9], dtype=torch.int32)
    assert grouped_matmul_reference(x, weight, offsets=offsets).tolist() == [[8.0] * 4] * 3


@pytest.mark.parametrize(
    ("operand", "default"),
    [
        (torch.int8, torch.bfloat16),
        (torch.float8_e5m2, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
    ],
    ids=str,
)
def test_default_out_dtype(operand: torch.dtype, default: torch.dtype) -> None:
    x, weight = torch.ones(2, 16).to(operand), torch.ones(1, 4, 16).to(operand)
    offsets = torch.tensor([2], dtype=torch.int32)
    assert grouped_matmul_reference(x, weight, offsets=offsets).dtype == default


def backward(
    grad: Tensor, inputs: dict[str, Any], needs: tuple[bool, ...] = (True,) * 5
) -> tuple[Tensor | None, ...]:
    """inputs: as `grouped_matmul` takes them."""
    rest = {name: value for name, value in inputs.items() if name not in ("x", "weight")}
    operands, options = split_product(inputs["x"], inputs["weight"], rest)
    return grouped_matmul_backward(grad, operands, options, needs)


@pytest.mark.parametrize("shapes", ["flat", "column", "expert"])
@pytest.mark.parametrize("routing", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_backward_is_autograd_of_the_definition(routing: dict[str, Any], shapes: str) -> None:
    inputs = gradient_inputs(**routing, dtype=torch.float64, shapes=shapes)
    rows = 5 if inputs["index"] is None else len(inputs["index"])
    grad = torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    got = backward(grad, inputs)
    for name, found, want in zip(DIFFERENTIABLE, got, naive_gradients(grad, inputs), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("activation", ActivationFunction, ids=str)
def test_backward_through_activations(activation: ActivationFunction, interleaved: bool) -> None:
    if interleaved and not activation.gated:
        return
    inputs = gradient_inputs([1, 1, 4, -1, 0, 2, 3], [2, 4, 6], dtype=torch.float64)
    inputs |= {
        "starts": torch.tensor([0, 3, 5], dtype=torch.int32),
        "activation": str(activation),
        "interleaved": interleaved,
    }
    inputs["x"] *= 3  # beyond the limits of swiglu_oai
    generator = torch.Generator().manual_seed(5)
    columns = 2 if activation.gated else 4
    grad = torch.randn(7, columns, dtype=torch.float64, generator=generator)
    got = backward(grad, inputs)
    for name, found, want in zip(DIFFERENTIABLE, got, naive_gradients(grad, inputs), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_backward_sums_in_float32(dtype: torch.dtype) -> None:
    """500 rows of one token and expert: sums in bf16 or fp16 would be off in the first digits."""
    generator = torch.Generator().manual_seed(6)
    x = torch.rand(1, 8, generator=generator).to(dtype)
    weight = torch.rand(1, 4, 8, generator=generator).to(dtype)
    inputs: dict[str, Any] = {
        "x": x,
        "weight": weight,
        "index": torch.zeros(500, dtype=torch.int32),
        "offsets": torch.tensor([500], dtype=torch.int32),
    }
    grad = torch.rand(500, 4, generator=generator).to(dtype)
    got = backward(grad, inputs)
    assert got[2:] == (None, None, None)
    rtol = max(torch.finfo(dtype).eps, 2e-6)
    for found, want in zip(got, naive_gradients(grad, inputs), strict=False):
        assert found is not None and found.dtype == dtype
        torch.testing.assert_close(found.double(), want, rtol=rtol, atol=1e-6)


def test_backward_gives_what_is_asked_for() -> None:
    inputs = gradient_inputs([0, 1, 2], [1, 2, 3], torch.bfloat16)
    grad = torch.ones(3, 4, dtype=torch.bfloat16)
    for asked in range(5):
        needs = tuple(i == asked for i in range(5))
        got = backward(grad, inputs, needs)
        found = got[asked]
        assert [g is not None for g in got] == list(needs)
        assert found is not None and found.dtype == inputs[DIFFERENTIABLE[asked]].dtype
        assert found.shape == inputs[DIFFERENTIABLE[asked]].shape


def test_errors_of_nothing_and_of_nan() -> None:
    assert errors(torch.empty(0, 4), torch.empty(0, 4).double()).whole == 0
    want = torch.ones(2, 4, dtype=torch.float64)
    got = want.clone()
    got[1, 2] = torch.nan
    found = errors(got, want)
    assert all(e != e for e in (found.whole, found.worst_row, found.worst_element))
