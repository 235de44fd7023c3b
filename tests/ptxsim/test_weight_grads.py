"""The kernels of grouped weight gradients, simulated: right in every order, defects caught."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cutlass_moe.images.toolchains import default_build
from emitters.spec.dtypes import DType
from emitters.spec.weight_grad import Side, WeightGradProblem, WeightGradSm90Config
from tests.ptxsim.ptx import Fault
from tests.ptxsim.schedule import MODES, Schedule, in_turn

if default_build() is None:
    pytest.skip("needs nvidia-cutlass-dsl", allow_module_level=True)

from cutlass_moe.operands import TORCH_DTYPES
from cutlass_moe.ops.weight_grad import grouped_weight_grad_reference
from tests.ptxsim.kernels.mutations import Edit, consumer, producer, setup
from tests.ptxsim.kernels.weight_grads import WeightGradKernel, edited, kernel, simulate
from tests.support.weight_grads import make_inputs

BF16, FP16, FP32 = DType.BF16, DType.FP16, DType.FP32


@dataclass(frozen=True)
class Run:
    counts: tuple[int, ...]
    m: int
    n: int
    gathered: Side | None
    config: WeightGradSm90Config
    operand: DType = BF16
    out: DType = BF16
    accumulate: bool = False
    gaps: bool = False
    grid: int = 2

    @property
    def problem(self) -> WeightGradProblem:
        experts = len(self.counts)
        return WeightGradProblem(
            self.operand, self.out, self.m, self.n, experts, self.gathered, self.accumulate
        )

    def inputs(self) -> dict[str, Any]:
        """NaN in rows that may not be read."""
        gathered = None if self.gathered is None else self.gathered.value
        dtype = TORCH_DTYPES[self.operand]
        return make_inputs(list(self.counts), self.m, self.n, gathered, gaps=self.gaps, dtype=dtype)

    def check(self, built: WeightGradKernel, order: Schedule) -> None:
        inputs, dtype = self.inputs(), TORCH_DTYPES[self.out]
        shape = len(self.counts), self.m, self.n
        generator = torch.Generator().manual_seed(1)
        old = torch.randint(-9, 9, shape, generator=generator).to(dtype)
        before: Tensor | None = old if self.accumulate else None
        want = grouped_weight_grad_reference(**inputs, out=old.clone(), accumulate=self.accumulate)
        got = simulate(built, inputs, order, before, self.grid)
        if not torch.equal(got, want):
            raise Fault(f"wrong at {(got != want).nonzero()[0].tolist()}")


def config(tile_m: int, tile_n: int, pingpong: bool = False, **more: Any) -> WeightGradSm90Config:
    return WeightGradSm90Config(tile_m, tile_n, pingpong=pingpong, **more)


ROWS = (70, 0, 129)  # ragged, none, more than two stages
LEFT, RIGHT = Side.LEFT, Side.RIGHT
RUNS = {
    "right": Run(ROWS, 136, 72, RIGHT, config(128, 64)),
    "left_tall": Run(ROWS, 200, 72, LEFT, config(256, 64, stages=2)),
    "in_order": Run(ROWS, 136, 136, None, config(128, 128, group_m=1), FP16, FP32),
    "gaps": Run(ROWS, 72, 136, RIGHT, config(128, 128), FP16, FP16, gaps=True),
    "in_turn": Run((1, 0, 130, 64), 136, 72, LEFT, config(128, 64, True), out=FP32),
    "in_turn_few_stages": Run((1, 70, 0), 72, 200, RIGHT, config(64, 64, True, stages=2)),
    "in_turn_alone": Run((65,), 8, 8, RIGHT, config(128, 64, True), grid=1),
    "pair_left": Run(ROWS, 136, 136, RIGHT, config(128, 64, cluster=2)),
    "pair_right": Run(ROWS, 200, 72, LEFT, config(128, 128, True, cluster=2, group_m=1), grid=4),
    "pair_in_order": Run((65, 0), 264, 72, None, config(256, 128, cluster=2), out=FP32),
    "few_columns": Run((70, 0, 65), 8, 72, RIGHT, config(64, 256, True), out=FP32),
    "no_rows": Run((0, 0), 72, 72, RIGHT, config(128, 64, True)),
    "add": Run(ROWS, 72, 200, RIGHT, config(128, 256), out=FP32, accumulate=True),
    "add_bf16": Run(ROWS, 72, 136, LEFT, config(128, 128), accumulate=True, gaps=True),
    "add_in_turn": Run((1, 0, 70), 136, 72, None, config(128, 128, True), FP16, FP32, True),
    "add_bf16_in_turn": Run((0, 65), 72, 200, LEFT, config(128, 192, True), accumulate=True),
}


@pytest.mark.parametrize("name", RUNS)
def test_sums_are_exact_in_every_order(name: str) -> None:
    run = RUNS[name]
    built = kernel(run.problem, run.config)
    for order in in_turn(RUNS, name):
        run.check(built, order)


WAIT = r"mbarrier\.try_wait\.parity\.shared\.b64 P1, \[%r\d+\], %r\d+, 10000000;"
STORES_READ, PROXIES = r"cp\.async\.bulk\.wait_group\.read 0;", r"fence\.proxy\.async\.shared::cta;"
# What is planted, and in which run.
DEFECTS: dict[str, tuple[str, Edit]] = {
    "a barrier of one arrival": ("right", setup(r"(init\S+ \[%r\d+\+\d+\]), %r\d+", r"\1, 1")),
    "operands released too early": (
        "right",
        consumer(r"(wgmma\.wait_group\.sync\.aligned) 1;", r"\1 2;"),
    ),
    "a tile stored before its sums": (
        "right",
        consumer(r"wgmma\.wait_group\.sync\.aligned 0;", ""),
    ),
    "copies that WGMMA may not see": ("right", consumer(PROXIES, "")),
    "a slice sent before lanes wrote it": ("right", consumer(r"bar\.warp\.sync -1;", "", 1)),
    "a slice that TMA may not see": ("right", consumer(PROXIES, "", 1)),
    "a buffer taken too early": ("right", consumer(STORES_READ, "")),
    "an exit before slices were read": ("right", consumer(STORES_READ, "", -1)),
    "rows one too early": (
        "right",
        producer(r"(add\.s32 %r\d+, %r\d+), 1073741824;", r"\1, 1073741823;"),
    ),
    "a stage not released to the other CTA": (
        "pair_left",
        consumer(r"setp\.gt\.u32 (%p\d+), (%r\d+), 1;", r"setp.gt.u32 \1, \2, 0;"),
    ),
    "no turns": ("in_turn", consumer(r"bar\.sync %r\d+, 256;", "")),
    "a turn not passed on": ("in_turn", consumer(r"bar\.arrive %r\d+, 256;", "")),
    "old values not waited for": ("add", consumer(WAIT, "setp.eq.s32 P1, 0, 0;", 1)),
    "old values over a slice in flight": (
        "add",
        consumer(r"cp\.async\.bulk\.wait_group\.read 1;", ""),
    ),
    "old values of the next tile too early": ("add", consumer(STORES_READ, "")),
}


def _said(run: Run, built: WeightGradKernel) -> str:
    """What the simulator finds in some order; empty where nothing."""
    for mode in MODES:
        for seed in range(2):
            try:
                run.check(built, Schedule(seed, mode))
            except Fault as fault:
                return str(fault)
    return ""


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_caught(name: str) -> None:
    run = RUNS[DEFECTS[name][0]]
    assert _said(run, edited(kernel(run.problem, run.config), DEFECTS[name][1]))
