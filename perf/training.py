"""`python -m perf.training`: a layer's experts forward and backward, and the memory they keep.

Systems, all from hidden states, router weights and expert ids, in bfloat16:

  cutlass_moe            `fused_moe`
  cutlass_moe recompute  the same, which keeps no up projection
  cutlass_moe main_grad  the same, whose weights' gradients are added to float32 ones
  torch                  `torch._grouped_mm` under autograd, as transformers' "grouped_mm" experts
  padded                 `cutlass_moe.nn` without kernels: padded batched products

Before it is timed, each system's output and gradients are compared with float64, at no more than
CHECKED tokens. Forward, and forward with backward, are timed by CUDA events with L2 flushed before
each, in turns in random order, in five rounds; medians are shown, and the backward is the
difference. TFLOP/s count products alone: 6 and 12 times rows x H x I.

Memory is in GiB: `kept` from forward to backward besides input, weights and output; `peak` while
the backward runs, above what is there before the forward, gradients included.
"""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional

import cutlass_moe
from cutlass_moe import nn
from cutlass_moe.choose.heuristics_sm90 import choose, every_config
from cutlass_moe.layer.steps import (
    Forms,
    LayerSizes,
    Projection,
    layer_problems,
    training_problems,
)
from cutlass_moe.tune.timing import flush_buffer
from emitters.spec.dtypes import DType
from emitters.spec.gemm import GemmProblem
from emitters.spec.registry import Problem
from emitters.spec.weight_grad import WeightGradProblem
from perf.images import Image, build_all
from perf.machine import checkout
from perf.systems import OURS
from perf.timing import interleaved
from perf.training_report import Report, full_table

SECONDS = 1.0  # of each measurement, all systems together
CHECKED = 2048  # tokens
GIB = 2.0**30
NAMES = ("hidden", "w13", "w2", "topk_weights")  # of what has gradients


@dataclass(frozen=True)
class TrainedCase:
    """A SwiGLU layer. published: of SonicMoE on an H100, TFLOP/s forward and backward. zipf: a
    token chooses the i-th most popular expert 1/i as likely as the first, instead of any alike."""

    name: str
    num_experts: int
    top_k: int
    hidden: int
    inter: int
    tokens: int
    published: tuple[int, int] | None = None
    zipf: bool = False

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    def tflops(self, us: float, products: int) -> float:
        """The rate of so many products of rows x H x I in a time; `up` counts as two."""
        return 2 * products * self.rows * self.hidden * self.inter / us / 1e6


CASES = (
    TrainedCase("qwen3-30b", 128, 8, 2048, 768, 16384),
    TrainedCase("qwen3-30b", 128, 8, 2048, 768, 4096),
    TrainedCase("qwen3-30b", 128, 8, 2048, 768, 32768),
    TrainedCase("qwen3-30b zipf", 128, 8, 2048, 768, 16384, zipf=True),
    TrainedCase("mixtral", 8, 2, 4096, 14336, 16384),
    TrainedCase("mixtral zipf", 8, 2, 4096, 14336, 16384, zipf=True),
    TrainedCase("sonic d1536 n256", 128, 8, 1536, 256, 24576, (366, 407)),
    TrainedCase("sonic d4096 n1024 E64", 64, 4, 4096, 1024, 32768, (553, 556)),
    TrainedCase("sonic d4096 n1024 E128", 128, 8, 4096, 1024, 32768, (560, 568)),
    TrainedCase("sonic d4096 n512 E128", 128, 8, 4096, 512, 32768, (503, 512)),
    TrainedCase("sonic d4096 n256 E256", 256, 16, 4096, 256, 32768, (428, 460)),
    TrainedCase("sonic d4096 n2048 E64", 64, 4, 4096, 2048, 32768, (597, 587)),
)


class TrainedLayer:
    """A case's tensors on the GPU, and the systems that compute it.

    Each system maps hidden, w13, w2, topk_weights and topk_ids to the output.
    """

    def __init__(self, case: TrainedCase, tokens: int, device: str = "cuda") -> None:
        self.case, self.experts = case, case.num_experts
        generator = torch.Generator(device).manual_seed(tokens)

        def random(*shape: int, size: float = 1.0) -> Tensor:
            values = torch.empty(shape, dtype=torch.bfloat16, device=device)
            return values.normal_(std=size, generator=generator)

        hidden, inter = case.hidden, case.inter
        self.tensors = {
            "hidden": random(tokens, hidden),
            "w13": random(self.experts, 2 * inter, hidden, size=hidden**-0.5),
            "w2": random(self.experts, hidden, inter, size=inter**-0.5),
        }
        # the largest of logits that are drawn so are what draws without replacement would give
        drawn = torch.empty(tokens, self.experts, device=device)
        logits = -drawn.exponential_(generator=generator).log()
        if case.zipf:
            logits -= torch.arange(1, self.experts + 1, device=device).log()
        top = logits.topk(case.top_k)
        self.tensors["topk_weights"] = top.values.softmax(-1)
        self.tensors = {name: t.requires_grad_() for name, t in self.tensors.items()}
        self.ids = top.indices.int()
        self.grad = random(tokens, hidden)
        self.main: tuple[Tensor, Tensor] | None = None

    def systems(self, only: Sequence[str] = ()) -> dict[str, Callable[..., Tensor]]:
        every = {
            OURS: cutlass_moe.fused_moe,
            f"{OURS} recompute": lambda *given: cutlass_moe.fused_moe(*given, recompute=True),
            f"{OURS} main_grad": self.with_main_gradients,
            "torch": self.torch_grouped,
            "padded": self.padded,
        }
        return {name: system for name, system in every.items() if not only or name in only}

    def with_main_gradients(self, *given: Tensor) -> Tensor:
        if self.main is None:
            w13, w2 = (
                torch.zeros_like(self.tensors[name], dtype=torch.float32) for name in ("w13", "w2")
            )
            self.main = (w13, w2)
        return cutlass_moe.fused_moe(*given, grad_into=self.main)

    def torch_grouped(
        self, hidden: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, ids: Tensor
    ) -> Tensor:
        """As transformers does it; it casts router weights to the model's dtype."""
        top_k = ids.shape[1]
        experts, order = torch.sort(ids.flatten())
        bins = torch.arange(self.experts, dtype=torch.int32, device=ids.device)
        ends = torch.searchsorted(experts, bins, right=True, out_int32=True)
        up = torch._grouped_mm(hidden[order // top_k], w13.mT, offs=ends)
        gate, up = up.chunk(2, -1)
        rows = torch._grouped_mm(functional.silu(gate) * up, w2.mT, offs=ends)
        rows = rows * topk_weights.to(rows.dtype).flatten()[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return rows[back].view(len(hidden), top_k, -1).sum(1)

    def padded(
        self, hidden: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, ids: Tensor
    ) -> Tensor:
        case = self.case
        module = nn.GatedMoeFeedForward(
            case.hidden, case.inter, case.num_experts, top_k=case.top_k, device="meta"
        )
        del module.w1, module.w2
        module.w1, module.w2 = w13.mT, w2.mT
        return module._padded(hidden, topk_weights, ids, None)

    def forward(self, system: Callable[..., Tensor]) -> Tensor:
        return system(*self.tensors.values(), self.ids)

    def backward(self, out: Tensor) -> tuple[Tensor | None, ...]:
        leaves = list(self.tensors.values())
        return torch.autograd.grad(out, leaves, self.grad, allow_unused=True)

    def both(self, system: Callable[..., Tensor]) -> None:
        self.backward(self.forward(system))

    def errors(self, only: Sequence[str]) -> dict[str, dict[str, float]]:
        """Each system's relative errors to float64, of output and gradients."""
        wide = {name: t.detach().double().requires_grad_() for name, t in self.tensors.items()}
        want = cutlass_moe.fused_moe_reference(
            **wide, topk_ids=self.ids, compute_dtype=torch.float64
        )
        wanted = (want, *torch.autograd.grad(want, list(wide.values()), self.grad.double()))
        del wide, want
        found: dict[str, dict[str, float]] = {}
        for name, system in self.systems(only).items():
            out = self.forward(system)
            gradients = list(self.backward(out))
            if self.main is not None:
                gradients[1:3] = self.main
                self.main = None
            found[name] = {
                tensor: float(f"{((got - right).norm() / right.norm()).item():.2e}")
                for tensor, got, right in zip(
                    ("out", *NAMES), (out, *gradients), wanted, strict=True
                )
            }
        return found

    def memory(self, system: Callable[..., Tensor]) -> dict[str, float]:
        """GiB kept from forward to backward, and the peaks of both."""
        self.both(system)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = self.forward(system)
        kept = torch.cuda.memory_allocated() - before - out.nbytes
        forward = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        gradients = self.backward(out)
        backward = torch.cuda.max_memory_allocated() - before
        del out, gradients
        sizes = {"kept": kept, "peak_forward": forward, "peak_backward": backward}
        return {name: round(size / GIB, 3) for name, size in sizes.items()}


def measure(case: TrainedCase, only: Sequence[str]) -> dict[str, Any]:
    """Errors, times and memory of each system."""
    errors = TrainedLayer(case, min(case.tokens, CHECKED)).errors(only)
    torch.cuda.empty_cache()
    layer = TrainedLayer(case, case.tokens)
    systems = layer.systems(only)
    memory: dict[str, dict[str, float]] = {}
    absent: dict[str, str] = {}
    for name, system in systems.items():
        try:
            memory[name] = layer.memory(system)
        except torch.cuda.OutOfMemoryError:
            absent[name] = "out of memory"
        torch.cuda.empty_cache()
    calls: dict[str, Callable[[], object]] = {}
    for name in memory:
        system = systems[name]
        calls[name] = lambda system=system: layer.forward(system)
        calls[f"{name}, both"] = lambda system=system: layer.both(system)
    timings = interleaved(calls, SECONDS * 2, flush_buffer())
    found: dict[str, Any] = {}
    for name, size in memory.items():
        forward, both = timings[name].us, timings[f"{name}, both"].us
        found[name] = {
            "forward_us": forward,
            "backward_us": round(both - forward, 2),
            "both_us": both,
            "forward_tflops": round(case.tflops(forward, 3), 1),
            "backward_tflops": round(case.tflops(both - forward, 6), 1),
            **size,
            "errors": errors[name],
        }
    return {"case": asdict(case), "systems": found, "absent": absent}


def images_of(case: TrainedCase) -> list[Image]:
    """The kernels that this library launches for a case, as it is checked and as it is timed."""
    sizes = LayerSizes(case.num_experts, case.top_k, case.hidden, case.inter)
    forms = Forms(weights=DType.FP32)
    plain = Projection()
    layer = layer_problems(sizes, DType.BF16, DType.BF16, "swiglu", plain, plain, forms=forms)
    problems: list[Problem] = [*training_problems(layer).values(), layer.up]
    problems += [
        replace(problem, out=DType.FP32, accumulate=True)
        for problem in problems
        if isinstance(problem, WeightGradProblem)
    ]
    found = []
    for problem in problems:
        if not isinstance(problem, GemmProblem):
            found += [(problem, config) for config in every_config(problem)]
            continue
        for tokens in (min(case.tokens, CHECKED), case.tokens):
            pairs = tokens * case.top_k
            x_rows = tokens if problem.gather else pairs
            found.append((problem, choose(problem, x_rows, -(-pairs // case.num_experts))))
    return found


def selected(case: str, tokens: int | None) -> list[TrainedCase]:
    return [one for one in CASES if one.name.startswith(case) and tokens in (None, one.tokens)]


@click.group()
def main() -> None:
    """A layer's experts forward and backward, and the memory they keep."""


case_options = [
    click.option("--case", default="", help="those whose names start with this"),
    click.option("--tokens", type=int, help="those of so many tokens"),
]


def with_cases(command: Any) -> Any:
    for option in case_options:
        command = option(command)
    return command


@main.command()
@with_cases
def build(case: str, tokens: int | None) -> None:
    """Compile the images of a run with the same options. Needs the DSL, no GPU."""
    build_all(image for one in selected(case, tokens) for image in images_of(one))


@main.command()
@with_cases
@click.option("--system", multiple=True, help="these systems; default: all")
@click.option("--budget", default=290.0, help="seconds after which no further case is begun")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file")
@click.option("--commit", default="", help="name it where this is no git checkout")
def run(
    case: str,
    tokens: int | None,
    system: tuple[str, ...],
    budget: float,
    out: Path | None,
    commit: str,
) -> None:
    """Measure; prints a Markdown table. `python -m perf report` shows what is in perf/results.

    Cases that the JSON file has already are replaced one by one; the others stay in it.
    """
    os.environ["CUTLASS_MOE_STRICT"] = "1"  # a fallback must not pass for a kernel
    began = time.monotonic()
    report: Report = {"gpu": torch.cuda.get_device_name(), "cases": []}
    if out is not None and out.exists():
        report = json.loads(out.read_text())
    source = {
        "date": datetime.date.today().isoformat(),
        "commit": commit or checkout(),
        "torch": torch.__version__,
    }
    found = []
    for one in selected(case, tokens):
        if time.monotonic() - began > budget:
            break
        found.append({"run": source, **measure(one, system)})
        torch.cuda.empty_cache()
        if out is not None:
            report = with_case(report, found[-1])
            out.write_text(json.dumps(report, indent=1))
    click.echo(full_table({**report, "cases": found}))


def with_case(report: Report, measured: Report) -> Report:
    """The report with this case in place of its earlier measurement, or at its end."""
    cases = {(one["case"]["name"], one["case"]["tokens"]): one for one in report["cases"]}
    cases[measured["case"]["name"], measured["case"]["tokens"]] = measured
    return {**report, "cases": list(cases.values())}


@main.command()
@with_cases
@click.option("--system", default=OURS, show_default=True)
def profile(case: str, tokens: int | None, system: str) -> None:
    """Print the kernels of one forward and backward of each case, with their microseconds."""
    for one in selected(case, tokens):
        layer = TrainedLayer(one, one.tokens)
        call = layer.systems()[system]
        layer.both(call)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            layer.both(call)
            torch.cuda.synchronize()
        click.echo(f"{one.name}, {one.tokens} tokens, {system}")
        events = sorted(seen.events(), key=lambda event: event.time_range.start)
        for event in events:
            click.echo(f"{event.time_range.elapsed_us():10.1f}  {event.name[:100]}")


if __name__ == "__main__":
    main()
