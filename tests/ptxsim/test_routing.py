"""The routing kernels in the simulator: right in every schedule, planted defects caught."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from cutlass_moe.images.toolchains import default_build
from tests.ptxsim.memory import WORKSPACE
from tests.ptxsim.ptx import Fault
from tests.ptxsim.schedule import MODES, Schedule, in_turn

if default_build() is None:
    pytest.skip("needs nvidia-cutlass-dsl", allow_module_level=True)

from cutlass_moe.ops.route import route_reference, row_capacity
from emitters.spec.layer_steps import RouteProblem, StepConfig
from tests.ptxsim.kernels import routing

THREADS = 128


@dataclass(frozen=True)
class Case:
    """ctas: 1 routes in one launch, more in two."""

    ctas: int
    tokens: int
    choices: int
    experts: int
    id_bits: int = 32
    mapped: bool = False
    factor: float | None = None
    max_rows: int | None = None  # of all experts

    @property
    def kernel(self) -> routing.StepKernel:
        return routing.kernel(RouteProblem(self.experts, self.id_bits), StepConfig(THREADS))

    def run(self, schedule: Schedule, kernel: routing.StepKernel) -> None:
        """Raises Fault, also where the result is wrong."""
        pairs = self.tokens * self.choices
        rows = pairs if self.max_rows is None else self.max_rows
        draw = np.random.default_rng(schedule.seed)
        number = 2 * self.experts if self.mapped else self.experts
        ids = draw.integers(-1, number + 1, (self.tokens, self.choices)).astype(
            f"int{self.id_bits}"
        )
        local = draw.integers(-1, self.experts + 1, number).astype(np.int32)
        outputs = {
            name: np.full(size, routing.POISON, np.int32)
            for name, size in {
                "index": min(rows, pairs), "offsets": self.experts, "inverse": pairs,
                "histograms": self.ctas * self.experts, "overflow": 1,
            }.items()
        }  # fmt: skip
        arguments = {
            "ids": ids, "expert_map": local if self.mapped else 0, "num_ids": number,
            "pairs": pairs, "choices": self.choices,
            "capacity": row_capacity(torch.from_numpy(ids), number, self.factor), "max_rows": rows,
            **outputs,
        }  # fmt: skip
        phases = (0,) if self.ctas == 1 else (1, 2)
        launches = [(kernel, self.ctas, {**arguments, "phase": phase}) for phase in phases]
        last = len(launches) - 1
        writers = {
            "index": last, "offsets": last, "inverse": WORKSPACE, "histograms": WORKSPACE,
            "overflow": last,
        }  # fmt: skip
        routing.run(launches, writers, schedule)
        expert_map = torch.from_numpy(local) if self.mapped else None
        want = route_reference(
            torch.from_numpy(ids), self.experts, expert_map=expert_map, capacity_factor=self.factor
        )
        kept = {
            "index": want.index[:rows],
            "offsets": want.offsets.clamp(max=rows),
            "inverse": want.inverse.where(want.inverse < rows, -1),
            "overflow": (want.offsets[-1:] - rows).clamp(min=0),
        }
        for name, values in kept.items():
            if outputs[name].tolist() != values.flatten().tolist():
                raise Fault(f"wrong result: {name}")


CASES = {
    "one_pair": Case(1, 1, 1, 1),
    "no_tokens": Case(1, 0, 2, 5),
    "one_cta": Case(1, 60, 3, 5),
    "several_batches": Case(1, 1100, 1, 33),
    "int64_mapped": Case(1, 40, 4, 8, id_bits=64, mapped=True),
    "capacity": Case(1, 60, 3, 5, factor=0.5),
    "max_rows": Case(1, 60, 3, 5, max_rows=70),
    "max_rows_of_five_ctas": Case(5, 170, 4, 33, mapped=True, max_rows=100),
    "more_max_rows_than_pairs": Case(1, 20, 3, 5, max_rows=1000),
    "two_ctas": Case(2, 60, 3, 5),
    "five_ctas": Case(5, 170, 4, 33, mapped=True, factor=0.75),
    "idle_ctas": Case(4, 30, 2, 3),
}


@pytest.mark.parametrize("name", CASES)
def test_route(name: str) -> None:
    for order in in_turn(CASES, name, 3):
        CASES[name].run(order, CASES[name].kernel)


DEFECTS = {
    "no_warp_barrier": ("one_cta", "bar.warp.sync", "// bar.warp.sync", "nothing orders it after"),
    "no_barrier": ("one_cta", "bar.sync", "// bar.sync", "nothing orders it after"),
    "no_wait": (
        "two_ctas",
        "griddepcontrol.wait",
        "// griddepcontrol.wait",
        "before griddepcontrol.wait",
    ),
    "ranks_from_above": ("one_cta", "%lanemask_lt", "%laneid", "two lanes write"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_caught(name: str) -> None:
    case_name, old, new, says = DEFECTS[name]
    case = CASES[case_name]
    kernel = routing.edited(case.kernel, old, new)
    said = []
    for seed, mode in enumerate(MODES):
        try:
            case.run(Schedule(seed, mode), kernel)
        except Fault as fault:
            said.append(str(fault))
    assert any(says in text for text in said), said or "not caught"
