"""warmup: loads kernels before the first call needs them."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.images.cache import default_cache
from cutlass_moe.models.files import find_model, warn_of
from cutlass_moe.models.problems import model_problems
from cutlass_moe.ops._types import in_words, typed
from cutlass_moe.runtime import library
from emitters.spec.gemm import GemmProblem
from emitters.spec.layer_steps import Step
from emitters.spec.registry import Problem


@typed
def warmup(
    model_or_problems: str | Problem | Iterable[Problem],
    device: int | torch.device | None = None,
    dtype: str | None = None,
    training: bool = False,
) -> None:
    """Loads every kernel that calls may choose for these problems, so that no call waits for one.

    Kernels that the cache lacks are compiled first, several at a time.

    model_or_problems: one problem, several, or a model. `grouped_matmul_problem` gives the problem
      that a call poses. A model is a name in `cutlass_moe.models.shapes.MODELS`, or the path of a
      Hugging Face config.json or of its directory; it stands for all problems of its layers: those
      of `fused_moe` and of the router.
    device: default the current one.
    dtype: of a model's weights: "fp8", "fp8_block" (scales that vary along K), "int8" or "bf16";
      default what the file's quantization_config asks for, else "fp8". What a model does and the
      kernels do not is a RuntimeWarning.
    training: of a model with bf16 weights, what training launches too.

    Raises ValueError for an unknown model, file or dtype, and for training with another dtype than
    bf16, and what `runtime.library.load` raises.
    """
    asked = _problems(model_or_problems, dtype, training)
    index = torch.cuda._utils._get_device_index(device, optional=True)
    arch = library.device_arch(index)
    wanted = [
        (problem, config)
        for problem in asked
        for config in every_config(problem)
        if not library.is_loaded(problem, config, index)
    ]
    default_cache()  # opened here once, instead of in every thread
    with ThreadPoolExecutor() as pool:  # if several processes warm up, each image is compiled once
        images = list(pool.map(lambda pair: library.find_image(pair[0], pair[1], arch), wanted))
    for (problem, config), image in zip(wanted, images, strict=True):
        library.load(problem, config, index, image)


def _problems(
    model_or_problems: str | Problem | Iterable[Problem], dtype: str | None, training: bool
) -> list[Problem]:
    if isinstance(model_or_problems, GemmProblem | Step):
        return [model_or_problems]
    if not isinstance(model_or_problems, str):
        several: Any = model_or_problems
        problems = list(several) if isinstance(several, Iterable) else [several]
        for problem in problems:
            if not isinstance(problem, GemmProblem | Step):
                raise TypeError(
                    "model_or_problems must be a model's name or path, a problem or several, got "
                    f"{in_words(problem)}"
                )
        return problems
    model = find_model(model_or_problems)
    warn_of(model)
    return list(model_problems(model.shape, dtype or model.dtype, training).values())
