"""`python -m perf.warmup`: what `cutlass_moe.warmup` of a model takes, and what calls then pay.

Every round is a process of its own, as a server's start is. Its CUDA context exists before the
clock starts. The images come from the cache: name an archive or a directory in
CUTLASS_MOE_CACHE_DIR, and set CUTLASS_MOE_JIT=0 so that nothing is compiled.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

import click
import torch

import cutlass_moe
from cutlass_moe.choose.heuristics_sm90 import candidates
from cutlass_moe.models.problems import gemm_problems
from cutlass_moe.models.shapes import DTYPES, MODELS
from cutlass_moe.operands import NAMED_DTYPES
from cutlass_moe.ops import dispatch
from cutlass_moe.runtime import library
from emitters.spec.epilogue import Bias
from emitters.spec.gemm import GemmProblem

TOKENS = 16


@click.command()
@click.option("--model", type=click.Choice(list(MODELS)), default="qwen3-30b", show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="fp8", show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--child", is_flag=True, hidden=True)
def main(model: str, dtype: str, rounds: int, child: bool) -> None:
    """Print milliseconds of warmup and microseconds of each kernel's first calls, as JSON."""
    if child:
        click.echo(json.dumps(one_round(model, dtype)))
        return
    again = [sys.executable, "-m", "perf.warmup", "--child", "--model", model, "--dtype", dtype]
    outputs = [
        subprocess.run(again, check=True, stdout=subprocess.PIPE).stdout for _ in range(rounds)
    ]
    found = [json.loads(output) for output in outputs]
    times = [one["warmup_ms"] for one in found]
    names = found[0]["calls_us"]
    summary = {
        "model": model,
        "dtype": dtype,
        "kernels": found[0]["kernels"],
        "warmup_ms": {"first": times[0], "median": statistics.median(times), "worst": max(times)},
        "again_ms": statistics.median(one["again_ms"] for one in found),
        "calls_us": {name: medians(one["calls_us"][name] for one in found) for name in names},
    }
    click.echo(json.dumps(summary, indent=1))


def medians(rounds: Iterable[list[float]]) -> list[float]:
    """Of the first, the second and the third call."""
    return [round(statistics.median(nth), 1) for nth in zip(*rounds, strict=True)]


def one_round(model: str, dtype: str) -> dict[str, Any]:
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    times = []
    for _ in range(2):
        start = time.perf_counter()
        cutlass_moe.warmup(model, dtype=dtype)
        times.append(round((time.perf_counter() - start) * 1e3, 2))
    calls: dict[str, list[float]] = {}
    for name in ("up", "down"):
        problem = gemm_problems(MODELS[model], dtype)[name]
        inputs = zeros(problem, NAMED_DTYPES[dtype])
        for config in candidates(problem):
            what = f"{name} {config.words}"
            calls[what] = []
            with dispatch.forced_config(config):
                for _ in range(3):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    cutlass_moe.grouped_matmul(**inputs)
                    torch.cuda.synchronize()
                    calls[what].append((time.perf_counter() - start) * 1e6)
    return {
        "warmup_ms": times[0],
        "again_ms": times[1],
        "kernels": len(library._kernels),
        "calls_us": calls,
    }


def zeros(problem: GemmProblem, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a call: TOKENS rows of x, each expert with one row until they are used up."""
    experts, n, k = problem.num_experts, problem.n, problem.k
    inputs = {
        "x": torch.zeros((TOKENS, k), device="cuda").to(dtype),
        "weight": torch.zeros((experts, n, k), dtype=torch.bfloat16, device="cuda").to(dtype),
        "offsets": torch.arange(1, experts + 1, device="cuda").clamp(max=TOKENS).int(),
        "out_dtype": torch.bfloat16,
    }
    if problem.gather:
        inputs["index"] = torch.arange(TOKENS, device="cuda").int()
    if any(isinstance(node, Bias) for node in problem.epilogue):
        inputs["bias"] = torch.zeros((experts, n), dtype=torch.bfloat16, device="cuda")
    if problem.x.quantized:
        inputs["per_token_scale"] = torch.ones(TOKENS, device="cuda")
        inputs["scale"] = torch.ones((experts, n), device="cuda")
    return inputs


if __name__ == "__main__":
    main()
