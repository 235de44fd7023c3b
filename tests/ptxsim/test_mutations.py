"""The simulator can fail: every planted defect is caught, in some schedule, as what it is."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest

from cutlass_moe.images.toolchains import default_build
from emitters.spec.dtypes import Accumulation, DType
from emitters.spec.epilogue import Activation, ActivationFunction
from emitters.spec.gemm import GemmProblem, Major, WeightStorage
from emitters.spec.registry import GemmConfig
from tests.ptxsim.kernels import launch
from tests.ptxsim.kernels.mutations import MUTATIONS
from tests.ptxsim.kernels.runs import CLUSTER, PINGPONG, RUNS, SMALL
from tests.ptxsim.ptx import Fault
from tests.ptxsim.schedule import MODES, Schedule
from tests.support.cases import SCALES, Case, make_inputs
from tests.support.numerics import check, poisoned

pytestmark = pytest.mark.skipif(default_build() is None, reason="needs nvidia-cutlass-dsl")
CASE = Case(tokens=30, counts=(70, 0, 33), n=72, k=272, spare=3)
GATED = replace(CASE, n=144, epilogue=(*SCALES, Activation(ActivationFunction.SWIGLU)))
N_MAJOR = replace(GATED, operand=DType.BF16, epilogue=(), weight_major=Major.N)
KERNELS: dict[str, tuple[Case, GemmConfig]] = {
    "base": (CASE, SMALL),
    "no_tails": (replace(CASE, n=64), SMALL),
    "one_step": (replace(CASE, k=64), SMALL),
    "six_steps": (replace(CASE, k=656), SMALL),
    "two_slices": (CASE, replace(SMALL, tile_n=128)),
    "two_level": (replace(CASE, accumulation=Accumulation.TWO_LEVEL), SMALL),
    "two_consumers": (CASE, replace(SMALL, tile_m=128)),
    "table": (CASE, SMALL),
    "outside": (replace(CASE, reads="outside"), SMALL),
    "dynamic": (CASE, RUNS["dynamic"].config),
    "cluster": (replace(CASE, counts=(140, 0, 33)), CLUSTER),
    "pingpong": (CASE, PINGPONG),
    "split": (replace(CASE, counts=(9, 0, 5), n=136), RUNS["swap_split_2"].config),
    "gated": (GATED, replace(SMALL, tile_n=128)),
    "swap_gated": (replace(GATED, counts=(9, 0, 5)), RUNS["swap_gated_128"].config),
    "n_major": (N_MAJOR, SMALL),
    "stored": (RUNS["stored"].case, RUNS["stored"].config),
    **{
        name: (RUNS[run].case, RUNS[run].config)
        for name, run in (
            ("packed", "packed_int4_g128_16"),
            ("packed_mxfp4", "packed_mxfp4_16"),
            ("packed_rows", "packed_mxfp4"),
            ("packed_slices", "packed_one_producer"),
        )
    },
    "n_major_gated": (replace(N_MAJOR, epilogue=GATED.epilogue), replace(SMALL, tile_n=128)),
    "starts": (replace(CASE, apart=5), SMALL),
    **{name: (RUNS[name].case, RUNS[name].config) for name in ("tma_x", "blocks_tma_x")},
    "many_experts": (replace(CASE, counts=(9, 0, 70, 3)), SMALL),
}


def problem(name: str) -> GemmProblem:
    storage = WeightStorage.TABLE if name == "table" else WeightStorage.STACKED
    asked = KERNELS[name][0].problem
    return replace(asked, weight=replace(asked.weight, storage=storage))


def complaint(kernel: launch.SimulatedKernel, case: Case, order: Schedule) -> str:
    """What is wrong in a schedule; "" where nothing is."""
    inputs = make_inputs(case, "cpu", exact=True)
    more = {}
    if case.problem.stored:
        more["h"] = poisoned(case.rows, case.n, inputs["out_dtype"], "cpu")
    try:
        out = launch.simulate(kernel, {**inputs, **more}, order, rows=case.rows)
        check(out, case, inputs, exact=True)
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
