"""`python -m perf.weight_grads`: gradients of experts' weights, against torch's grouped product.

A case has two products: "up", dH^T X[token] [2 I, H] of each expert, and "down", dO[token]^T A
[H, I]. Timed as perf/README.md says (L2 flushed, turns in random order, medians); every output is
compared with float64 before it is timed.

  ours            grouped_weight_grad, bfloat16 output; the operand of tokens is gathered
  fp32, fp32 add  the same with float32 output, and added to it
  torch           torch._grouped_mm, 2D x 2D, of operands that were gathered before
  torch, copy     the same with the copy that gathers

floor: the reading and writing of a float32 gradient at the measured copy rate. With --configs every
config is measured instead of the one that a call gets. `build` compiles the images.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import click
import torch
from torch import Tensor

from cutlass_moe import grouped_weight_grad
from cutlass_moe.choose.weight_grads_sm90 import weight_grad_configs
from cutlass_moe.models.shapes import MODELS, MoeShape
from cutlass_moe.ops.weight_grad import SummedOperands, weight_grad_launch
from cutlass_moe.runtime.device import on_device
from cutlass_moe.tune.timing import flush_buffer
from emitters.spec.registry import why_illegal
from emitters.spec.weight_grad import WeightGradProblem, WeightGradSm90Config
from perf.cases import Case
from perf.images import build_all
from perf.machine import ceilings, versions
from perf.report import text_table
from perf.routing import draw_topk_ids
from perf.timing import Timing, interleaved

SHAPES = {
    "qwen3-30b": MODELS["qwen3-30b"],
    "mixtral": MODELS["mixtral"],
    # SonicMoE's (arXiv 2512.14080, figure 14): experts, top-k, hidden, inter
    "sonic-d1536-n256": MoeShape("sonic-d1536-n256", 128, 8, 1536, 256),
    "sonic-n256": MoeShape("sonic-n256", 256, 16, 4096, 256),
    "sonic-n512": MoeShape("sonic-n512", 128, 8, 4096, 512),
    "sonic-n1024-e64": MoeShape("sonic-n1024-e64", 64, 4, 4096, 1024),
    "sonic-n1024-e128": MoeShape("sonic-n1024-e128", 128, 8, 4096, 1024),
    "sonic-n2048": MoeShape("sonic-n2048", 64, 4, 4096, 2048),
}
TOKENS = {
    "qwen3-30b": (4096, 8192, 16384, 32768),
    "mixtral": (4096, 8192, 16384, 32768),
    "sonic-d1536-n256": (24576,),
}
SONIC_TOKENS = (32768,)
PARTS = ("up", "down")
OURS, FP32, ADD, TORCH, COPY = "ours", "fp32", "fp32 add", "torch", "torch, copy"
KINDS = {OURS: (torch.bfloat16, False), FP32: (torch.float32, False), ADD: (torch.float32, True)}
SECONDS = 0.6  # of timing a case
WORST_ERROR = {torch.bfloat16: 4e-3, torch.float32: 2e-4}  # relative to the largest value
EVERY_CONFIG = (
    WeightGradSm90Config(128, 256),
    WeightGradSm90Config(256, 128),
    WeightGradSm90Config(256, 192),
    WeightGradSm90Config(128, 192, pingpong=True),
    WeightGradSm90Config(128, 128, pingpong=True),
    WeightGradSm90Config(128, 256, cluster=2, group_m=8),
    WeightGradSm90Config(256, 128, cluster=2, group_m=8),
)
Call = Callable[[], object]


def select(models: str, tokens: str) -> Iterator[Case]:
    """The cases of these names and numbers, each a list separated by commas; of "", all."""
    counts = tuple(int(count) for count in tokens.split(",") if count)
    for name in [name for name in models.split(",") if name] or SHAPES:
        if name not in SHAPES:
            raise click.UsageError(f"model must be one of {', '.join(SHAPES)}, got {name!r}")
        shape = SHAPES[name]
        for count in counts or TOKENS.get(name, SONIC_TOKENS):
            for part in PARTS:
                sizes = shape.num_experts, shape.top_k, shape.hidden, shape.inter
                yield Case("weight_grad", name, part, "bf16", count, *sizes)


def problem_of(case: Case, kind: str) -> WeightGradProblem:
    """The problem that a case poses; without a GPU."""
    dtype, accumulate = KINDS[kind]
    left, right = widths(case)
    on_meta = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    index = torch.empty(case.rows, dtype=torch.int32, device="meta")
    ends = torch.empty(case.num_experts, dtype=torch.int32, device="meta")
    up = case.part == "up"
    operands = SummedOperands(
        on_meta(1, left), on_meta(1, right), ends, None if up else index, index if up else None
    )
    return operands.problem(dtype, accumulate)


def widths(case: Case) -> tuple[int, int]:
    """The columns of left and of right."""
    return (2 * case.inter, case.hidden) if case.part == "up" else (case.hidden, case.inter)


class GradInputs:
    """The operands of a case on the GPU: of tokens, of rows in order, and the former gathered."""

    def __init__(self, case: Case) -> None:
        self.case = case
        ids = draw_topk_ids(case).flatten().cuda()
        expert_of, order = torch.sort(ids, stable=True)
        self.index = (order // case.top_k).int()
        self.counts = torch.bincount(expert_of, minlength=case.num_experts)
        self.ends = self.counts.cumsum(0).int()
        torch.manual_seed(case.seed)
        normal = partial(torch.randn, dtype=torch.bfloat16, device="cuda")
        self.tokens = normal(case.tokens, case.hidden)
        self.rows = normal(case.rows, widths(case)[case.part == "down"])
        self.up = case.part == "up"

    @property
    def operands(self) -> SummedOperands:
        if self.up:
            return SummedOperands(self.rows, self.tokens, self.ends, right_index=self.index)
        return SummedOperands(self.tokens, self.rows, self.ends, left_index=self.index)

    def gather(self) -> Tensor:
        return torch.index_select(self.tokens, 0, self.index)

    def torch_product(self, gathered: Tensor) -> Tensor:
        left, right = (self.rows, gathered) if self.up else (gathered, self.rows)
        return torch._grouped_mm(left.t(), right, offs=self.ends, out_dtype=torch.bfloat16)

    def ours(self, kind: str, out: Tensor, config: WeightGradSm90Config | None) -> Call:
        """The public function, or the kernel of a config."""
        given, accumulate = self.operands, KINDS[kind][1]
        if config is None:
            return partial(grouped_weight_grad, **given._asdict(), out=out, accumulate=accumulate)
        problem = given.problem(out.dtype, accumulate)
        choice = weight_grad_launch(given, problem, config)
        addresses = given.addresses(out)
        return partial(on_device, 0, partial(choice.launch, addresses))

    def expected(self) -> dict[int, Tensor]:
        """The float64 result of three experts."""
        found = {}
        for expert in {0, self.case.num_experts // 2, self.case.num_experts - 1}:
            end = int(self.ends[expert])
            part = slice(end - int(self.counts[expert]), end)
            rows, tokens = self.rows[part].double(), self.tokens[self.index[part].long()].double()
            found[expert] = rows.T @ tokens if self.up else tokens.T @ rows
        return found


def worst_error(out: Tensor, expected: Mapping[int, Tensor]) -> float:
    """The largest difference from what is expected over the largest value."""
    return max(
        float((out[expert].double() - want).abs().max() / want.abs().max())
        for expert, want in expected.items()
    )


def measure(case: Case, configs: bool, flush: Tensor) -> dict[str, Timing]:
    inputs = GradInputs(case)
    expected = inputs.expected()
    shape = (case.num_experts, *widths(case))
    calls: dict[str, Call] = {}
    for kind, (dtype, accumulate) in KINDS.items():
        problem = problem_of(case, kind)
        out = torch.empty(shape, dtype=dtype, device="cuda")
        every = [c for c in EVERY_CONFIG if why_illegal(problem, c) is None]
        for config in every if configs else [None]:
            call = inputs.ours(kind, out, config)
            out.fill_(0 if accumulate else torch.nan)
            call()
            name = kind if config is None else f"{kind} {config.words}"
            check(case, name, worst_error(out, expected), dtype)
            calls[name] = call
        out.zero_()
    gathered = inputs.gather()
    check(case, TORCH, worst_error(inputs.torch_product(gathered), expected), torch.bfloat16)
    del expected
    calls[TORCH] = partial(inputs.torch_product, gathered)
    calls[COPY] = lambda: inputs.torch_product(inputs.gather())
    return interleaved(calls, SECONDS * (4 if configs else 1), flush)


def check(case: Case, name: str, error: float, dtype: torch.dtype) -> None:
    if not error <= WORST_ERROR[dtype]:  # NaN too
        raise click.ClickException(f"{case.id}: {name} is wrong, relative error {error:.1e}")


@click.group()
def main() -> None:
    """Gradients of experts' weights, against torch's grouped product."""


case_options = [
    click.option("--model", default="", help=f"names of {', '.join(SHAPES)}; default: all"),
    click.option("--tokens", default="", help="numbers; default: those of each model"),
    click.option("--configs", is_flag=True, help="every config, instead of the one a call gets"),
]


def with_cases(command: Any) -> Any:
    for option in case_options:
        command = option(command)
    return command


@main.command()
@with_cases
def build(model: str, tokens: str, configs: bool) -> None:
    """Compile the images of a run with the same options. Needs the DSL, no GPU."""
    problems = [problem_of(case, kind) for case in select(model, tokens) for kind in KINDS]
    build_all(
        (problem, config)
        for problem in problems
        for config in (EVERY_CONFIG if configs else weight_grad_configs(problem))
        if why_illegal(problem, config) is None
    )


@main.command()
@with_cases
@click.option("--out", type=click.Path(path_type=Path), help="JSON file")
def run(model: str, tokens: str, configs: bool, out: Path | None) -> None:
    """Measure; prints a line of microseconds for each case and one for each system's ratio."""
    os.environ["CUTLASS_MOE_STRICT"] = "1"
    limits, flush = ceilings(), flush_buffer()
    click.echo(f"{torch.cuda.get_device_name()}, copy {limits.copy_gbs:.0f} GB/s")
    records, header = [], ("system", "us", "+-%", "TFLOP/s", f"{TORCH} /", f"{COPY} /")
    for case in select(model, tokens):
        timings = measure(case, configs, flush)
        left, right = widths(case)
        floor = 2 * 4 * case.num_experts * left * right / limits.copy_gbs / 1e3
        click.echo(
            f"\n{case.model} {case.part}, T {case.tokens}, E {case.num_experts}, [{left}, {right}],"
            f" {case.rows / case.num_experts:.0f} rows an expert; floor of adding {floor:.0f} us"
        )
        lines = [
            [
                name,
                f"{one.us:.0f}",
                f"{100 * (max(one.rounds) - min(one.rounds)) / one.us:.1f}",
                f"{case.flops / one.us / 1e6:.0f}",
                *(f"{timings[peer].us / one.us:.2f}" for peer in (TORCH, COPY)),
            ]
            for name, one in timings.items()
        ]
        click.echo(text_table(header, lines))
        us = {name: asdict(one) for name, one in timings.items()}
        records.append({"case": asdict(case), "floor_us": floor, "systems": us})
    if not configs:
        for peer in (TORCH, COPY):
            ratios = [r["systems"][peer]["us"] / r["systems"][OURS]["us"] for r in records]
            click.echo(
                f"{peer} / {OURS}: {geometric_mean(ratios):.3f} (mean), {min(ratios):.2f} (worst)"
            )
    if out:
        about = {"versions": versions(), "ceilings": asdict(limits), "cases": records}
        out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
