"""Host time of a warm eager call, taken apart, and what the first call of a kernel costs.

The parts are the library's public layers, timed from outside. The driver's launch is what a call
takes less without it, and the rest is what no part explains: addresses, stream, packing of
parameters.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from cuda.bindings import driver

import cutlass_moe
from cutlass_moe import heuristics, kernels
from cutlass_moe.cache import Cache, default_cache
from cutlass_moe.compiler import compile_image
from cutlass_moe.launch import Kernel
from cutlass_moe.ops import grouped_matmul_problem
from perf.cases import Case, seed_cases
from perf.operands import Operands, Weights

CALLS = 100  # in a row, of a kernel shorter than its call: the launch queue never fills
BATCHES = 50
LAUNCH = "cuLaunchKernelEx"
MAX_IMAGES = 64
NOOP = torch.library.Library("cutlass_moe_perf", "DEF")


@dataclass(frozen=True)
class HostTime:
    """Microseconds of a call on the host: median and least of the batches' means."""

    us: float
    least: float


def host_time(call: Callable[[], object]) -> HostTime:
    means = []
    for _ in range(BATCHES + 1):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        means.append((time.perf_counter() - start) / CALLS * 1e6)
        torch.cuda.synchronize()
    warm = means[1:]
    return HostTime(round(statistics.median(warm), 2), round(min(warm), 2))


def call_parts() -> dict[str, float]:
    """Microseconds of a warm `grouped_matmul_out` and of its parts."""
    case = next(case for case in seed_cases(["fp8"], ["balanced"]))
    operands = Operands.of(case, Weights.of(case))
    out = torch.empty(case.rows, case.n, dtype=torch.bfloat16, device="cuda")
    options = operands.options
    inputs = (operands.x, operands.weight)
    whole = partial(cutlass_moe.grouped_matmul_out, out, *inputs, **options)
    total = host_time(whole)
    call = (case.problem, torch.cuda.current_device(), case.x_rows, case.rows, None, None)
    parts = {
        "dispatch": host_time(partial(noop(), out, *inputs, *options.values(), *[None] * 5)).us,
        "checks": host_time(partial(grouped_matmul_problem, *inputs, **options)).us,
        "lookup": host_time(partial(kernels.plan, *call)).us,
        "driver launch": round(total.us - unlaunched_time(whole).us, 2),
    }
    rest = round(total.us - sum(parts.values()), 2)
    return {"call": total.us, "least": total.least, **parts, "rest": rest}


def noop() -> Callable[..., object]:
    """An op of the out-variant's schema that does nothing."""
    schema = str(torch.ops.cutlass_moe.grouped_matmul_out.default._schema)
    NOOP.define(schema.replace("cutlass_moe::grouped_matmul_out", "noop", 1))
    NOOP.impl("noop", lambda *_: None, "CUDA")
    return torch.ops.cutlass_moe_perf.noop.default


def unlaunched_time(call: Callable[[], object]) -> HostTime:
    """Host time of a call in which the driver's launch answers at once and launches nothing."""
    answer = (driver.CUresult.CUDA_SUCCESS,)
    with mock.patch.object(driver, LAUNCH, return_value=answer) as probe:
        call()
    if not probe.called:
        raise RuntimeError(f"expected the library to launch through {LAUNCH}")
    with mock.patch.object(driver, LAUNCH, lambda *_: answer):
        return host_time(call)


def load_ms() -> dict[str, float]:
    """Milliseconds from a file to a launchable kernel, of up to MAX_IMAGES images of the cache."""
    entries = list(default_cache().entries())[: MAX_IMAGES + 1]
    if len(entries) < 2:
        raise ValueError(f"expected two images or more in the cache, found {len(entries)}")
    times = []
    for entry in entries:
        fresh = Cache(default_cache().roots)
        start = time.perf_counter()
        image = fresh.load(entry.arch, entry.key)
        assert image is not None
        Kernel(image, torch.cuda.current_device())
        times.append((time.perf_counter() - start) * 1e3)
    warm = times[1:]  # the first one finds the driver asleep
    median, worst = statistics.median(warm), max(warm)
    return {"median": round(median, 2), "worst": round(worst, 2), "images": len(warm)}


def jit_seconds(cases: list[Case]) -> dict[str, float]:
    """Seconds a cache miss takes: a worker's start, the compile, the write to an empty cache.

    Raises CompilerNotInstalled without the DSL. Needs no GPU.
    """
    times = []
    for problem in dict.fromkeys(case.problem for case in cases):
        for config in heuristics.candidates(problem):
            with tempfile.TemporaryDirectory() as root:
                start = time.perf_counter()
                image = compile_image(problem, config)
                Cache([root]).store(image.record.arch, "0" * 64, image)
                times.append(time.perf_counter() - start)
    return {
        "median": round(statistics.median(times), 2),
        "worst": round(max(times), 2),
        "images": len(times),
    }
