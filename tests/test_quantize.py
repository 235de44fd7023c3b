from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cutlass_moe.quantize import quantize_per_channel, quantize_per_token

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
# Half a step, relative to the value (fp8: 3 and 2 bits of mantissa) or to the row's largest (int8).
HALF_STEP = {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3, torch.int8: 0.5 / 127}
DTYPES = pytest.mark.parametrize("dtype", LARGEST, ids=str)


@DTYPES
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("spread", [1e-6, 1.0, 3e3], ids=str)
def test_round_trip(dtype: torch.dtype, source: torch.dtype, spread: float) -> None:
    x = (torch.randn(50, 96, generator=torch.Generator().manual_seed(1)) * spread).to(source)
    q, scale = quantize_per_token(x, dtype)
    assert q.dtype == dtype and q.shape == x.shape
    assert scale.dtype == torch.float32 and scale.shape == (50,)
    largest = x.double().abs().amax(1, keepdim=True)
    torch.testing.assert_close(scale.double(), largest[:, 0] / LARGEST[dtype], rtol=1e-6, atol=0)
    error = (q.double() * scale.double()[:, None] - x.double()).abs()
    relative_to = largest if dtype == torch.int8 else x.double().abs()
    smallest = largest * 2**-10 / LARGEST[dtype]  # fp8's subnormal steps: 2^-9 and 2^-16
    assert (error <= HALF_STEP[dtype] * 1.0001 * relative_to + smallest).all()
    assert (q.double().abs().amax(1) == LARGEST[dtype]).all()


@DTYPES
def test_per_channel_is_per_row(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    q, scale = quantize_per_channel(weight, dtype)
    assert q.shape == (3, 5, 32) and scale.shape == (3, 5)
    rows, row_scale = quantize_per_token(weight.view(15, 32), dtype)
    assert torch.equal(q.view(15, 32).double(), rows.double())
    assert torch.equal(scale.view(15), row_scale)


def test_ties_round_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    q, scale = quantize_per_token(x, torch.int8)
    assert scale.tolist() == [1.0]
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


@DTYPES
@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-43, 1.2e-38], ids=str)
def test_rows_of_zeros_and_of_vanishing_values(dtype: torch.dtype, largest: float) -> None:
    x = torch.tensor([[0.0, largest, -largest, 0.0], [0.0, 1.0, 0.0, 0.0]])
    q, scale = quantize_per_token(x, dtype)
    assert q.double().isfinite().all()
    assert (scale > 0).all()
    assert largest or (scale[0] == 1 and not q[0].double().any())
    assert q[1].tolist() == [0, LARGEST[dtype], 0, 0]


@DTYPES
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_largest_finite_values(dtype: torch.dtype, source: torch.dtype) -> None:
    top = torch.finfo(source).max
    q, scale = quantize_per_token(torch.tensor([[top, -top, top / 2]], dtype=source), dtype)
    assert scale.isfinite().all()
    assert q.double()[0, :2].tolist() == [LARGEST[dtype], -LARGEST[dtype]]


@DTYPES
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_infinities_and_nans_show_in_the_scale(dtype: torch.dtype, value: float) -> None:
    x = torch.ones(2, 16)
    x[0, 3] = value
    _, scale = quantize_per_token(x, dtype)
    assert scale.isfinite().tolist() == [False, True]


@DTYPES
@pytest.mark.parametrize("shape", [(0, 16), (4, 0), (0, 0)], ids=str)
def test_empty(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    q, scale = quantize_per_token(torch.empty(shape), dtype)
    assert q.shape == shape and q.dtype == dtype
    assert scale.tolist() == [1.0] * shape[0]
    q, scale = quantize_per_channel(torch.empty(2, *shape), dtype)
    assert q.shape == (2, *shape) and scale.shape == (2, shape[0])


def test_strided_rows() -> None:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(3))
    q, scale = quantize_per_token(x.T, torch.int8)
    straight, straight_scale = quantize_per_token(x.T.contiguous(), torch.int8)
    assert torch.equal(q, straight) and torch.equal(scale, straight_scale)


@pytest.mark.parametrize(
    ("function", "values", "dtype", "error", "message"),
    [
        (quantize_per_token, torch.ones(4), torch.int8, ValueError, r"\[T, K\], got \[4\]"),
        (quantize_per_channel, torch.ones(4, 4), torch.int8, ValueError, r"\[E, N, K\], got"),
        (quantize_per_token, torch.ones(4, 4), torch.uint8, TypeError, "got torch.uint8"),
        (quantize_per_token, torch.ones(4, 4).double(), torch.int8, TypeError, "torch.float64"),
        (quantize_per_token, torch.ones(4, 4).int(), torch.int8, TypeError, "torch.int32"),
        (quantize_per_token, torch.ones(4, 4, requires_grad=True), torch.int8, ValueError, "grad"),
    ],
    ids=["token_1d", "channel_2d", "target", "float64", "int32", "requires_grad"],
)
def test_errors(
    function: object, values: Tensor, dtype: torch.dtype, error: type[Exception], message: str
) -> None:
    assert callable(function)
    with pytest.raises(error, match=message):
        function(values, dtype)


def test_parameters_quantise_without_grad() -> None:
    with torch.no_grad():
        q, scale = quantize_per_token(torch.ones(2, 16, requires_grad=True), torch.int8)
    assert not scale.requires_grad and q.unique().tolist() == [127]
