"""From a problem to a kernel on a device: memory, then the cache, then a compile."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch

from cutlass_moe import heuristics
from cutlass_moe.cache import MissingImage, default_cache
from cutlass_moe.compiler import build_command, compile_image
from cutlass_moe.launch import Kernel
from emitters.config import Config
from emitters.image import Image, build_identity, image_key
from emitters.problem import GemmProblem

_kernels: dict[tuple[GemmProblem, Config, int], Kernel] = {}
_lock = threading.Lock()
forced: Config | None = None  # by `forced_config`


@cache
def device_arch(device: int) -> str:
    """A device's compilation target: "sm_90a" for capability 9.0, else "sm_" and its digits."""
    major, minor = torch.cuda.get_device_capability(device)
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


def find_image(problem: GemmProblem, config: Config, arch: str) -> Image:
    """The image from the cache, compiled on a miss.

    Raises MissingImage, naming the command that builds it, where CUTLASS_MOE_JIT=0 forbids
    compiling; CompileError where compiling fails.
    """
    key = image_key(problem, config, arch)
    cache = default_cache()
    if os.environ.get("CUTLASS_MOE_JIT", "1") != "0":
        identity = build_identity()
        if identity is not None:
            return cache.load_or_build(
                arch, key, lambda: compile_image(problem, config, arch), identity
            )
    image = cache.load(arch, key)
    if image is None:
        roots = os.pathsep.join(str(root) for root in cache.roots)
        raise MissingImage(
            f"no image for {problem} with {config} in {roots}, and it can't be compiled here "
            f"(CUTLASS_MOE_JIT=0, or nvidia-cutlass-dsl is not installed); build it with:\n"
            f"{build_command(problem, config, arch)}"
        )
    return image


def load(problem: GemmProblem, config: Config, device: int) -> Kernel:
    """The kernel on CUDA device `device`, loaded at the first call.

    Raises RuntimeError while a CUDA graph is captured, where loading is not possible, and what
    `find_image` raises.
    """
    kernel = _kernels.get((problem, config, device))
    if kernel is None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a CUDA graph is being captured and the kernel for {problem} with {config} is not "
                "loaded: call cutlass_moe.warmup with this problem, or run the op once, before"
            )
        image = find_image(problem, config, device_arch(device))
        with _lock:
            kernel = _kernels.get((problem, config, device))
            if kernel is None:
                kernel = _kernels[problem, config, device] = Kernel(image, device)
    return kernel


def warmup(
    problems: GemmProblem | Iterable[GemmProblem], device: int | torch.device | None = None
) -> None:
    """Loads every kernel that calls of these problems may choose, so that none waits later.

    What the cache lacks is compiled first, several at a time. `cutlass_moe.grouped_matmul_problem`
    and `cutlass_moe.shapes.problems` say which problem a call or a model poses. device: default the
    current one. Raises what `load` raises.
    """
    problems = [problems] if isinstance(problems, GemmProblem) else list(problems)
    index = torch.cuda._utils._get_device_index(device, optional=True)
    arch = device_arch(index)
    wanted = [(p, c) for p in problems for c in heuristics.candidates(p)]
    with ThreadPoolExecutor() as pool:  # of several processes, one compiles an image
        list(pool.map(lambda pair: find_image(pair[0], pair[1], arch), wanted))
    for problem, config in wanted:
        load(problem, config, index)


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
    expected_rows: int | None = None,
    num_sms: int | None = None,
) -> tuple[Kernel, int]:
    """The kernel of a call and the CTAs to launch. Raises what `load` raises."""
    experts = problem.num_experts
    per_expert = expected_rows or num_rows / experts
    config = forced or heuristics.choose(problem, num_tokens, per_expert)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    clusters = max(1, min(num_sms or sms, sms) * config.ctas_per_sm // config.cluster)
    most_tiles = (num_rows // config.tile_m + min(experts, num_rows)) * config.n_tiles(problem)
    return load(problem, config, device), min(clusters, most_tiles) * config.cluster
