"""The simulator against a GPU: the same kernels, configs and inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cutlass_moe.images.toolchains import default_build
from cutlass_moe.runtime.library import load
from cutlass_moe.runtime.parameters import gemm_values, gemm_views
from emitters.spec.dtypes import Accumulation
from emitters.spec.gemm import WeightStorage
from tests.ptxsim.kernels import launch
from tests.ptxsim.kernels.runs import RUNS, Run
from tests.ptxsim.schedule import Schedule
from tests.support.cases import make_inputs
from tests.support.numerics import errors, limits, poisoned, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(default_build() is None, reason="needs nvidia-cutlass-dsl"),
]
STACKED = {name: run for name, run in RUNS.items() if run.storage is WeightStorage.STACKED}


def _on_gpu(run: Run, inputs: dict[str, Any]) -> Tensor:
    """The same kernel, launched without the op: that takes no 8-bit operands without scales."""
    out = poisoned(run.case.rows, run.problem.out_columns, inputs["out_dtype"], "cuda")
    kernel = load(run.problem, run.config, torch.cuda.current_device())
    inputs, strides = launch.in_columns(kernel.record, inputs)
    on = {name: t.cuda() for name, t in inputs.items() if isinstance(t, Tensor)}
    addresses = {name: tensor.data_ptr() for name, tensor in on.items()}
    addresses["out"] = out.data_ptr()
    interleaved = inputs.get("interleaved", False)
    values = gemm_values(
        run.problem,
        addresses,
        len(inputs["x"]),
        len(out),
        strides=strides,
        interleaved=interleaved,
        numbers=launch.numbers_of(inputs),
    )
    views = gemm_views(
        run.problem,
        on["weight"].stride(),
        len(inputs["x"]),
        len(out),
        strides=strides,
        interleaved=interleaved,
    )
    stream = torch.cuda.current_stream().cuda_stream
    kernel.launch(values, run.grid, stream, views=views)
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
    owned = run.case.owned
    assert same_bits(found[~owned], simulated[~owned]), "rows that belong to nobody"
    found, simulated = found[owned], simulated[owned]
    plain = run.problem.accumulation is Accumulation.INT32 and not run.case.epilogue
    if plain or (exact and run.problem.activation is None):
        torch.testing.assert_close(found, simulated, rtol=0, atol=0)
        return
    difference, allowed = errors(found, simulated.double()), limits(run.problem, exact)
    assert difference.whole <= allowed.whole, (difference, allowed)
    assert difference.worst_element <= allowed.worst_element, (difference, allowed)
