"""grouped_weight_grad's kernels on a GPU, against exact sums and float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.choose.weight_grads_sm90 import weight_grad_configs
from cutlass_moe.ops.weight_grad import SummedOperands, weight_grad_launch
from cutlass_moe.runtime.device import on_device
from emitters.spec.dtypes import DType
from emitters.spec.registry import why_illegal
from emitters.spec.weight_grad import Side, WeightGradProblem, WeightGradSm90Config
from tests.support.layouts import misaligned, padded
from tests.support.numerics import poisoned, same_bits, untouched
from tests.support.weight_grads import make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIGS = {
    "128x256": WeightGradSm90Config(128, 256),
    "256x128": WeightGradSm90Config(256, 128, group_m=2),
    "128x256 pairs": WeightGradSm90Config(128, 256, cluster=2, group_m=2),
    "in turn 128x192": WeightGradSm90Config(128, 192, pingpong=True),
    "in turn 128x128": WeightGradSm90Config(128, 128, pingpong=True, group_m=3),
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    counts: tuple[int, ...]
    m: int
    n: int
    gathered: str | None = "right"
    dtype: torch.dtype = BF16
    out: torch.dtype = BF16
    accumulate: bool = False
    gaps: bool = False
    tokens: int = 700

    def inputs(self) -> dict[str, Any]:
        """On the GPU; NaN in rows that may not be read."""
        made = make_inputs(
            list(self.counts), self.m, self.n, self.gathered,
            tokens=self.tokens, spare=77, gaps=self.gaps, dtype=self.dtype,
        )  # fmt: skip
        return {name: tensor.cuda() for name, tensor in made.items()}

    def problem(self) -> WeightGradProblem:
        dtypes = {BF16: DType.BF16, FP16: DType.FP16, FP32: DType.FP32}
        return WeightGradProblem(
            dtypes[self.dtype], dtypes[self.out], self.m, self.n, len(self.counts),
            None if self.gathered is None else Side(self.gathered), self.accumulate,
        )  # fmt: skip

    def before(self) -> Tensor:
        """What out holds before: whole numbers to add to, or NaN, with room behind."""
        out = poisoned(len(self.counts) * self.m, self.n, self.out, "cuda")
        if self.accumulate:
            generator = torch.Generator().manual_seed(1)
            out.copy_(torch.randint(-99, 99, out.shape, generator=generator))
        return out

    def want(self, inputs: dict[str, Any], before: Tensor) -> Tensor:
        out = before.to(FP32, copy=True).view(len(self.counts), self.m, self.n)
        wide = {**inputs, "left": inputs["left"].float(), "right": inputs["right"].float()}
        cm.grouped_weight_grad_reference(**wide, out=out, accumulate=self.accumulate)
        return out.to(self.out)


SHAPE = ((0, 1000, 63, 0, 385), 264, 392)  # tails of M and N
CASES = {
    "right": Case(*SHAPE),
    "left, fp32": Case(*SHAPE, "left", out=FP32),
    "in order, gaps": Case(*SHAPE, None, gaps=True),
    "fp16, gaps": Case(*SHAPE, "left", FP16, FP16, gaps=True),
    "add fp32": Case(*SHAPE, "right", out=FP32, accumulate=True),
    "add fp32 in order": Case(*SHAPE, None, out=FP32, accumulate=True),
    "add bf16": Case(*SHAPE, "left", accumulate=True),
    "add fp16": Case(*SHAPE, "right", FP16, FP16, accumulate=True, gaps=True),
    "no rows": Case((0, 0, 0), 264, 392),
    "one row": Case((0, 0, 1), 264, 392),
    "one expert": Case((0, 4000, 0), 264, 392),
    "no tokens": Case(*SHAPE, tokens=0),
    "narrow": Case((70, 0, 5), 8, 8, "left"),
    "many experts": Case((3, 0, 130) * 100, 136, 200, "left", out=FP32, accumulate=True),
}


def images() -> set[tuple[WeightGradProblem, WeightGradSm90Config]]:
    found = set()
    for case in (*CASES.values(), MODEL, replace(MODEL, out=FP32, accumulate=True)):
        problem = case.problem()
        configs = (*CONFIGS.values(), *weight_grad_configs(problem))
        found |= {(problem, c) for c in configs if why_illegal(problem, c) is None}
    return found


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", CASES)
def test_sums_are_exact(name: str, config: str) -> None:
    case = CASES[name]
    inputs, before = case.inputs(), case.before()
    out = before.clone() if case.accumulate else before
    operands = SummedOperands(**inputs)
    choice = weight_grad_launch(operands, case.problem(), CONFIGS[config])
    want = case.want(inputs, before)
    on_device(0, partial(choice.launch, operands.addresses(out)))
    torch.cuda.synchronize()
    assert torch.equal(out.view(want.shape), want)
    if not case.accumulate:
        assert untouched(out, torch.zeros(len(out), dtype=torch.bool))


@pytest.mark.parametrize("name", CASES)
def test_the_op_takes_a_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    case = CASES[name]
    inputs, before = case.inputs(), case.before()
    shape = len(case.counts), case.m, case.n
    want = case.want(inputs, before)
    if not case.accumulate:
        got = cm.grouped_weight_grad(**inputs, out_dtype=case.out)
        assert got.dtype == case.out and torch.equal(got, want)
    out = before.clone().view(shape)
    assert cm.grouped_weight_grad(**inputs, out=out, accumulate=case.accumulate) is out
    assert torch.equal(out, want)


MODEL = Case((300, 0, 812, 5, 1024, 64, 0, 3), 768, 1024, tokens=4096)


@pytest.mark.parametrize("accumulate", [False, True], ids=["write", "add"])
def test_normal_values_against_float64_and_bit_by_bit(accumulate: bool) -> None:
    case = replace(MODEL, out=FP32, accumulate=True) if accumulate else MODEL
    inputs = case.inputs()
    generator = torch.Generator("cuda").manual_seed(0)
    for name in ("left", "right"):
        inputs[name].normal_(generator=generator)
    before = torch.randn(len(case.counts), case.m, case.n, device="cuda").to(case.out)
    wide = {**inputs, "left": inputs["left"].double(), "right": inputs["right"].double()}
    want = cm.grouped_weight_grad_reference(**wide, out=before.double(), accumulate=accumulate)

    def run() -> Tensor:
        return cm.grouped_weight_grad(**inputs, out=before.clone(), accumulate=accumulate)

    got = run()
    error = (got.double() - want).norm() / want.norm()
    assert error < (1e-6 if accumulate else 3e-3)
    assert all(same_bits(run(), got) for _ in range(5))


def test_other_forms() -> None:
    case = CASES["right"]
    inputs, before = case.inputs(), case.before()
    want = case.want(inputs, before)
    inputs = {**inputs, "left": padded(inputs["left"]), "right": padded(inputs["right"])}
    assert torch.equal(cm.grouped_weight_grad(**inputs), want)
    inputs["offsets"], inputs["right_index"] = (
        inputs["offsets"].long(),
        inputs["right_index"].long(),
    )
    assert torch.equal(cm.grouped_weight_grad(**inputs), want)
    with pytest.warns(UserWarning, match="address of left"):
        moved = misaligned(inputs["left"].contiguous())
        assert torch.equal(cm.grouped_weight_grad(**{**inputs, "left": moved}), want)
    out = torch.zeros(len(case.counts), case.n, case.m, dtype=BF16, device="cuda").mT
    assert torch.equal(cm.grouped_weight_grad(**inputs, out=out), want)


def test_widths_without_a_kernel_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((5, 0, 9), 12, 20)
    inputs, before = case.inputs(), case.before()
    with pytest.warns(UserWarning, match="M must be a positive multiple of 8 .* got 12"):
        assert torch.equal(cm.grouped_weight_grad(**inputs), case.want(inputs, before))
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    with pytest.raises(RuntimeError, match="M must be a positive multiple of 8"):
        cm.grouped_weight_grad(**inputs)


def test_in_a_graph_with_other_offsets() -> None:
    case = CASES["add fp32"]
    inputs, before = case.inputs(), case.before()
    shape = len(case.counts), case.m, case.n
    out = before.clone().view(shape)
    cm.grouped_weight_grad(**inputs, out=out, accumulate=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cm.grouped_weight_grad(**inputs, out=out, accumulate=True)
    inputs["left"].nan_to_num_(1.0)
    inputs["right"].nan_to_num_(2.0)
    inputs["offsets"].copy_(torch.tensor([10, 10, 500, 1300, 1448]))
    out.copy_(before.view(shape))
    want = case.want(inputs, before)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)


def test_compiled() -> None:
    case = CASES["right"]
    inputs, before = case.inputs(), case.before()
    compiled = torch.compile(cm.grouped_weight_grad, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**inputs), case.want(inputs, before))
