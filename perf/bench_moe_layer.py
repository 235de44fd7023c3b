"""`python -m perf.bench_moe_layer`: one layer, as a user calls it, three ways.

padded_bmm: the module with use_grouped_gemm=False. torch: its grouped_mm between a gather and a
weighted sum. cutlass_moe: the module. All of them include the router, the choice of experts and the
shared experts, and allocate what they need in the call. Without a GPU nothing is timed, and errors
alone are printed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import torch
from torch.nn.functional import silu

import cutlass_moe
from cutlass_moe import nn
from cutlass_moe.models.shapes import MoeShape
from cutlass_moe.tune.timing import flush_buffer
from perf.peers.prepared import Absent
from perf.report import text_table
from perf.rows import number
from perf.systems import OURS
from perf.timing import interleaved

PADDED = "padded_bmm"
SAMPLE = 512  # tokens whose output is checked
SECONDS = 2.0  # of timing, all systems together
HEADER = ("system", "error", "us", "peak MB", f"us / {PADDED}", f"peak / {PADDED}")
Call = Callable[[], torch.Tensor]


class Bench:
    """A module, its input [T, D], and the ways to compute its output."""

    def __init__(
        self, shape: MoeShape, tokens: int, num_shared: int, dtype: str, gated: bool, device: str
    ) -> None:
        torch.manual_seed(0)
        kind = nn.GatedMoeFeedForward if gated else nn.MoeFeedForward
        self.shape, self.dtype, self.gated = shape, dtype, gated
        self.activation = "swiglu" if gated else "silu"
        self.module: Any = kind(
            shape.hidden, shape.inter, shape.num_experts, self.activation, shape.top_k,
            num_shared, device=device, dtype=torch.bfloat16,
        ).requires_grad_(False)  # fmt: skip
        if dtype != "bf16":
            nn.quantize_(self.module, dtype)
        self.x = torch.randn(tokens, shape.hidden, device=device, dtype=torch.bfloat16)

    def systems(self) -> dict[str, Callable[[], Call]]:
        """Functions that prepare a system, or raise Absent."""
        return {
            PADDED: lambda: partial(self.by_module, use_grouped_gemm=False),
            "torch": self.torch_grouped,
            OURS: lambda: partial(self.by_module, use_grouped_gemm=True),
        }

    def by_module(self, use_grouped_gemm: bool) -> torch.Tensor:
        self.module.use_grouped_gemm = use_grouped_gemm
        return self.module(self.x)

    def choice(self) -> tuple[torch.Tensor, torch.Tensor]:
        """topk_weights float32 [T, k] and topk_ids int32 [T, k]."""
        return cutlass_moe.topk_router(self.module.router(self.x), self.shape.top_k)

    def activate(self, up: torch.Tensor) -> torch.Tensor:
        if not self.gated:
            return silu(up)
        gate, up = up.chunk(2, -1)
        return silu(gate) * up

    def shared(self, x: torch.Tensor) -> torch.Tensor | None:
        """What the shared experts make of x [T, D], in its dtype."""
        if not self.module.num_shared_experts:
            return None
        w1, w2 = self.module.shared_w1.to(x.dtype), self.module.shared_w2.to(x.dtype)
        return torch.matmul(self.activate(torch.matmul(x, w1)), w2).sum(0)

    def weights(self) -> dict[str, Any]:
        """K-major, as `fused_moe` takes them."""
        m = self.module
        if self.dtype == "bf16":
            return {"w13": m.w1.mT.contiguous(), "w2": m.w2.mT.contiguous()}
        scales = {"w13_scale": m.w1_scale, "w2_scale": m.w2_scale}
        return {"w13": m.w1_quantized, "w2": m.w2_quantized, **scales}

    def torch_grouped(self) -> Call:
        if self.dtype != "bf16":
            raise Absent("measured with bf16 only")
        module, k = self.module, self.shape.top_k
        bins = torch.arange(self.shape.num_experts, device=self.x.device, dtype=torch.int32)

        def call() -> torch.Tensor:
            topk_weights, ids = self.choice()
            experts, order = torch.sort(ids.flatten(), stable=True)
            ends = torch.searchsorted(experts, bins, right=True, out_int32=True)
            up = torch._grouped_mm(self.x[order // k], module.w1, offs=ends)
            rows = torch._grouped_mm(self.activate(up), module.w2, offs=ends)
            pairs = torch.empty_like(rows).index_copy_(0, order, rows).unflatten(0, (-1, k))
            out = torch.bmm(topk_weights.to(pairs.dtype)[:, None], pairs)[:, 0]
            shared = self.shared(self.x)
            return out if shared is None else out + shared

        return call

    def expected(self, sample: torch.Tensor) -> torch.Tensor:
        """The sampled tokens' output in float64."""
        x, (topk_weights, topk_ids) = self.x[sample], (each[sample] for each in self.choice())
        return cutlass_moe.fused_moe_reference(
            x, topk_weights=topk_weights, topk_ids=topk_ids, **self.weights(),
            quant=None if self.dtype == "bf16" else self.dtype, activation=self.activation,
            residual=self.shared(x.double()), compute_dtype=torch.float64,
        )  # fmt: skip


def peak_bytes(call: Call) -> int:
    """Memory that a call needs besides what is there, its output included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@click.command()
@click.option("--batch-size", default=16, show_default=True)
@click.option("--seq-len", default=128, show_default=True)
@click.option("--embed-dim", default=512, show_default=True)
@click.option("--hidden-dim", default=2048, show_default=True, help="of one expert")
@click.option("--num-experts", default=80, show_default=True)
@click.option("--top-k", default=8, show_default=True)
@click.option("--num-shared", default=0, show_default=True, help="experts that every token visits")
@click.option("--dtype", type=click.Choice(["bf16", "fp8", "int8"]), default="bf16")
@click.option("--gated", is_flag=True, help="SwiGLU instead of SiLU")
def main(dtype: str, gated: bool, **size: int) -> None:
    """Print each system's error, its time and the memory that it needs above weights and input."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        os.environ["CUTLASS_MOE_STRICT"] = "1"  # the padded path must not pass for a kernel
    tokens = size["batch_size"] * size["seq_len"]
    if tokens < 1:
        raise click.UsageError(
            "batch size and length must be positive, "
            f"got {size['batch_size']} and {size['seq_len']}"
        )
    try:
        shape = MoeShape(
            "bench", size["num_experts"], size["top_k"], size["embed_dim"], size["hidden_dim"]
        )
        bench = Bench(shape, tokens, size["num_shared"], dtype, gated, device)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with torch.no_grad():
        lines, missing = measured(bench, device == "cuda")
    click.echo(
        f"{tokens} tokens, D {shape.hidden}, H {shape.inter}, {shape.num_experts} experts, "
        f"top-{shape.top_k}, {size['num_shared']} shared, {bench.activation}, {dtype}, {device}"
    )
    click.echo(text_table(HEADER, lines))
    for name, reason in missing.items():
        click.echo(f"{name}: {reason}")
    if device == "cpu":
        click.echo("no CUDA device: errors alone, of what a CPU can run")


def measured(bench: Bench, timed: bool) -> tuple[list[list[str]], dict[str, str]]:
    """Lines under HEADER, and why systems are missing."""
    sample = torch.randperm(len(bench.x), device=bench.x.device)[:SAMPLE].sort().values
    right = bench.expected(sample)
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    absent: dict[str, str] = {}
    for name, prepare in bench.systems().items():
        try:
            call = prepare()
            difference = call()[sample].double() - right
            errors[name] = float(difference.norm() / right.norm())
            calls[name] = call
        except Absent as reason:
            absent[name] = str(reason)
        except Exception as failure:  # shown, not fatal: others are still measured
            absent[name] = f"FAILED: {type(failure).__name__}: {failure}"
    us: dict[str, float] = {}
    peak: dict[str, float] = {}
    if timed:
        peak = {name: peak_bytes(call) / 2**20 for name, call in calls.items()}
        timings = interleaved(calls, SECONDS, flush_buffer())
        us = {name: timing.us for name, timing in timings.items()}
    lines = [
        [
            name,
            f"{errors[name]:.1e}",
            number(us.get(name)),
            number(peak.get(name)),
            over_padded(us, name),
            over_padded(peak, name),
        ]
        for name in calls
    ]
    return lines, absent


def over_padded(figures: dict[str, float], name: str) -> str:
    return f"{figures[name] / figures[PADDED]:.2f}" if {name, PADDED} <= set(figures) else "-"


if __name__ == "__main__":
    main()
