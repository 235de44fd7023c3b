"""The warning, or error, for a call that no kernel serves, or only with copies of its tensors."""

from __future__ import annotations

import warnings
from functools import cache

import torch

from cutlass_moe.environment import STRICT
from cutlass_moe.runtime.log import logger


def announce_fallback(reason: str, capturable: bool = False) -> None:
    """Warns, once per reason, that a call takes the slow torch path.

    Raises RuntimeError instead if CUTLASS_MOE_STRICT=1, and while a CUDA graph is captured unless
    the torch path is capturable. reason: says what must be and what came.
    """
    if STRICT.on():
        raise RuntimeError(f"no kernel for this problem (CUTLASS_MOE_STRICT=1): {reason}")
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    if capturing and not capturable:
        raise RuntimeError(
            "no kernel for this problem, and the torch path cannot be captured in a CUDA graph: "
            f"{reason}"
        )
    _warn_once(reason)


@cache
def _warn_once(reason: str) -> None:
    logger.info("no kernel, slow torch path: %s", reason)
    warnings.warn(f"no kernel for this problem, slow torch path taken: {reason}", stacklevel=2)


@cache
def announce_copy(name: str, multiple: int) -> None:
    """Once per tensor's name: warns that every call copies it because of its address."""
    warnings.warn(
        f"the address of {name} is not a multiple of {multiple} bytes, so every call copies it; a "
        "clone of the tensor has such an address",
        stacklevel=2,
    )
