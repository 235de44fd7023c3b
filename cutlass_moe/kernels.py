"""From a problem to a kernel on a device: memory, then the cache, then a compile."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch

from cutlass_moe import heuristics
from cutlass_moe.arguments import Options
from cutlass_moe.cache import Cache, MissingImage, default_cache
from cutlass_moe.compiler import build_command, compile_image
from cutlass_moe.launch import GemmKernel, Kernel
from cutlass_moe.layer_problems import model_problems
from cutlass_moe.models import find_shape
from cutlass_moe.roots import Entry
from emitters.config import Config
from emitters.image import Image, build_identity, image_key
from emitters.problem import GemmProblem
from emitters.steps import AnyConfig, Problem, Step

_kernels: dict[tuple[Problem, AnyConfig, int], Kernel] = {}
_lock = threading.Lock()
forced: Config | None = None  # by `forced_config`


@cache
def device_arch(device: int) -> str:
    """A device's compilation target: "sm_90a" for capability 9.0, else "sm_" and its digits."""
    major, minor = torch.cuda.get_device_capability(device)
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


@cache
def device_name(device: int) -> str:
    """A device's name as tuning tables know it, "NVIDIA H200"."""
    return torch.cuda.get_device_name(device)


def find_image(problem: Problem, config: AnyConfig, arch: str) -> Image:
    """The image from the cache, compiled on a miss.

    Raises MissingImage, naming the command that builds it, where CUTLASS_MOE_JIT=0 forbids
    compiling; CompileError where compiling fails.
    """
    key = image_key(problem, config, arch)
    cache = default_cache()
    forbidden = os.environ.get("CUTLASS_MOE_JIT", "1") == "0"
    identity = None if forbidden else build_identity()
    if identity is not None:
        return cache.load_or_build(
            arch, key, lambda: compile_image(problem, config, arch), identity
        )
    image = cache.load(arch, key)
    if image is None:
        why = "CUTLASS_MOE_JIT=0" if forbidden else "nvidia-cutlass-dsl is not installed"
        absent = {root for root in cache.roots if not os.path.exists(root)}
        roots = ", ".join(f"{r}{' (does not exist)' * (r in absent)}" for r in cache.roots)
        raise MissingImage(
            f"no image for {problem} with {config} on {arch} in {roots}, and it may not be "
            f"compiled here: {why}.\n{_nearest(cache, problem, config, arch)}\n"
            f"Build it with:\n{build_command(problem, config, arch)}"
        )
    return image


def _nearest(cache: Cache, problem: Problem, config: AnyConfig, arch: str) -> str:
    """Which image comes closest: the fewest other fields of the problem, then of the config."""
    asked = {"arch": arch, **problem.to_json()}, config.to_json()

    def differences(entry: Entry) -> list[list[str]]:
        there = {"arch": entry.arch, **entry.record.problem}, entry.record.config
        return [
            [
                f"{name} {json.dumps(has.get(name))}, not {json.dumps(value)}"
                for name, value in want.items()
                if has.get(name) != value
            ]
            for want, has in zip(asked, there, strict=True)
        ]

    def distance(entry: Entry) -> tuple[int, ...]:
        return tuple(map(len, differences(entry)))

    alike = (e for e in cache.entries() if e.record.problem.get("op") == problem.op)
    nearest = min(alike, key=distance, default=None)
    if nearest is None:
        return f"There are no images of {problem.op} at all."
    words = "; ".join(itertools.chain(*differences(nearest)))
    return f"The nearest of the images there, {nearest.key[:12]}, is for {words}."


def load(problem: Problem, config: AnyConfig, device: int, image: Image | None = None) -> Kernel:
    """The kernel on CUDA device `device`, loaded at the first call.

    image: what `find_image` gives, where that is known. Raises RuntimeError while a CUDA graph is
    captured, where loading is not possible, DriverError where the driver is too old for the image,
    and what `find_image` raises.
    """
    kernel = _kernels.get((problem, config, device))
    if kernel is None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a CUDA graph is being captured and the kernel for {problem} with {config} is not "
                "loaded: call cutlass_moe.warmup with this problem, or run the op once, before"
            )
        image = image or find_image(problem, config, device_arch(device))
        with _lock:
            kernel = _kernels.get((problem, config, device))
            if kernel is None:
                kind = GemmKernel if isinstance(problem, GemmProblem) else Kernel
                kernel = _kernels[problem, config, device] = kind(image, device)
    return kernel


def warmup(
    model_or_problems: str | Problem | Iterable[Problem],
    device: int | torch.device | None = None,
    dtype: str = "fp8",
) -> None:
    """Loads every kernel that calls of these problems may choose, so that none waits later.

    What the cache lacks is compiled first, several at a time. A model is a name that
    `cutlass_moe.shapes.MODELS` has, a Hugging Face config.json or the directory of one, and dtype
    ("fp8", "int8" or "bf16") that of its operands; its problems are those of
    `cutlass_moe.layer_problems.model_problems`: of `fused_moe` and the router too.
    `cutlass_moe.grouped_matmul_problem` says which problem a call poses. device: default the
    current one. Raises ValueError for another name, file or dtype, and what `load` raises.
    """
    asked = _problems(model_or_problems, dtype)
    index = torch.cuda._utils._get_device_index(device, optional=True)
    arch = device_arch(index)
    wanted = [
        (problem, config)
        for problem in asked
        for config in heuristics.every_config(problem)
        if (problem, config, index) not in _kernels
    ]
    default_cache()  # once, not in every thread
    with ThreadPoolExecutor() as pool:  # of several processes, one compiles an image
        images = list(pool.map(lambda pair: find_image(pair[0], pair[1], arch), wanted))
    for (problem, config), image in zip(wanted, images, strict=True):
        load(problem, config, index, image)


def _problems(model_or_problems: str | Problem | Iterable[Problem], dtype: str) -> list[Problem]:
    if isinstance(model_or_problems, GemmProblem | Step):
        return [model_or_problems]
    if not isinstance(model_or_problems, str):
        return list(model_or_problems)
    return list(model_problems(find_shape(model_or_problems), dtype).values())


@contextmanager
def forced_config(config: Config) -> Iterator[None]:
    """Within it, all threads' calls use this config: for tuning and tests."""
    global forced
    before, forced = forced, config
    try:
        yield
    finally:
        forced = before


def plan(
    problem: GemmProblem,
    device: int,
    num_tokens: int,
    num_rows: int,
    options: Options,
) -> tuple[GemmKernel, int]:
    """The kernel of a call and the CTAs to launch. Raises what `load` raises."""
    experts = problem.num_experts
    per_expert = options.expected_rows or num_rows / experts
    config = forced or heuristics.choose(
        problem, num_tokens, per_expert, options.schedule, device_name(device)
    )
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    ctas = min(options.num_sms or sms, sms) * config.ctas_per_sm
    most_tiles = (num_rows // config.tile_m + min(experts, num_rows)) * config.n_tiles(problem)
    clusters = max(1, min(ctas // config.cluster, most_tiles // config.cluster_m))
    kernel = load(problem, config, device)
    assert isinstance(kernel, GemmKernel)
    return kernel, clusters * config.cluster
