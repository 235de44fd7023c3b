"""Names of other libraries: against products written out group by group, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cutlass_moe.compat import grouped_gemm
from cutlass_moe.compat.deep_gemm import m_grouped_gemm_nt_contiguous, m_grouped_gemm_nt_masked
from cutlass_moe.compat.grouped_gemm import backend
from cutlass_moe.operands import FP8_BLOCK, NAMED_DTYPES
from cutlass_moe.ops.quantize import quantize_per_channel, quantize_per_token
from tests.support.compat_operands import FORMS, dense, gmm, pair
from tests.support.numerics import poisoned, same_bits

K, N = 16, 24


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


# grouped_gemm

SIZES = {
    "no_rows": [0, 0],
    "one_group": [5],
    "ragged": [3, 0, 4, 1],
    "empty_ends": [0, 2, 0, 0],
    "no_groups": [],
}


def operands(sizes: list[int], form: str) -> tuple[Tensor, Tensor, Tensor]:
    trans_a, trans_b = FORMS[form]
    rows, experts = sum(sizes), len(sizes)
    b = randn(rows, N, seed=1) if trans_a else randn(experts, K, N, seed=1)
    if trans_b:
        b = b.transpose(1, 2).contiguous()
    return randn(rows, K), b, torch.tensor(sizes, dtype=torch.int64)


def definition(a: Tensor, b: Tensor, sizes: list[int], form: str) -> Tensor:
    trans_a, trans_b = FORMS[form]
    groups = a.split(sizes)
    if trans_a:
        return torch.stack([x.T @ y for x, y in zip(groups, b.split(sizes), strict=True)])
    return torch.cat([x @ (y.T if trans_b else y) for x, y in zip(groups, b, strict=True)])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "sizes", [s for s in SIZES.values() if s], ids=[n for n in SIZES if SIZES[n]]
)
def test_gmm_and_its_gradients(sizes: list[int], form: str) -> None:
    a, b, batch_sizes = operands(sizes, form)
    a.requires_grad_()
    b.requires_grad_()
    out = gmm(a, b, batch_sizes, *FORMS[form])
    wide_a, wide_b = (x.detach().double().requires_grad_() for x in (a, b))
    want = definition(wide_a, wide_b, sizes, form)
    assert out.dtype == torch.bfloat16 and out.is_contiguous()
    torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-2)

    grad = randn(*out.shape, seed=2)
    found = torch.autograd.grad(out, (a, b), grad)
    expected = torch.autograd.grad(want, (wide_a, wide_b), grad.double())
    for mine, right in zip(found, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.double(), right, rtol=1e-2, atol=1e-2)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.sampled_from(list(FORMS)))
def test_gmm_of_any_sizes(sizes: list[int], form: str) -> None:
    a, b, batch_sizes = operands(sizes, form)
    want = definition(a.double(), b.double(), sizes, form)
    got = grouped_gemm.backend.gmm(a, b, batch_sizes, *FORMS[form])
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2)


def test_gmm_second_gradient() -> None:
    a, b, batch_sizes = operands([2, 3], "plain")
    a.requires_grad_()
    (first,) = torch.autograd.grad(
        gmm(a, b.requires_grad_(), batch_sizes).sum(), a, create_graph=True
    )
    (second,) = torch.autograd.grad(first.sum(), b)
    # first[r] = sum over n of b[e, :, n]: each element of b[e] counts once a row of e
    want = torch.tensor([2.0, 3.0]).view(2, 1, 1).expand(2, K, N)
    torch.testing.assert_close(second.float(), want)


def test_gmm_gradient_of_one_operand_alone() -> None:
    a, b, batch_sizes = operands([2, 3], "plain")
    gmm(a, b.requires_grad_(), batch_sizes).sum().backward()
    assert a.grad is None and b.grad is not None


@pytest.mark.parametrize("form", ["plain", "trans_b"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "expanded"])
def test_gmm_reads_dense_b_in_place(
    form: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [3, 2]
    a, b, batch_sizes = operands(sizes, form)
    if layout == "transposed":
        b = b.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "strided":
        b = torch.stack([b, b], 3)[..., 0]
    elif layout == "expanded":
        b = b[:1].expand(2, -1, -1)
    seen = []
    product = backend.grouped_matmul_out

    def spy(out: Tensor, x: Tensor, weight: Tensor, **rest: Any) -> None:
        seen.append(weight)
        product(out, x, weight, **rest)

    monkeypatch.setattr(backend, "grouped_matmul_out", spy)
    got = gmm(a, b, batch_sizes, *FORMS[form])
    want = definition(a.double(), b.double(), sizes, form)
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2)
    in_place = seen[0].data_ptr() == b.data_ptr()
    assert in_place == (layout in ("contiguous", "transposed"))


def test_gmm_of_strided_a() -> None:
    a, b, batch_sizes = operands([3, 2], "plain")
    strided = torch.stack([a, a], 1)[:, 0]
    assert same_bits(gmm(strided, b, batch_sizes), gmm(a, b, batch_sizes))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.zeros(5, K)}, TypeError, "a must be torch.bfloat16, got torch.float32"),
        ({"b": torch.zeros(2, K, N)}, TypeError, "b must be torch.bfloat16, got torch.float32"),
        ({"batch_sizes": torch.tensor([3, 2]).int()}, TypeError, "torch.int64, got torch.int32"),
        ({"batch_sizes": torch.tensor([[3, 2]])}, ValueError, r"must be \[E\], got \[1, 2\]"),
        ({"batch_sizes": torch.tensor([3, 3])}, ValueError, r"sum 5, .* got \[3, 3\]"),
        ({"batch_sizes": torch.tensor([6, -1])}, ValueError, r"at least 0 .* got \[6, -1\]"),
        ({"batch_sizes": torch.tensor([1, 2, 2])}, ValueError, r"\[3, 16, N\], got \[2, 16, 24\]"),
        ({"a": randn(5)}, ValueError, r"a must be \[M, K\], got \[5\]"),
        ({"a": randn(5, 8)}, ValueError, r"b must be \[2, 8, N\], got \[2, 16, 24\]"),
        ({"trans_b": True}, ValueError, r"b must be \[2, N, 16\], got \[2, 16, 24\]"),
        ({"trans_a": True}, ValueError, r"b must be \[5, N\], got \[2, 16, 24\]"),
        ({"trans_a": True, "trans_b": True}, ValueError, "at most one of trans_a and trans_b"),
        ({"b": torch.empty(2, K, N, dtype=torch.bfloat16, device="meta")}, ValueError, "on meta"),
    ],
)
def test_gmm_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    a, b, batch_sizes = operands([3, 2], "plain")
    with pytest.raises(error, match=message):
        gmm(**{"a": a, "b": b, "batch_sizes": batch_sizes, **change})


# DeepGEMM; blocks: test_compat_blocks.py

DTYPES = {name: dtype for name, dtype in NAMED_DTYPES.items() if name != FP8_BLOCK}


def check_rows(d: Tensor, want: Tensor, written: Tensor, dtype: torch.dtype) -> None:
    """d, from `poisoned`, must hold `want` in the rows written and be untouched in others."""
    torch.testing.assert_close(d[written].double(), want[written], rtol=1e-2, atol=1e-2)
    before = poisoned(*d.shape, dtype, "cpu")
    assert same_bits(d[~written], before[~written])


LAYOUTS = {  # of 4 experts
    "no_rows": [],
    "aligned": [0, 0, 0, -1, 1, 1, 1, 1, 3, -1, -1, -1],
    "unaligned": [0, 1, 1, 3, 3, 3],
    "any_order": [2, 2, -1, 0, 1, 1],
    "padding_first": [-1, -1, 3],
    "padding_alone": [-1, -1],
    "ids_of_none": [4, 2, 2, 100, -5],
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_contiguous(layout: list[int], dtype: torch.dtype) -> None:
    check_contiguous(layout, dtype)


def check_contiguous(layout: list[int], dtype: torch.dtype) -> None:
    m_indices = torch.tensor(layout, dtype=torch.int32)
    a, b = pair(randn(len(layout), K), dtype), pair(randn(4, N, K, seed=1), dtype)
    d = poisoned(len(layout), N, torch.bfloat16, "cpu")
    m_grouped_gemm_nt_contiguous(a, b, d, m_indices)
    valid = (m_indices >= 0) & (m_indices < 4)
    weights = dense(b)[m_indices.long().where(valid, 0)]
    check_rows(d, torch.einsum("mk,mnk->mn", dense(a), weights), valid, torch.bfloat16)


@settings(max_examples=30, deadline=None)
@given(
    st.permutations(range(4)),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=4, max_size=4),
)
def test_contiguous_of_any_layout(order: list[int], sizes: list[tuple[int, int]]) -> None:
    layout = []
    for expert, (rows, padding) in zip(order, sizes, strict=True):
        layout += [expert] * rows + [-1] * padding
    check_contiguous(layout, torch.bfloat16)


def test_contiguous_with_split_experts_raises() -> None:
    d = torch.zeros(4, N).bfloat16()
    m_indices = torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"rows must follow each other .*got experts \[0, 1\]"):
        m_grouped_gemm_nt_contiguous(randn(4, K), randn(2, N, K), d, m_indices)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(
    "masked", [[0, 0, 0], [5, 5, 5], [2, 0, 3], [-1, 9, 1]], ids=["none", "all", "some", "beyond"]
)
@pytest.mark.parametrize("expected_m", [None, 0, 4])
def test_masked(masked: list[int], dtype: torch.dtype, expected_m: int | None) -> None:
    a, b = pair(randn(3, 5, K), dtype), pair(randn(3, N, K, seed=1), dtype)
    d = poisoned(15, N, torch.bfloat16, "cpu")
    masked_m = torch.tensor(masked, dtype=torch.int32)
    m_grouped_gemm_nt_masked(a, b, d.view(3, 5, N), masked_m, expected_m)
    want = torch.einsum("emk,enk->emn", dense(a), dense(b)).view(15, N)
    written = (torch.arange(5) < masked_m[:, None]).flatten()
    check_rows(d, want, written, torch.bfloat16)


def test_scales_in_all_shapes_and_outputs_in_all_dtypes() -> None:
    values, scale = quantize_per_token(randn(6, K), torch.int8)
    weight, channel = quantize_per_channel(randn(2, N, K, seed=1), torch.int8)
    m_indices = torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int32)
    wide = torch.zeros(6, N)
    m_grouped_gemm_nt_contiguous((values, scale), (weight, channel), wide, m_indices)
    half = torch.zeros(6, N, dtype=torch.float16)
    columns = (values, scale[:, None]), (weight, channel[..., None])
    m_grouped_gemm_nt_contiguous(*columns, half, m_indices)
    torch.testing.assert_close(half, wide.half(), rtol=0, atol=0)
    masked = torch.zeros(2, 3, N)
    a = values.view(2, 3, K), scale.view(2, 3, 1)
    m_grouped_gemm_nt_masked(a, (weight, channel), masked, torch.tensor([3, 3]).int())
    torch.testing.assert_close(masked.view(6, N), wide, rtol=0, atol=0)
    m_grouped_gemm_nt_masked(a, (weight, torch.ones(2)), masked, torch.tensor([3, 3]).int())
    assert not torch.equal(masked.view(6, N), wide)


Q = torch.zeros(6, K, dtype=torch.int8)
W = torch.zeros(2, N, K, dtype=torch.int8)
CALL: dict[str, Any] = {
    "a": (Q, torch.ones(6)),
    "b": (W, torch.ones(2, N)),
    "d": torch.zeros(6, N).bfloat16(),
    "m_indices": torch.zeros(6, dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": Q}, TypeError, "a must be a pair of a tensor and its scale for torch.int8"),
        ({"a": (randn(6, K), torch.ones(6))}, TypeError, "a must be a tensor alone"),
        ({"b": W}, TypeError, "b must be a pair"),
        ({"a": (Q, torch.ones(6, 2))}, ValueError, r"a's scale must be .*got \[6, 2\]"),
        ({"b": (W, torch.ones(2, 2, 1))}, ValueError, r"b's scale must be .*got \[2, 2, 1\]"),
        ({"a": (Q, torch.ones(6).double())}, TypeError, "must be torch.float32"),
        ({"a": (Q[0], torch.ones(6))}, ValueError, r"got \[16\] and \[2, 24, 16\]"),
        ({"m_indices": torch.zeros(6)}, TypeError, "m_indices must be torch.int32"),
        ({"m_indices": torch.zeros(5).int()}, ValueError, r"must be \[6\], got \[5\]"),
        ({"m_indices": torch.zeros(6, device="meta").int()}, ValueError, "got one on meta"),
        ({"d": torch.zeros(6, N - 1).bfloat16()}, ValueError, "out must have shape"),
        ({"d": torch.zeros(6, N).int()}, TypeError, "out"),
    ],
)
def test_contiguous_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        m_grouped_gemm_nt_contiguous(**{**CALL, **change})


MASKED: dict[str, Any] = {
    "a": (Q.view(2, 3, K), torch.ones(2, 3)),
    "b": CALL["b"],
    "d": torch.zeros(2, 3, N).bfloat16(),
    "masked_m": torch.ones(2, dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": CALL["a"]}, ValueError, r"got \[6, 16\] and \[2, 24, 16\]"),
        ({"a": (Q.view(3, 2, K), torch.ones(3, 2))}, ValueError, r"got \[3, 2, 16\] and"),
        ({"a": (Q.view(2, 3, K), torch.ones(6))}, ValueError, r"a's scale must be .*got \[6\]"),
        ({"a": (Q.view(3, 2, K).transpose(0, 1), torch.ones(2, 3))}, ValueError, "a must .*contig"),
        ({"d": torch.zeros(6, N).bfloat16()}, ValueError, r"d must be a contiguous \[2, 3, 24\]"),
        ({"d": torch.zeros(2, N, 3).transpose(1, 2)}, ValueError, "d must be a contiguous"),
        ({"masked_m": torch.ones(2).long()}, TypeError, "masked_m must be torch.int32"),
        ({"masked_m": torch.ones(3).int()}, ValueError, r"must be \[2\], got \[3\]"),
    ],
)
def test_masked_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        m_grouped_gemm_nt_masked(**{**MASKED, **change})
