"""The kernel that sums groups of rows, simulated: right in every order."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cutlass_moe.images.toolchains import default_build
from emitters.spec.dtypes import DType
from emitters.spec.layer_steps import GatherSumProblem, StepConfig
from tests.ptxsim.schedule import Schedule

if default_build() is None:
    pytest.skip("needs nvidia-cutlass-dsl", allow_module_level=True)

from cutlass_moe.operands import TORCH_DTYPES
from tests.ptxsim.kernels.routing import kernel
from tests.ptxsim.kernels.rows import Stage, run
from tests.support.numerics import poisoned

THREADS = 64


@dataclass(frozen=True)
class Summed:
    """sizes: rows of each group. A row in three is of none, and is NaN."""

    sizes: tuple[int, ...]
    n: int
    rows: DType = DType.BF16
    out: DType = DType.BF16

    def stage(self) -> Stage:
        generator = torch.Generator().manual_seed(self.n)
        named = sum(self.sizes)
        order = torch.randperm(named + named // 3 + 1, generator=generator).int()[:named]
        rows = torch.full((named + named // 3 + 1, self.n), torch.nan)
        rows[order.long()] = torch.randint(-3, 4, (named, self.n), generator=generator).float()
        ends = torch.tensor((0, *self.sizes)).cumsum(0) + 2  # two rows before the first group
        problem = GatherSumProblem(self.rows, self.out, self.n)
        arguments: dict[str, Tensor | int] = {
            "rows": rows.to(TORCH_DTYPES[self.rows]),
            "order": torch.cat([order.new_tensor([9999, -1]), order]),
            "bounds": ends.int(),
            "out": poisoned(len(self.sizes), self.n, TORCH_DTYPES[self.out], "cpu"),
            "num_groups": len(self.sizes),
        }
        built = kernel(problem, StepConfig(THREADS))
        grid = problem.ctas(len(self.sizes), THREADS)
        return Stage(built, arguments, grid, len(self.sizes))

    def check(self, stage: Stage) -> None:
        rows, order, bounds, out = (
            stage.arguments[name] for name in ("rows", "order", "bounds", "out")
        )
        assert isinstance(rows, Tensor) and isinstance(order, Tensor)
        assert isinstance(bounds, Tensor) and isinstance(out, Tensor)
        for group, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            want = rows[order[first:end].long()].float().sum(0)  # whole numbers: exact
            assert torch.equal(out[group].float(), want)


CASES = {
    "ragged": Summed((3, 0, 1, 9, 4, 5, 0), 24),
    "one_group": Summed((13,), 72),
    "nothing": Summed((0, 0), 8),
    "float32_to_float16": Summed((2, 4, 1), 20, DType.FP32, DType.FP16),
}


@pytest.mark.parametrize("name", CASES)
def test_groups_are_summed(name: str) -> None:
    case = CASES[name]
    for seed, mode in enumerate(("random", "starved_warp", "apart")):
        stage = case.stage()
        run([stage], Schedule(seed, mode))
        case.check(stage)
