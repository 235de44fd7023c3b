"""topk_router's and route_logits' kernels in the simulator: right in every schedule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cutlass_moe.images.toolchains import default_build
from tests.ptxsim.memory import WORKSPACE
from tests.ptxsim.ptx import Fault
from tests.ptxsim.schedule import MODES, Schedule, in_turn
from tests.support.topk_cases import OPTIONS, Case, check

if default_build() is None:
    pytest.skip("needs nvidia-cutlass-dsl", allow_module_level=True)

from cutlass_moe.operands import Router
from cutlass_moe.ops.route import route_reference, row_capacity
from cutlass_moe.ops.router import topk_router_reference
from cutlass_moe.runtime.parameters import router_values
from emitters.spec.layer_steps import StepConfig
from tests.ptxsim.kernels import routing

CONFIG = StepConfig(128)
FORMS = {
    "softmax": Case(6, 33, 4, options=OPTIONS["softmax"]),
    "as_is": Case(6, 16, 3, options=OPTIONS["as_is"]),
    "bf16_threshold": Case(9, 64, 8, torch.bfloat16, options=OPTIONS["threshold"]),
    "groups": Case(5, 32, 4, options=OPTIONS["groups"]),
    "deepseek": Case(5, 256, 8, options=OPTIONS["deepseek"]),
    "one_expert": Case(3, 1, 1),
}
CASES = {
    f"{name}_{how}": replace(case, how=how)
    for name, case in FORMS.items()
    for how in ("random", "ties", "special")
}


class Call:
    """A case's tensors and the arguments of both kernels."""

    def __init__(self, case: Case, seed: int):
        self.case = case
        self.logits, self.options = case.make(seed)
        self.weights = np.full((case.tokens, case.k), routing.POISON, np.float32)
        self.ids = np.full((case.tokens, case.k), routing.POISON, np.int32)
        bias = self.options.get("correction_bias")
        router = Router(case.k, **self.options)
        numbers = router_values(
            {},
            num_tokens=case.tokens,
            k=router.k,
            topk_groups=router.topk_groups,
            renormalize=router.renormalize,
            scale=router.scale,
            threshold=router.threshold,
        )
        self.arguments: dict[str, np.ndarray | int] = {
            **numbers,
            "logits": self.logits.view(torch.uint8).numpy(),
            "correction_bias": 0 if bias is None else bias.numpy(),
            "weights": self.weights,
            "ids": self.ids,
        }

    def check(self) -> None:
        want = topk_router_reference(self.logits, self.case.k, **self.options)
        check((torch.from_numpy(self.weights), torch.from_numpy(self.ids)), want, exact=True)


@pytest.mark.parametrize("name", CASES)
def test_topk_router(name: str) -> None:
    case = CASES[name]
    kernel = routing.kernel(case.problem(), CONFIG)
    for order in in_turn(CASES, name, 3):
        call = Call(case, order.seed)
        launch = (kernel, -(-case.tokens // 4), call.arguments)
        routing.run([launch], {"weights": 0, "ids": 0}, order)
        call.check()


def run_fused(case: Case, kernel: routing.StepKernel, schedule: Schedule) -> None:
    call = Call(case, schedule.seed)
    pairs, experts = case.tokens * case.k, case.experts
    sizes = {"index": pairs, "offsets": experts, "inverse": pairs}
    table = {name: np.full(size, routing.POISON, np.int32) for name, size in sizes.items()}
    capacity = row_capacity(torch.from_numpy(call.ids), experts, 0.75)
    limits = {"capacity": capacity, "max_rows": pairs, "overflow": 0}
    arguments = {**call.arguments, **table, **limits}
    writers = {"weights": 0, "ids": WORKSPACE, "index": 0, "offsets": 0, "inverse": WORKSPACE}
    routing.run([(kernel, 1, arguments)], writers, schedule)
    call.check()
    want = route_reference(torch.from_numpy(call.ids), experts, capacity_factor=0.75)
    for name, values in table.items():
        assert values.tolist() == getattr(want, name).flatten().tolist()


@pytest.mark.parametrize("name", ["softmax_random", "groups_special", "one_expert_ties"])
def test_route_logits(name: str) -> None:
    kernel = routing.kernel(CASES[name].fused(), CONFIG)
    for seed, mode in enumerate(MODES):
        run_fused(CASES[name], kernel, Schedule(seed, mode))


def test_a_missing_barrier_is_caught() -> None:
    """Other warps read the ids that a warp chose."""
    case = CASES["softmax_random"]
    kernel = routing.edited(routing.kernel(case.fused(), CONFIG), "bar.sync", "// bar.sync")
    with pytest.raises(Fault, match="nothing orders it after the write"):
        for seed, mode in enumerate(MODES):
            run_fused(case, kernel, Schedule(seed, mode))
