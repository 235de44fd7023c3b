"""The simulator can fail: every planted defect is caught, in some schedule, as what it is."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest

from cutlass_moe.images.toolchains import default_build
from emitters.spec.gemm import GemmProblem, WeightStorage
from emitters.spec.registry import GemmConfig
from tests.ptxsim.kernels import launch
from tests.ptxsim.kernels.mutations import MUTATIONS
from tests.ptxsim.kernels.runs import RUNS, SMALL, check_outputs, other_outputs
from tests.ptxsim.ptx import Fault
from tests.ptxsim.schedule import MODES, Schedule
from tests.support.cases import Case, make_inputs

pytestmark = pytest.mark.skipif(default_build() is None, reason="needs nvidia-cutlass-dsl")
CASE = Case(tokens=30, counts=(70, 0, 33), n=72, k=272, spare=3)
# Where a run will do, its kernel is edited, which is compiled already.
KERNELS: dict[str, tuple[Case, GemmConfig]] = {
    "base": (CASE, SMALL),
    "no_tails": (replace(CASE, n=64), SMALL),
    "six_steps": (replace(CASE, k=656), SMALL),
    "outside": (replace(CASE, reads="outside"), SMALL),
    "starts": (replace(CASE, apart=5), SMALL),
    "many_experts": (replace(CASE, counts=(9, 0, 70, 3)), SMALL),
    **{
        name: (RUNS[run].case, RUNS[run].config)
        for name, run in {
            "one_step": "one_step",
            "two_slices": "tile_64x128_group_1",
            "two_level": "one_step_two_level",
            "two_consumers": "tile_128x64_group_1",
            "table": "table",
            "dynamic": "dynamic",
            "cluster": "cluster",
            "pingpong": "pingpong",
            "split": "swap_split_2",
            "gated": "gated_starts",
            "swap_gated": "swap_gated_128",
            "n_major": "n_major",
            "n_major_gated": "n_major_gated",
            "stored": "stored",
            "tma_x": "tma_x",
            "blocks_quantised": "blocks_quantised",
            "blocks_spans": "blocks_spans",
            "blocks_tma_x": "blocks_tma_x",
            "packed": "packed_int4_g128_16",
            "packed_mxfp4": "packed_mxfp4_16",
            "packed_rows": "packed_mxfp4",
            "packed_slices": "packed_one_producer",
            "packed_half_part": "packed_one_producer_24",
            "packed_narrow": "packed_8x32",
            "packed_narrow_alone": "packed_8x32_alone",
            "packed_narrow_gated": "packed_8x32_gated",
        }.items()
    },
}


def problem(name: str) -> GemmProblem:
    storage = WeightStorage.TABLE if name == "table" else WeightStorage.STACKED
    asked = KERNELS[name][0].problem
    return replace(asked, weight=replace(asked.weight, storage=storage))


def complaint(kernel: launch.SimulatedKernel, case: Case, order: Schedule) -> str:
    """What is wrong in a schedule; "" where nothing is."""
    inputs = make_inputs(case, "cpu", exact=True)
    more = other_outputs(case, inputs)
    try:
        out = launch.simulate(kernel, {**inputs, **more}, order, rows=case.rows)
        check_outputs(out, more, case, inputs, exact=True)
    except Fault as fault:
        return str(fault)
    except AssertionError as error:
        return f"wrong result: {error}"
    return ""


@lru_cache
def without_a_defect(name: str, seed: int, mode: str) -> str:
    case, config = KERNELS[name]
    return complaint(launch.kernel(problem(name), config), case, Schedule(seed, mode))


@pytest.mark.parametrize("name", MUTATIONS)
def test_defects_are_caught(name: str) -> None:
    mutation = MUTATIONS[name]
    case, config = KERNELS[mutation.kernel]
    kernel = launch.kernel(problem(mutation.kernel), config)
    edited = kernel.edited(mutation.edit(kernel.ptx))
    for seed, mode in enumerate(MODES):
        said = complaint(edited, case, Schedule(seed, mode))
        if said:
            break
    assert any(text in said for text in mutation.expects), said or "not caught"
    assert without_a_defect(mutation.kernel, seed, mode) == ""


def test_there_are_enough_defects() -> None:
    assert len(MUTATIONS) >= 25
