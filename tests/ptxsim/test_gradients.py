"""The gradient of an activation's result that becomes that of its input, simulated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from cutlass_moe.images.toolchains import default_build
from tests.ptxsim.ptx import Fault
from tests.ptxsim.schedule import MODES, Schedule, in_turn

if default_build() is None:
    pytest.skip("needs nvidia-cutlass-dsl", allow_module_level=True)

import cutlass_moe as cm
from cutlass_moe.layer.activate import activate_rows_backward_reference
from cutlass_moe.operands import TORCH_DTYPES, LayerOptions
from cutlass_moe.runtime.parameters import gemm_values, gemm_views
from emitters.spec.config_sm90 import GemmSm90Config
from emitters.spec.dtypes import Accumulation, DType
from emitters.spec.epilogue import ActivationGradient
from emitters.spec.gemm import GemmProblem, Major, WeightFormat
from tests.ptxsim.kernels import launch
from tests.ptxsim.kernels.mutations import Edit, consumer
from tests.ptxsim.machine import Launch, Machine
from tests.ptxsim.memory import GlobalMemory
from tests.support.numerics import poisoned

SMALL = GemmSm90Config(tile_m=64, tile_n=64, stages=2)
PINGPONG = GemmSm90Config(tile_m=64, tile_n=64, stages=2, pingpong=True)


@dataclass(frozen=True)
class Gradient:
    """ids: experts of 0 to 2 of each token; those of 3 are dropped."""

    activation: str = "swiglu"
    config: GemmSm90Config = SMALL
    tokens: int = 40
    top_k: int = 2
    hidden: int = 80
    inter: int = 72
    dtype: DType = DType.BF16
    major: Major = Major.N
    limit: float | None = None
    crowded: int = 0  # tokens whose first choice is expert 0
    grid: int = 2

    @property
    def options(self) -> LayerOptions:
        numbers = {} if self.limit is None else {"limit": self.limit, "alpha": 1.5, "beta": 0.5}
        return LayerOptions(activation=self.activation, **numbers)

    @property
    def problem(self) -> GemmProblem:
        return GemmProblem(
            x=self.dtype,
            weight=WeightFormat(self.dtype, self.major),
            accumulation=Accumulation.FP32,
            out=self.dtype,
            n=self.inter,
            k=self.hidden,
            num_experts=3,
            gather=True,
            epilogue=(ActivationGradient(self.options.function),),
        )

    def tensors(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        dtype = TORCH_DTYPES[self.dtype]

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        ids = torch.rand(self.tokens, 4, generator=generator).argsort(1)[:, : self.top_k].int()
        ids[: self.crowded, 0] = 0
        table = cm.route(ids, 3)
        rows, halves = len(table.index), 2 if self.options.function.gated else 1
        weight = random(3, self.inter, self.hidden) * self.hidden**-0.5
        found = {
            "x": random(self.tokens, self.hidden),
            "weight": weight if self.major is Major.K else weight.mT.contiguous().mT,
            "h": random(rows, halves * self.inter),
            "topk_weights": torch.rand(ids.shape, generator=generator),
            "index": table.index,
            "offsets": table.offsets,
            "inverse": table.inverse,
            "out": poisoned(rows, self.inter, dtype, "cpu"),
            "grad_h": poisoned(rows, halves * self.inter, dtype, "cpu"),
            "shares": torch.zeros(*ids.shape, self.config.n_tiles(self.problem)),
        }
        found["h"][int(table.offsets[-1]) :] = torch.nan
        found["topk_weights"][table.inverse < 0] = torch.nan
        return found

    def run(self, built: launch.SimulatedKernel, given: dict[str, Tensor], order: Schedule) -> None:
        memory, record = GlobalMemory(), built.record
        written = ("out", "grad_h", "shares")
        addresses = {
            name: memory.add(name, _bytes(tensor), writer=0 if name in written else None)
            for name, tensor in given.items()
            if name != "weight"
        }
        dense = given["weight"] if self.major is Major.K else given["weight"].mT
        addresses["weight"] = memory.add("weight", _bytes(dense))
        for name in ("h", "grad_h"):
            addresses[f"{name}_map"] = addresses[name]
        numbers = self.options.numbers or ()
        values = gemm_values(
            self.problem, addresses, self.tokens, len(given["out"]), numbers=numbers
        )
        values["choices"] = self.top_k
        strides = given["weight"].stride()
        views = gemm_views(self.problem, strides, self.tokens, len(given["out"]))
        parameters = launch.pack(record, built.code, values, views)
        job = Launch(
            built.code, self.grid, record.smem_bytes, record.registers, parameters,
            cluster=int(np.prod(record.cluster)),
        )  # fmt: skip
        Machine(memory, [job], order).run()

    def check(self, given: dict[str, Tensor]) -> None:
        end = int(given["offsets"][-1])
        index, inverse = given["index"][:end].long(), given["inverse"]
        expert = torch.searchsorted(given["offsets"], torch.arange(end), right=True)
        weight = given["weight"].double()[expert]
        grad = torch.einsum("rk,rnk->rn", given["x"].double()[index], weight)
        want_h, want, share = activate_rows_backward_reference(
            given["h"][:end].double(), grad, given["topk_weights"].double(), inverse, self.options
        )
        loose = {"rtol": 1e-3 if self.dtype is DType.FP16 else 8e-3, "atol": 1e-3}
        torch.testing.assert_close(given["grad_h"][:end].double(), want_h, **loose)
        torch.testing.assert_close(given["out"][:end].double(), want, **loose)
        torch.testing.assert_close(given["shares"].double().sum(2), share, rtol=1e-4, atol=1e-4)


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).reshape(-1).numpy()


RUNS = {
    "swiglu": Gradient(),
    "pair_128": Gradient(
        config=GemmSm90Config(128, 128, stages=2, pingpong=True, cluster_m=2),
        inter=120,
        crowded=135,
        tokens=135,
    ),
    "relu2_fp16": Gradient("relu2", PINGPONG, dtype=DType.FP16, top_k=3),
    "clamped_k_major": Gradient(limit=0.5, major=Major.K),
    "six_choices": Gradient("geglu", PINGPONG, tokens=20, top_k=3, inter=64, grid=3),
}


@pytest.mark.parametrize("name", RUNS)
def test_right_in_every_order(name: str) -> None:
    run = RUNS[name]
    built = launch.kernel(run.problem, run.config)
    for seed, order in enumerate(in_turn(RUNS, name, 2)):
        given = run.tensors(seed)
        run.run(built, given, order)
        run.check(given)


def test_a_row_of_no_token_is_zeros() -> None:
    run = RUNS["swiglu"]
    given = run.tensors(0)
    given["inverse"][given["inverse"] == 0] = -1
    given["index"][0] = run.tokens
    run.run(launch.kernel(run.problem, run.config), given, Schedule(0))
    assert not given["out"][0].any() and not given["grad_h"][0].any()


WAIT = r"mbarrier\.try_wait\.parity\.shared\.b64 P1, \[%r\d+\], %r\d+, 10000000;"
# What is planted, and in which run.
DEFECTS: dict[str, tuple[str, Edit]] = {
    "h read before it came": ("swiglu", consumer(WAIT, "setp.eq.s32 P1, 0, 0;", 2)),
    "gradients sent before lanes wrote them": (
        "swiglu",
        consumer(r"bar\.warp\.sync -1;", ""),
    ),
    "gradients that TMA may not see": (
        "swiglu",
        consumer(r"fence\.proxy\.async\.shared::cta;", "", 2),
    ),
    "h loaded over a slice in flight": (
        "pair_128",
        consumer(r"cp\.async\.bulk\.wait_group\.read 0;", "", 1),
    ),
    "an exit before slices were read": (
        "swiglu",
        consumer(r"cp\.async\.bulk\.wait_group\.read 0;", "", -1),
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_caught(name: str) -> None:
    run = RUNS[DEFECTS[name][0]]
    built = launch.kernel(run.problem, run.config)
    edited = built.edited(DEFECTS[name][1](built.ptx))
    with pytest.raises(Fault):
        for seed, mode in enumerate([*MODES, *MODES]):
            run.run(edited, run.tensors(0), Schedule(seed, mode))
