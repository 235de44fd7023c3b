"""Kernels loaded before the first call needs them."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.images.cache import default_cache
from cutlass_moe.models.files import find_shape
from cutlass_moe.models.problems import model_problems
from cutlass_moe.runtime import library
from emitters.spec.gemm import GemmProblem
from emitters.spec.layer_steps import Step
from emitters.spec.registry import Problem


def warmup(
    model_or_problems: str | Problem | Iterable[Problem],
    device: int | torch.device | None = None,
    dtype: str = "fp8",
) -> None:
    """Loads every kernel that calls of these problems may choose, so that none waits later.

    What the cache lacks is compiled first, several at a time. A model is a name that
    `cutlass_moe.models.shapes.MODELS` has, a Hugging Face config.json or the directory of one, and
    dtype ("fp8", "int8" or "bf16") that of its operands; its problems are those of
    `cutlass_moe.models.problems.model_problems`: of `fused_moe` and the router too.
    `cutlass_moe.grouped_matmul_problem` says which problem a call poses. device: default the
    current one. Raises ValueError for another name, file or dtype, and what `load` raises.
    """
    asked = _problems(model_or_problems, dtype)
    index = torch.cuda._utils._get_device_index(device, optional=True)
    arch = library.device_arch(index)
    wanted = [
        (problem, config)
        for problem in asked
        for config in every_config(problem)
        if not library.is_loaded(problem, config, index)
    ]
    default_cache()  # once, not in every thread
    with ThreadPoolExecutor() as pool:  # of several processes, one compiles an image
        images = list(pool.map(lambda pair: library.find_image(pair[0], pair[1], arch), wanted))
    for (problem, config), image in zip(wanted, images, strict=True):
        library.load(problem, config, index, image)


def _problems(model_or_problems: str | Problem | Iterable[Problem], dtype: str) -> list[Problem]:
    if isinstance(model_or_problems, GemmProblem | Step):
        return [model_or_problems]
    if not isinstance(model_or_problems, str):
        return list(model_or_problems)
    return list(model_problems(find_shape(model_or_problems), dtype).values())
