"""The simulator's parts: what it refuses, how it rounds, what tensor maps read."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from emitters import emit
from emitters.image import build_identity
from emitters.problem import DType
from tests.ptxsim import alu, launch
from tests.ptxsim.memory import Access, GlobalMemory
from tests.ptxsim.ptx import parse
from tests.ptxsim.runs import BASE, RUNS, SMALL
from tests.ptxsim.tensormap import TensorMap
from tests.ptxsim.warp import Code

needs_dsl = pytest.mark.skipif(build_identity() is None, reason="needs nvidia-cutlass-dsl")

UNKNOWN = [
    ("popc.b32", "bfind.u32", "unknown instruction bfind.u32"),
    ("ld.global.b32", "ld.global.nc.b32", "unknown instruction ld.global.nc.b32"),
    ("mul.f32", "mul.ftz.f32", "unknown instruction mul.ftz.f32"),
    ("p, 1,  1;", "p, -1,  1;", "scales and transpositions"),
    ("%nctaid.x", "%nctaid.y", "unknown operand %nctaid.y"),
    ("bar.sync", "@%p1 bar.sync", "a guard on anything but a branch"),
    ("bar.warp.sync \t-1", "bar.warp.sync \t15", "membermask 15"),
]


@needs_dsl
@pytest.mark.parametrize(("known", "unknown", "reason"), UNKNOWN, ids=[u[1] for u in UNKNOWN])
def test_what_is_not_modelled_is_named(known: str, unknown: str, reason: str) -> None:
    ptx = launch.kernel(BASE.problem, SMALL).ptx
    assert known in ptx
    with pytest.raises(ValueError, match=reason):
        Code(parse(ptx.replace(known, unknown)))


@needs_dsl
def test_line_numbers_change_no_instruction() -> None:
    """What is simulated is what an image holds."""
    shipped = Code(parse(emit._compile(BASE.problem, SMALL, "sm_90a", "")[1])).instructions
    simulated = launch.kernel(BASE.problem, SMALL).code.instructions
    assert [one.text for one in shipped] == [one.text for one in simulated]


@needs_dsl
def test_faults_name_the_python_line() -> None:
    kernel = launch.kernel(BASE.problem, SMALL)
    for one in kernel.code.instructions:
        if one.opcode.startswith(("wgmma", "cp.async", "mbarrier", "st.global")):
            assert one.source.partition(":")[0] in ("gemm_sm90.py", "gather.py", "epilogue.py")


def _float32(values: list[float]) -> np.ndarray:
    return np.array(values, np.float32)


def test_bf16_rounds_to_nearest_even() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, np.uint32)
    values = bits.view(np.float32)
    values = np.concatenate(
        [values, _float32([0.0, -0.0, np.inf, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8])]
    )
    finite = values[~np.isnan(values)]
    want = torch.from_numpy(finite).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (alu.bf16_bits(finite) == want).all()


def test_fma_rounds_once() -> None:
    generator = np.random.default_rng(1)
    a, b, c = (generator.standard_normal(2000).astype(np.float32) for _ in range(3))
    c[::2] = -(a * b)[::2] * (1 + generator.integers(0, 4, 1000).astype(np.float32) * 2**-20)
    got = alu.fma(a, b, c)
    for x, y, z, result in zip(a, b, c, got, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        near = [np.nextafter(result, np.float32(s)) for s in (-np.inf, np.inf)]
        errors = [abs(Fraction(float(v)) - exact) for v in (result, *near)]
        assert errors[0] == min(errors)


@pytest.mark.parametrize("corner", [(0, 0, 0), (-16, 3, 1), (32, 5, 0), (0, -9, 0), (0, 0, 2)])
def test_boxes_are_zeros_out_of_bounds(corner: tuple[int, int, int]) -> None:
    data = torch.randint(1, 255, (2, 7, 48), dtype=torch.uint8)
    memory = GlobalMemory()
    pointer = memory.add("weight", data.flatten().numpy())
    box = TensorMap(pointer, 1, (48, 7, 2), (48, 336), (32, 8, 1), 32)
    assert TensorMap.decode(box.encode()) == box
    padded = torch.zeros(6, 40, 160, dtype=torch.uint8)
    padded[2:4, 16:23, 64:112] = data
    x, y, z = corner
    want = padded[2 + z, 16 + y : 24 + y, 64 + x : 96 + x]
    assert (
        box.read_box(memory, Access(np.arange(1)), list(corner)) == want.reshape(-1, 16).numpy()
    ).all()


@pytest.mark.parametrize(
    "changes", [{"pointer": 8}, {"strides": (40, 336)}, {"box": (64, 8, 1)}, {"box": (32, 300, 1)}]
)
def test_tensor_maps_that_the_driver_refuses(changes: dict[str, Any]) -> None:
    good = TensorMap(4096, 1, (48, 7, 2), (48, 336), (32, 8, 1), 32)
    with pytest.raises(ValueError, match="must be|within the swizzle|boxes from"):
        replace(good, **changes)


def test_some_run_gives_the_integer_sums_themselves() -> None:
    """Which test_ptxsim_gpu.py compares bit by bit; float32 holds every one of them."""
    sums = [
        run.case
        for run in RUNS.values()
        if run.case.operand is DType.INT8 and run.case.out is DType.FP32 and not run.case.epilogue
    ]
    assert sums
    assert all(case.k * 127**2 < 2**24 for case in sums)
