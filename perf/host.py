"""Host time of a warm eager call, taken apart, and what the first call of a kernel costs.

The parts are the layers of the library, timed from outside. The driver's launch is what a
call takes less without it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from cuda.bindings import driver

import cutlass_moe
from cutlass_moe.choose import heuristics_sm90 as heuristics
from cutlass_moe.images.cache import Cache, default_cache
from cutlass_moe.images.compiler import compile_image
from cutlass_moe.operands import Operands, Options
from cutlass_moe.ops import _checks, dispatch
from cutlass_moe.runtime.kernel import Kernel
from perf.cases import select
from perf.images import problem_of
from perf.operands import ProductInputs, weights_of

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
    """Microseconds of a warm call of both forms, of its parts, and of what eager calls skip."""
    case = select(suites=["seed"], dtypes=["fp8"])[0]
    inputs = ProductInputs(case, weights_of(case))
    given: dict[str, Any] = {
        "index": inputs.token_of.int(),
        "offsets": inputs.ends,
        "per_token_scale": inputs.x_scale,
        "scale": inputs.weight.scale,
    }
    optional: dict[str, Any] = {name: given.get(name) for name in Operands._fields[2:]}
    tensors = Operands(inputs.x, inputs.weight.w, **optional)
    shape, device = (case.rows, inputs.n), inputs.x.device
    out = torch.empty(shape, dtype=torch.bfloat16, device=device)
    into = partial(cutlass_moe.grouped_matmul_out, out, *tensors[:2], **given)
    options = Options()
    choice = dispatch.choose_launch(
        problem_of(case), device.index, len(inputs.x), case.rows, tensors.weight.stride(), options
    )
    enqueue = partial(dispatch.enqueue, choice, out, tensors)
    whole = host_time(partial(cutlass_moe.grouped_matmul, *tensors[:2], **given))
    enqueued = host_time(enqueue)
    plan = cutlass_moe.plan(*tensors[:2], **given, out=out)
    return {
        "grouped_matmul": whole.us,
        "least": whole.least,
        "grouped_matmul_out": host_time(into).us,
        "plan()": host_time(plan).us,
        "plan(x, out)": host_time(partial(plan, inputs.x, out)).us,
        "signature": host_time(partial(dispatch.find_call, tensors, out, options)).us,
        "allocation": host_time(partial(torch.empty, shape, dtype=out.dtype, device=device)).us,
        "parameters": unlaunched_time(enqueue).us,
        "driver": round(enqueued.us - unlaunched_time(enqueue).us, 2),
        "dispatcher (skipped)": host_time(partial(noop(), out, *tensors, *options)).us,
        "checks (skipped)": host_time(partial(_checks.check, tensors, options)).us,
        "a torch op (out.add_)": host_time(partial(out.add_, 1)).us,
    }


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


def jit_seconds() -> dict[str, float]:
    """Seconds a cache miss takes: a worker's start, the compile, the write to an empty cache.

    Raises CompilerNotInstalled without the DSL. Needs no GPU.
    """
    times = []
    for problem in dict.fromkeys(map(problem_of, select(suites=["seed"]))):
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
