"""What is said where no kernel serves a call."""

from __future__ import annotations

import warnings
from functools import cache

import torch

from cutlass_moe.environment import STRICT
from cutlass_moe.runtime.log import logger


def announce_fallback(reason: str, capturable: bool = False) -> None:
    """Once a reason: a warning. With CUTLASS_MOE_STRICT=1, or under capture unless the torch path
    is capturable: an error."""
    if STRICT.on():
        raise RuntimeError(f"no kernel for this problem (CUTLASS_MOE_STRICT=1): {reason}")
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    if capturing and not capturable:
        raise RuntimeError(
            f"no kernel for this problem, and the torch path cannot be captured: {reason}"
        )
    _warn_once(reason)


@cache
def _warn_once(reason: str) -> None:
    logger.info("no kernel, slow torch path: %s", reason)
    warnings.warn(f"no kernel for this problem, slow torch path taken: {reason}", stacklevel=2)
