"""The kernel that quantises with a scale per 128 of K, against its reference."""

from __future__ import annotations

import pytest
import torch

import cutlass_moe as cm
from cutlass_moe.choose.heuristics_sm90 import step_config
from cutlass_moe.operands import DTYPES
from cutlass_moe.runtime import library
from cutlass_moe.runtime.device import on_device
from cutlass_moe.runtime.parameters import quantize_groups_values
from emitters.spec.layer_steps import QuantizeGroupsProblem, StepConfig
from tests.support.numerics import poisoned, same_bits

pytestmark = pytest.mark.gpu
E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    (BF16, E4M3, 2048, 1),
    (BF16, E4M3, 7168, 333),
    (BF16, E4M3, 96, 1000),
    (BF16, INT8, 768, 65_536),
    (FP16, E4M3, 136, 77),
    (FP16, E5M2, 128, 5),
    (FP32, E4M3, 400, 129),
    (FP32, INT8, 8, 40),
]


def images() -> set[tuple[QuantizeGroupsProblem, StepConfig]]:
    problems = {QuantizeGroupsProblem(DTYPES[s], DTYPES[t], k) for s, t, k, _ in CASES}
    return {(problem, step_config(problem)) for problem in problems}


def _rows(source: torch.dtype, rows: int, k: int) -> torch.Tensor:
    """Ordinary rows and, in turn, one of the smallest numbers, of the largest, of zeros."""
    generator = torch.Generator("cuda").manual_seed(k)
    x = torch.randn(rows, k, generator=generator, device="cuda")
    info = torch.finfo(source)
    factors = torch.tensor([1.0, 300.0, info.tiny, info.max / 8, 0.0], device="cuda")
    return (x * factors[torch.arange(rows, device="cuda") % 5, None]).to(source)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize(("source", "target", "k", "rows"), CASES)
def test_bits(
    source: torch.dtype,
    target: torch.dtype,
    k: int,
    rows: int,
    column_major: bool,
    power_of_two: bool,
) -> None:
    x = _rows(source, rows, k)
    options = {"column_major": column_major, "power_of_two": power_of_two}
    q, scale = cm.quantize_per_token_group(x, target, **options)
    want, want_scale = cm.quantize_per_token_group_reference(x, target, **options)
    assert same_bits(scale, want_scale)
    if rows > 1 and scale.shape[1] > 1:
        assert scale.stride() == ((1, -(-rows // 4) * 4) if column_major else (scale.shape[1], 1))
    assert same_bits(q, want)


def test_rows_of_a_wider_tensor_are_read_in_place() -> None:
    wide = _rows(BF16, 333, 7168 + 64)
    x = wide[:, :7168]
    assert same_bits(
        cm.quantize_per_token_group(x)[0], cm.quantize_per_token_group(x.contiguous())[0]
    )


def test_rows_past_the_end_are_left_alone() -> None:
    x = _rows(BF16, 333, 7168)
    problem = QuantizeGroupsProblem(DTYPES[BF16], DTYPES[E4M3], 7168)
    kernel = library.load(problem, step_config(problem), 0)
    q = poisoned(333, 7168 // 2, BF16, "cuda").view(E4M3)
    scale = poisoned(333, 56, FP32, "cuda")
    end = torch.tensor([200], dtype=torch.int32, device="cuda")
    before = q.view(torch.uint8).clone(), scale.view(torch.int32).clone()
    addresses = {
        name: t.data_ptr()
        for name, t in zip(("source", "q", "scale", "end"), (x, q, scale, end), strict=True)
    }
    values = quantize_groups_values(addresses, 333, 2 * 7168, scale.stride())
    grid = problem.ctas(333, kernel.record.threads)
    on_device(0, lambda stream: kernel.launch(values, grid, stream))
    want, want_scale = cm.quantize_per_token_group_reference(x)
    assert same_bits(q[:200], want[:200]) and same_bits(scale[:200], want_scale[:200])
    assert torch.equal(q.view(torch.uint8)[200:], before[0][200:])
    assert torch.equal(scale.view(torch.int32)[200:], before[1][200:])
