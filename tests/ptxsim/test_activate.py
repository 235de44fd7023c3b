"""The kernels of a layer's activation in training, simulated: right in every order."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cutlass_moe.images.toolchains import default_build
from emitters.spec.dtypes import DType
from emitters.spec.epilogue import ActivationFunction
from emitters.spec.layer_steps import ActivateBackwardProblem, ActivateProblem, StepConfig
from tests.ptxsim.ptx import Fault
from tests.ptxsim.schedule import MODES, Schedule

if default_build() is None:
    pytest.skip("needs nvidia-cutlass-dsl", allow_module_level=True)

from cutlass_moe.layer.activate import activate_rows_backward_reference, activate_rows_reference
from cutlass_moe.operands import TORCH_DTYPES, LayerOptions
from cutlass_moe.runtime.parameters import activate_values
from tests.ptxsim.kernels.routing import edited, kernel
from tests.ptxsim.kernels.rows import Stage, run
from tests.support.numerics import poisoned

BF16, FP16 = DType.BF16, DType.FP16
THREADS = 64


@dataclass(frozen=True)
class Activated:
    """rows: of h; the last ones, which no pair has, are NaN. limit: of a clamped SwiGLU."""

    activation: str
    inter: int
    tokens: int = 4
    top_k: int = 2
    rows: int = 6
    dtype: DType = BF16
    interleaved: bool = False
    limit: float | None = None
    writes_active: bool = True

    @property
    def options(self) -> LayerOptions:
        numbers = {} if self.limit is None else {"limit": self.limit, "alpha": 1.5, "beta": 0.5}
        return LayerOptions(activation=self.activation, interleaved=self.interleaved, **numbers)

    def problem(self, kind: type[ActivateProblem]) -> ActivateProblem:
        function = self.options.function
        return kind(function, self.dtype, self.inter, self.interleaved)

    @property
    def kept(self) -> int:
        """The rows that pairs have: all but one, and no more than there are pairs."""
        return min(self.rows - 1, self.tokens * self.top_k)

    def tensors(self, backward: bool) -> dict[str, Tensor | int]:
        generator = torch.Generator().manual_seed(self.inter)
        dtype, pairs = TORCH_DTYPES[self.dtype], self.tokens * self.top_k
        inverse = torch.full((pairs,), -1, dtype=torch.int32)
        inverse[1::3] = self.rows  # past the end: no row either
        order = torch.randperm(pairs, generator=generator)[: self.kept]
        inverse[order] = torch.arange(self.kept, dtype=torch.int32)
        columns = self.problem(ActivateProblem).columns

        def numbers(width: int) -> Tensor:
            values = 3 * torch.randn(self.rows, width, generator=generator)
            values[self.kept :] = torch.nan
            return values.to(dtype)

        found: dict[str, Tensor | int] = {
            "h": numbers(columns),
            "inverse": inverse,
            "active": poisoned(self.rows, self.inter, dtype, "cpu"),
        }
        if backward:
            found["grad_active"] = numbers(self.inter)
            weights = torch.rand(pairs, 1, generator=generator)
            weights[inverse < 0] = torch.nan
            found["weights"] = weights
            found["grad_h"] = poisoned(self.rows, columns, dtype, "cpu")
            found["grad_weights"] = poisoned(pairs, 1, torch.float32, "cpu")
            if not self.writes_active:
                found["active"] = 0
        return found

    def stage(self, backward: bool, edit: tuple[str, str] | None = None) -> Stage:
        problem = self.problem(ActivateBackwardProblem if backward else ActivateProblem)
        built = kernel(problem, StepConfig(THREADS))
        tensors, options = self.tensors(backward), self.options
        pairs = self.tokens * self.top_k
        numbers = options.numbers._asdict() if options.numbers else {}
        arguments = {**activate_values({}, self.rows, pairs, numbers), **tensors}
        written = {"active": self.kept, "grad_h": self.kept, "grad_weights": pairs}
        if isinstance(tensors["active"], int):
            del written["active"]
        grid = problem.ctas(pairs, THREADS)
        return Stage(edited(built, *edit) if edit else built, arguments, grid, written)

    def check(self, stage: Stage, backward: bool) -> None:
        """Within a rounding of the output's dtype, and float32's of sums."""
        given = stage.arguments
        h, inverse, active = given["h"], given["inverse"], given["active"]
        assert isinstance(h, Tensor) and isinstance(inverse, Tensor)
        if not backward:
            want: dict[str, Tensor] = {
                "active": activate_rows_reference(h.double(), inverse, self.options)
            }
        else:
            grad, weights = given["grad_active"], given["weights"]
            assert isinstance(grad, Tensor) and isinstance(weights, Tensor)
            found = activate_rows_backward_reference(
                h.double(), grad.double(), weights.double(), inverse, self.options
            )
            want = dict(zip(("grad_h", "active", "grad_weights"), found, strict=True))
        for name, right in want.items():
            got = given[name]
            if isinstance(got, int):
                continue
            count = stage.written[name]  # type: ignore[index]
            loose = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-4}[got.dtype]
            torch.testing.assert_close(
                got[:count].double(),
                right[:count],
                rtol=loose,
                atol=1e-3,
                msg=lambda m, n=name: n + m,
            )
        assert isinstance(active, Tensor) or not self.writes_active


CASES = {
    **{
        str(function): Activated(str(function), 8 * (3 + number % 2))
        for number, function in enumerate(ActivationFunction)
    },
    "fp16": Activated("swiglu", 72, dtype=FP16),
    "interleaved": Activated("geglu", 40, interleaved=True),
    "clamped": Activated("swiglu", 264, limit=2.0, interleaved=True),
    "a_vector_a_lane": Activated("swiglu", 256),
    "two_trips": Activated("geglu_tanh", 1288, tokens=2, top_k=1, rows=3),
    "frozen_down": Activated("swiglu", 48, writes_active=False),
    "more_rows_than_pairs": Activated("silu", 16, tokens=3, top_k=1, rows=9),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", CASES)
def test_rows_are_activated(name: str, backward: bool) -> None:
    case = CASES[name]
    if not (backward or case.writes_active):
        pytest.skip("of gradients")
    for seed, mode in enumerate(("random", "starved_warp", "apart")):
        stage = case.stage(backward)
        run([stage], Schedule(seed, mode))
        case.check(stage, backward)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_wait_left_out_is_caught(backward: bool) -> None:
    first = CASES["silu"].stage(False)
    second = Activated("relu", CASES["silu"].inter)
    for edit, caught in ((None, False), (("griddepcontrol.wait;", ""), True)):
        stage = second.stage(backward, edit)
        chained = Stage(
            stage.kernel,
            {**stage.arguments, "h": first.arguments["active"]},
            stage.grid,
            stage.written,
        )
        assert _found([first, chained]) is caught


def _found(stages: list[Stage]) -> bool:
    """Whether the simulator finds a wait that is missing, in some order."""
    for seed in range(2):
        for mode in MODES:
            try:
                run(stages, Schedule(seed, mode))
            except Fault as fault:
                assert "before griddepcontrol.wait" in str(fault)
                return True
    return False
