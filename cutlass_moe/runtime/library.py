"""The way from a problem to a kernel on a device: memory, then the cache, then a compile."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from functools import cache

import torch

from cutlass_moe.environment import JIT
from cutlass_moe.images.cache import Cache, MissingImage, default_cache
from cutlass_moe.images.compiler import build_command, compile_image
from cutlass_moe.images.roots import Entry
from cutlass_moe.images.toolchains import default_build
from cutlass_moe.runtime.kernel import Kernel
from cutlass_moe.runtime.log import logger
from emitters.spec.arch import arch_of
from emitters.spec.image import Image, image_key
from emitters.spec.registry import Config, Problem

_kernels: dict[tuple[Problem, Config, int], Kernel] = {}
_lock = threading.Lock()


@cache
def device_arch(device: int) -> str:
    """A device's compilation target, as `arch_of` gives it: "sm_90a" for capability 9.0."""
    return arch_of(torch.cuda.get_device_capability(device))


@cache
def device_name(device: int) -> str:
    """A device's name, as in tuning tables: "NVIDIA H200"."""
    return torch.cuda.get_device_name(device)


def find_image(problem: Problem, config: Config, arch: str) -> Image:
    """Finds an image in the cache, or compiles it.

    Raises MissingImage, which names the command that builds the image, if CUTLASS_MOE_JIT=0 forbids
    to compile or no compiler is installed; CompileError if compiling fails.
    """
    image = cached_or_compiled(problem, config, arch)
    if image is None:
        why = "nvidia-cutlass-dsl is not installed" if JIT.on() else "CUTLASS_MOE_JIT=0"
        cache = default_cache()
        absent = {root for root in cache.roots if not os.path.exists(root)}
        roots = ", ".join(f"{r}{' (does not exist)' * (r in absent)}" for r in cache.roots)
        raise MissingImage(
            f"no image for {problem} with {config} on {arch} in {roots}, and it may not be "
            f"compiled here: {why}.\n{_nearest(cache, problem, config, arch)}\n"
            f"Build it with:\n{build_command(problem, config, arch)}"
        )
    return image


def cached_or_compiled(problem: Problem, config: Config, arch: str) -> Image | None:
    """An image as `find_image` finds it; None where that would read the whole cache to say why."""
    key = image_key(problem, config, arch)
    identity = default_build() if JIT.on() else None
    if identity is None:
        return default_cache().load(arch, key)
    return default_cache().load_or_build(
        arch, key, lambda: _compile(problem, config, arch), identity
    )


def _compile(problem: Problem, config: Config, arch: str) -> Image:
    start = time.perf_counter()
    image = compile_image(problem, config, arch)
    seconds = time.perf_counter() - start
    logger.info("image %.12s compiled in %.2f s", image_key(problem, config, arch), seconds)
    return image


def _nearest(cache: Cache, problem: Problem, config: Config, arch: str) -> str:
    """Names the cached image with the fewest differences in its problem, then in its config."""
    asked = {"arch": arch, **problem.to_json()}, config.to_json()

    def differences(entry: Entry) -> list[list[str]]:
        cached = {"arch": entry.arch, **entry.record.problem}, entry.record.config
        return [
            [
                f"{name} {json.dumps(has.get(name))}, not {json.dumps(value)}"
                for name, value in want.items()
                if has.get(name) != value
            ]
            for want, has in zip(asked, cached, strict=True)
        ]

    def distance(entry: Entry) -> tuple[int, ...]:
        return tuple(map(len, differences(entry)))

    alike = (e for e in cache.entries() if e.record.problem.get("op") == problem.op)
    nearest = min(alike, key=distance, default=None)
    if nearest is None:
        return f"There are no images of {problem.op} at all."
    words = "; ".join(itertools.chain(*differences(nearest)))
    return f"The nearest of the images there, {nearest.key[:12]}, is for {words}."


def is_loaded(problem: Problem, config: Config, device: int) -> bool:
    """Whether `load` has loaded this kernel."""
    return (problem, config, device) in _kernels


def load(problem: Problem, config: Config, device: int, image: Image | None = None) -> Kernel:
    """The kernel on a CUDA device; the first call loads it.

    image: the result of `find_image`, if it is known. Raises RuntimeError if the kernel is not
    loaded while a CUDA graph is captured, DriverError if the driver is too old for the image, and
    what `find_image` raises.
    """
    kernel = _kernels.get((problem, config, device))
    if kernel is None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a CUDA graph is being captured and the kernel for {problem} with {config} is not "
                "loaded: call cutlass_moe.warmup with this problem, or run the op once, before"
            )
        start = time.perf_counter()
        arch = device_arch(device)
        image = image or find_image(problem, config, arch)
        with _lock:
            kernel = _kernels.get((problem, config, device))
            if kernel is None:
                kernel = _kernels[problem, config, device] = Kernel(image, device)
                key, seconds = image_key(problem, config, arch), time.perf_counter() - start
                logger.info(
                    "%s, %s: image %.12s ready on device %d in %.3f s",
                    *(problem.words, config.words, key, device, seconds),
                )
    return kernel
