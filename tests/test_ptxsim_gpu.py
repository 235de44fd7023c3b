"""The simulator against a GPU: the same kernels, configs and inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.kernels import forced_config
from emitters.image import build_identity
from emitters.problem import Accumulation, DType, WeightStorage
from tests.cases import make_inputs
from tests.numerics import errors, limits, poisoned, same_bits
from tests.ptxsim import launch
from tests.ptxsim.runs import RUNS, Run
from tests.ptxsim.schedule import Schedule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(build_identity() is None, reason="needs nvidia-cutlass-dsl"),
]
STACKED = {name: run for name, run in RUNS.items() if run.storage is WeightStorage.STACKED}


def _on_gpu(run: Run, inputs: dict[str, Any]) -> Tensor:
    out = poisoned(run.case.rows, run.case.n, inputs["out_dtype"], "cuda")
    on_device = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    with forced_config(run.config):
        cm.grouped_matmul_out(out, **on_device, num_sms=run.grid)
    return out.cpu()


@pytest.mark.parametrize("exact", [False, True], ids=["normal", "exact"])
@pytest.mark.parametrize("name", STACKED)
def test_simulator_agrees(name: str, exact: bool) -> None:
    """To the last bit where nothing is rounded in the tensor core, else within its rounding."""
    run = STACKED[name]
    inputs = make_inputs(run.case, "cpu", exact=exact)
    kernel = launch.kernel(run.problem, run.config)
    simulated = launch.simulate(kernel, inputs, Schedule(0), run.grid, rows=run.case.rows)
    found = _on_gpu(run, inputs)
    end = sum(run.case.counts)
    assert same_bits(found[end:], simulated[end:]), "rows that belong to nobody"
    found, simulated = found[:end], simulated[:end]
    plain = run.problem.accumulation is Accumulation.INT32 and not run.problem.epilogue
    if exact or plain:
        torch.testing.assert_close(found, simulated, rtol=0, atol=0)
        return
    difference, allowed = errors(found, simulated.double()), limits(run.problem)
    assert difference.whole <= allowed.whole, (difference, allowed)
    assert difference.worst_element <= allowed.worst_element, (difference, allowed)


def test_integer_accumulators_are_compared() -> None:
    """Among the runs is one whose output is the int32 sum itself."""
    sums = [
        run
        for run in STACKED.values()
        if run.case.operand is DType.INT8
        and run.case.out is DType.FP32
        and not run.case.epilogue
        and run.case.k * 127**2 < 2**24  # float32 holds every sum
    ]
    assert sums
