"""Quantisation with a scale per 128 of K, and per block of weights."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from emitters.spec.dtypes import DType
from emitters.spec.layer_steps import QuantizeGroupsProblem
from tests.support.numerics import same_bits

E4M3, INT8 = torch.float8_e4m3fn, torch.int8


def _values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _by_hand(row: Tensor, largest: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A row, group by group."""
    scales, values = [], []
    for start in range(0, len(row), 128):
        group = row[start : start + 128].float()
        scale = group.abs().max() / torch.tensor(largest)
        scale = torch.ones(()) if scale == 0 else scale
        scaled = group / scale
        values.append((scaled.round() if dtype == INT8 else scaled).to(dtype))
        scales.append(scale)
    return torch.cat(values), torch.stack(scales)


@pytest.mark.parametrize("dtype", [E4M3, INT8])
@pytest.mark.parametrize("k", [8, 128, 136, 400])
def test_definition(k: int, dtype: torch.dtype) -> None:
    x = _values(5, k).bfloat16() * torch.tensor([1.0, 1e-20, 1e20, 0.0, 300.0]).bfloat16()[:, None]
    q, scale = cm.quantize_per_token_group(x, dtype)
    assert q.shape == x.shape and scale.shape == (5, -(-k // 128))
    for row in range(5):
        values, scales = _by_hand(x[row], 448.0 if dtype == E4M3 else 127.0, dtype)
        assert same_bits(q[row], values) and same_bits(scale[row], scales)


def test_column_major_scales_have_the_same_values() -> None:
    x = _values(5, 300)
    q, scale = cm.quantize_per_token_group(x)
    again, turned = cm.quantize_per_token_group(x, column_major=True)
    assert turned.stride() == (1, 8) and torch.equal(turned, scale) and same_bits(again, q)


def test_scales_are_rounded_up_to_powers_of_two() -> None:
    x = _values(64, 256) * torch.logspace(-30, 30, 64)[:, None]
    _, scale = cm.quantize_per_token_group(x)
    q, rounded = cm.quantize_per_token_group(x, power_of_two=True)
    assert torch.equal(torch.frexp(rounded).mantissa, torch.full_like(rounded, 0.5))
    assert ((rounded >= scale) & (rounded < 2 * scale)).all()
    blocks = q.float().view(64, 2, 128) * rounded[..., None]
    error = (blocks.view(64, 256) - x).abs() / rounded.repeat_interleave(128, 1)
    assert error.max() <= 16  # half of e4m3's step at its largest values, 256 to 448


def test_what_is_not_finite_stays_so() -> None:
    x = torch.tensor([[1.0, float("nan")], [float("inf"), 1.0]]).repeat_interleave(4, 1)
    for power_of_two in (False, True):
        _, scale = cm.quantize_per_token_group(x, power_of_two=power_of_two)
        assert scale[0].isnan().all() and scale[1].isinf().all()


@pytest.mark.parametrize("rows", [128, 64, 32])
@pytest.mark.parametrize("gated", [False, True])
def test_blocks_of_weights(rows: int, gated: bool) -> None:
    weight = _values(2, 2 * 160, 300).bfloat16()
    q, scale = cm.quantize_per_block(weight, rows=rows, gated=gated)
    for half in range(2 if gated else 1):
        n = 160 if gated else 320
        blocks = -(-n // rows)
        for b, kb in ((0, 0), (blocks - 1, 2)):
            first = half * n + b * rows
            block = weight[1, first : min(first + rows, (half + 1) * n), 128 * kb : 128 * kb + 128]
            expected = block.float().abs().max() / torch.tensor(448.0)
            assert scale[1, half * blocks + b, kb] == expected
            values = q[1, first : first + len(block), 128 * kb : 128 * kb + 128]
            assert same_bits(values, (block.float() / expected).to(E4M3))
    assert scale.shape == (2, (2 if gated else 1) * -(-(160 if gated else 320) // rows), 3)


def test_a_product_of_quantised_operands_is_close() -> None:
    x, weight = _values(9, 300).bfloat16(), _values(3, 320, 300, seed=1).bfloat16()
    offsets = torch.tensor([4, 4, 9], dtype=torch.int32)
    exact = cm.grouped_matmul_reference(x.double(), weight.double(), offsets=offsets)
    (q, scale), (w, w_scale) = cm.quantize_per_token_group(x), cm.quantize_per_block(weight)
    got = cm.grouped_matmul(q, w, offsets=offsets, per_token_scale=scale, scale=w_scale)
    assert (got.double() - exact).norm() / exact.norm() < 0.05  # e4m3 rounds by 2^-4 at most


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"x": torch.ones(3)}, r"x must be \[T, K\], got \[3\]"),
        ({"x": torch.ones(3, 8, requires_grad=True)}, "must not require a gradient"),
    ],
)
def test_errors(values: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cm.quantize_per_token_group(**values)


def test_errors_of_dtypes_and_blocks() -> None:
    with pytest.raises(TypeError, match="dtype must be one of .*float8_e4m3fn.*, got torch.bfloat"):
        cm.quantize_per_token_group(torch.ones(3, 8), torch.bfloat16)
    with pytest.raises(TypeError, match="x must be a tensor, got a list"):
        cm.quantize_per_token_group([1.0])  # type: ignore[arg-type]
    weight = torch.ones(2, 33, 8)
    with pytest.raises(ValueError, match="rows must be one of 128, 64, 32, got 16"):
        cm.quantize_per_block(weight, rows=16)
    with pytest.raises(ValueError, match="as many gates as ups, got N = 33"):
        cm.quantize_per_block(weight, gated=True)
    with pytest.raises(ValueError, match=r"weight must be \[E, N, K\], got \[33, 8\]"):
        cm.quantize_per_block(weight[0])


def test_illegal_problems_have_a_reason() -> None:
    bf16, e4m3 = DType.BF16, DType.E4M3
    assert QuantizeGroupsProblem(bf16, e4m3, 72).why_illegal() is None
    for problem, reason in (
        (QuantizeGroupsProblem(bf16, e4m3, 70), "K must be a positive multiple of 8, got 70"),
        (QuantizeGroupsProblem(e4m3, e4m3, 64), "rows must be one of .*, got e4m3"),
        (QuantizeGroupsProblem(bf16, bf16, 64), "quantised to one of .*, got bf16"),
    ):
        assert re.search(reason, problem.why_illegal() or "")


def test_opcheck() -> None:
    op = torch.ops.cutlass_moe.quantize_per_token_group.default
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for column_major in (False, True):
        torch.library.opcheck(op, (_values(3, 200), INT8, False, column_major), test_utils=checks)
