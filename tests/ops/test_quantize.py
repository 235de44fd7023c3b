from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cutlass_moe.choose import heuristics_sm90 as heuristics
from cutlass_moe.images.cache import MissingImage
from cutlass_moe.images.compiler import Request, compile_images
from cutlass_moe.images.toolchains import default_build
from cutlass_moe.ops.dispatch import step_kernel
from cutlass_moe.ops.quantize import (
    quantize_per_channel,
    quantize_per_token,
    quantize_per_token_reference,
)
from cutlass_moe.runtime import library
from emitters.spec.dtypes import DType
from emitters.spec.layer_steps import CombineProblem, QuantizeProblem
from emitters.spec.registry import problem_from_json, why_illegal

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


@DTYPES
@pytest.mark.parametrize(("k", "pad_to", "padded"), [(1025, 16, 1040), (96, 16, 96), (5, 1, 5)])
def test_rows_end_with_zeros(dtype: torch.dtype, k: int, pad_to: int, padded: int) -> None:
    x = torch.randn(6, k, generator=torch.Generator().manual_seed(3)).bfloat16()
    plain, scale = quantize_per_token(x, dtype)
    q, wide_scale = quantize_per_token(x, dtype, pad_to=pad_to)
    assert q.shape == (6, padded) and q.is_contiguous() and torch.equal(wide_scale, scale)
    assert torch.equal(q[:, :k].double(), plain.double()) and not q[:, k:].double().any()
    weight, weight_scale = quantize_per_channel(x.view(2, 3, k), dtype, pad_to=pad_to)
    assert torch.equal(weight.double(), q.view(2, 3, padded).double())
    assert torch.equal(weight_scale, scale.view(2, 3))


@pytest.mark.parametrize("quantize", [quantize_per_token, quantize_per_channel])
def test_pad_to_must_be_positive(quantize: Callable[..., Any]) -> None:
    x = torch.ones(2, 3) if quantize is quantize_per_token else torch.ones(1, 2, 3)
    for wrong in (0, -16):
        with pytest.raises(ValueError, match=f"pad_to must be a positive integer, got {wrong}"):
            quantize(x, torch.int8, pad_to=wrong)


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


@settings(max_examples=100, deadline=None)
@given(
    row=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20),
    dtype=st.sampled_from(list(LARGEST)),
)
def test_each_quotient_is_a_division_in_float32(row: list[float], dtype: torch.dtype) -> None:
    x = np.array(row, np.float32)
    largest = np.float32(LARGEST[dtype])
    scale = np.abs(x).max(initial=0) / largest or np.float32(1)
    quotients = torch.from_numpy((x / scale).clip(-largest, largest))
    want = (quotients.round() if dtype == torch.int8 else quotients).to(dtype)
    q, got = quantize_per_token(torch.from_numpy(x)[None], dtype)
    assert got.item() == scale
    assert torch.equal(q[0].view(torch.uint8), want.view(torch.uint8))


@DTYPES
def test_op(dtype: torch.dtype) -> None:
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(4))
    # opcheck compares results by torch.allclose, which does not take float8
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.cutlass_moe.quantize_per_token.default, (x, dtype), test_utils=checks
    )
    compiled = torch.compile(quantize_per_token, backend="aot_eager", fullgraph=True)
    for (got, got_scale), (want, want_scale) in (
        (compiled(x, dtype), quantize_per_token(x, dtype)),
        (quantize_per_token(x, dtype), quantize_per_token_reference(x, dtype)),
    ):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
        assert torch.equal(got_scale, want_scale)


GOOD = QuantizeProblem(DType.BF16, DType.E4M3, 2048)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (QuantizeProblem(DType.INT8, DType.E4M3, 64), "fp32, got int8"),
        (QuantizeProblem(DType.BF16, DType.FP16, 64), "to one of e4m3, e5m2, int8, got fp16"),
        (
            QuantizeProblem(DType.BF16, DType.E4M3, 60),
            "K must be a multiple of 8 up to",
        ),
        (QuantizeProblem(DType.BF16, DType.E4M3, 32776), "up to 32768"),
        (QuantizeProblem(DType.BF16, DType.E4M3, 0), "up to 32768, got 0"),
        (QuantizeProblem(DType.BF16, DType.E4M3, 64, padded=True), "no multiple of 16"),
    ],
    ids=["source", "target", "ragged", "long", "empty", "padded"],
)
def test_illegal_problems_have_a_reason(problem: QuantizeProblem, reason: str) -> None:
    assert why_illegal(GOOD) is None
    assert reason in (why_illegal(problem) or "")


def test_problems_round_trip() -> None:
    assert problem_from_json(GOOD.to_json()) == GOOD


def test_without_an_image_the_torch_path_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object) -> None:
        raise MissingImage("no image of a kernel that quantises")

    monkeypatch.setattr(library, "device_arch", lambda device: "sm_90a")
    monkeypatch.setattr(library, "load", load)
    with pytest.warns(UserWarning, match="no image of a kernel that quantises"):
        assert step_kernel(GOOD, 0) is None
    monkeypatch.setattr(library, "device_arch", lambda device: "sm_80")
    with pytest.warns(UserWarning, match="arch must be sm_90a for quantize, got sm_80"):
        assert step_kernel(GOOD, 0) is None
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    with pytest.raises(RuntimeError, match="CUTLASS_MOE_STRICT=1"):
        step_kernel(GOOD, 0)


@pytest.mark.skipif(default_build() is None, reason="needs nvidia-cutlass-dsl")
def test_kernels_of_every_length_compile_without_spills() -> None:
    lengths = (8, 72, 768, 2048, 2880, 7168, 8200, 14336, 16392, 32768)
    sources, targets = (DType.BF16, DType.FP32), (DType.E4M3, DType.INT8)
    problems = [
        QuantizeProblem(sources[i % 2], targets[i % 4 // 2], k) for i, k in enumerate(lengths)
    ] + [
        CombineProblem(rows, out, 2880, 32)
        for rows, out in ((DType.FP16, DType.FP16), (DType.FP32, DType.FP16), (DType.FP32,) * 2)
    ]
    requests = [Request(problem, heuristics.step_config(problem)) for problem in problems]
    for result in compile_images(requests):
        assert result.image is not None, result.error
        record = result.image.record
        assert record.spill_bytes == 0, result.request
        assert record.threads * record.registers <= 65_536
        assert problem_from_json(record.problem) == result.request.problem
