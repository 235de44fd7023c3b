"""Every template, dtype and epilogue in the PTX simulator: right, and free of races, in every
mode; and the simulator's own parts."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from emitters.image import build_identity
from tests.cases import Case, make_inputs
from tests.numerics import check
from tests.ptxsim import alu, launch
from tests.ptxsim.machine import Code
from tests.ptxsim.memory import GlobalMemory
from tests.ptxsim.ptx import parse
from tests.ptxsim.runs import BASE, RUNS, SMALL
from tests.ptxsim.schedule import MODES, Schedule
from tests.ptxsim.tensormap import TensorMap

pytestmark = pytest.mark.skipif(build_identity() is None, reason="needs nvidia-cutlass-dsl")


@pytest.mark.parametrize("name", RUNS)
def test_kernels_are_right(name: str) -> None:
    """Seven schedules, one a mode; the last of them with values that need rounding."""
    run = RUNS[name]
    kernel = launch.kernel(run.problem, run.config)
    for i, mode in enumerate(MODES):
        schedule = Schedule(7 * list(RUNS).index(name) + i, mode)
        exact = i < len(MODES) - 1
        inputs = make_inputs(run.case, "cpu", exact=exact, seed=i)
        out = launch.simulate(kernel, inputs, schedule, run.grid, rows=run.case.rows)
        check(out, run.case, inputs, exact=exact)


def _simulate(inputs: dict[str, Any], case: Case) -> torch.Tensor:
    kernel = launch.kernel(case.problem, SMALL)
    return launch.simulate(kernel, inputs, Schedule(5), rows=case.rows)


def test_starts_leave_gaps_between_experts() -> None:
    """With starts given, rows between an expert's end and the next one's start stay untouched."""
    case = replace(BASE, k=144)
    inputs = make_inputs(case, "cpu", exact=True)
    inputs["starts"] = torch.tensor([0, 70, 75], dtype=torch.int32)
    close = make_inputs(case, "cpu", exact=True)
    out, want = _simulate(inputs, case), _simulate(close, case)
    assert torch.equal(out[:70], want[:70])
    assert torch.equal(out[75:103], want[75:103])


@pytest.mark.parametrize("offsets", [(-5, 300, 20), (2**31 - 1, 0, 0)])
def test_offsets_that_contradict_the_rows_are_clamped(offsets: tuple[int, ...]) -> None:
    """Nothing outside the tensors is touched."""
    case = replace(BASE, k=144)
    inputs = make_inputs(case, "cpu", exact=True)
    inputs["offsets"] = torch.tensor(offsets, dtype=torch.int32)
    _simulate(inputs, case)


def test_schedules_repeat() -> None:
    """The same seed gives the same trace."""
    case = replace(BASE, k=16, counts=(5, 0, 0))
    kernel = launch.kernel(case.problem, SMALL)
    traces: list[list[str]] = [[], [], []]
    for seed, trace in zip((1, 1, 2), traces, strict=True):
        inputs = make_inputs(case, "cpu", exact=True)
        launch.simulate(kernel, inputs, Schedule(seed), rows=case.rows, trace=trace.append)
    assert traces[0] == traces[1] != traces[2]


UNKNOWN = [
    ("popc.b32", "bfind.u32", "unknown instruction bfind.u32"),
    ("ld.global.b32", "ld.global.nc.b32", "unknown instruction ld.global.nc.b32"),
    ("mul.f32", "mul.ftz.f32", "unknown instruction mul.ftz.f32"),
    ("p, 1,  1;", "p, -1,  1;", "scales and transpositions"),
    ("%nctaid.x", "%nctaid.y", "unknown operand %nctaid.y"),
    ("bar.warp.sync \t-1", "bar.warp.sync \t15", "membermask 15"),
]


@pytest.mark.parametrize(("known", "unknown", "reason"), UNKNOWN, ids=[u[1] for u in UNKNOWN])
def test_what_is_not_modelled_is_named(known: str, unknown: str, reason: str) -> None:
    ptx = launch.kernel(BASE.problem, SMALL).ptx
    assert known in ptx
    with pytest.raises(ValueError, match=reason):
        Code(parse(ptx.replace(known, unknown)))


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
    assert (box.read_box(memory, list(corner)) == want.reshape(-1, 16).numpy()).all()


@pytest.mark.parametrize(
    "changes", [{"pointer": 8}, {"strides": (40, 336)}, {"box": (64, 8, 1)}, {"box": (32, 300, 1)}]
)
def test_tensor_maps_that_the_driver_refuses(changes: dict[str, Any]) -> None:
    good = TensorMap(4096, 1, (48, 7, 2), (48, 336), (32, 8, 1), 32)
    with pytest.raises(ValueError, match="must be|within the swizzle|boxes from"):
        replace(good, **changes)
