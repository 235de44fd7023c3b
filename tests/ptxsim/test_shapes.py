"""Every tile shape, ring length, routing and way to find rows and weights in the PTX simulator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cutlass_moe.images.toolchains import default_build
from tests.ptxsim.kernels import launch
from tests.ptxsim.kernels.runs import (
    ADDRESSES,
    BASE,
    SHAPES,
    SMALL,
    SWAPPED,
    check_run,
)
from tests.ptxsim.schedule import Schedule
from tests.support.cases import Case, make_inputs

pytestmark = pytest.mark.skipif(default_build() is None, reason="needs nvidia-cutlass-dsl")


@pytest.mark.parametrize("name", ADDRESSES)
def test_rows_weights_and_tiles_are_found(name: str) -> None:
    check_run(ADDRESSES, name)


@pytest.mark.parametrize("name", SHAPES)
def test_kernels_are_right(name: str) -> None:
    check_run(SHAPES, name)


@pytest.mark.parametrize("name", SWAPPED)
def test_swapped_kernels_are_right(name: str) -> None:
    check_run(SWAPPED, name)


def _simulate(inputs: dict[str, Any], case: Case) -> torch.Tensor:
    kernel = launch.kernel(case.problem, SMALL)
    return launch.simulate(kernel, inputs, Schedule(5), rows=case.rows)


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
