"""GEMMs as dependent launches: right in every schedule, and what they must not do is caught."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cutlass_moe.images.toolchains import default_build
from emitters.spec.registry import GemmConfig
from tests.ptxsim.kernels.mutations import Edit, replace_nth
from tests.ptxsim.ptx import Fault
from tests.ptxsim.schedule import Schedule, in_turn
from tests.support.cases import Case, make_inputs
from tests.support.numerics import check

if default_build() is None:
    pytest.skip("needs nvidia-cutlass-dsl", allow_module_level=True)

from tests.ptxsim.kernels import launch
from tests.ptxsim.kernels.runs import BASE, CLUSTER, FEW, PINGPONG, SMALL, SWAP

KERNELS: dict[str, tuple[Case, GemmConfig]] = {
    "base": (replace(BASE, k=144), SMALL),
    "pingpong": (replace(BASE, k=144), PINGPONG),
    "cluster": (replace(BASE, counts=(140, 0, 33), k=80), CLUSTER),
    "swap": (FEW, SWAP),
    "swap_split": (FEW, replace(SWAP, split_k=2)),
    "swap_no_rows": (replace(FEW, counts=(0, 0, 0)), SWAP),
}
WAIT, TRIGGER = "griddepcontrol.wait;", "griddepcontrol.launch_dependents;"
MUTATIONS: dict[str, tuple[Edit, str]] = {  # of the second wait, which is that of `early`
    "no_wait": (replace_nth(WAIT, "", 1), "before griddepcontrol.wait"),
    "triggers_before_it_waits": (
        replace_nth(WAIT, f"{TRIGGER} {WAIT}", 1),
        "launch_dependents before griddepcontrol.wait",
    ),
    "one_warp_waits": (
        replace_nth(
            WAIT,
            "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.gt.u32 p, t, 31; "
            f"@p bra past; {WAIT} past: }}",
            1,
        ),
        "before griddepcontrol.wait",
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_what_the_grid_before_writes_late_is_awaited(name: str) -> None:
    case, config = KERNELS[name]
    kernel = launch.kernel(case.problem, config)
    for seed, order in enumerate(in_turn(KERNELS, name, 2)):
        inputs = make_inputs(case, "cpu", exact=True, seed=seed)
        out = launch.simulate(kernel, inputs, order, rows=case.rows, late=True)
        check(out, case, inputs, exact=True)


def test_weights_are_loaded_before_the_grid_before_ends() -> None:
    """By swap-AB, where that takes longer than the table of experts."""
    case, config = replace(FEW, tokens=400), SWAP
    kernel = launch.kernel(case.problem, config)
    lines: list[str] = []
    inputs = make_inputs(case, "cpu", exact=True)
    launch.simulate(kernel, inputs, Schedule(0), rows=case.rows, late=True, trace=lines.append)
    load = next(i for i, line in enumerate(lines) if "cp.async.bulk.tensor" in line)
    assert not all(line.startswith("grid 1") for line in lines[load:])


@pytest.mark.parametrize("name", ["base", "swap", "swap_split"])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_defects_are_caught(name: str, mutation: str) -> None:
    case, config = KERNELS[name]
    edit, expects = MUTATIONS[mutation]
    kernel = launch.kernel(case.problem, config)
    edited, inputs = kernel.edited(edit(kernel.ptx)), make_inputs(case, "cpu", exact=True)
    for seed in range(4):
        with pytest.raises(Fault, match=expects):
            launch.simulate(edited, inputs, Schedule(seed), rows=case.rows, late=True)
