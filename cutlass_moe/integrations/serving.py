"""Experts as serving engines hold them: which kernels run them, loaded before a request comes."""

from __future__ import annotations

import logging
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.environment import STRICT
from cutlass_moe.integrations.experts import (
    BLOCK,
    NOT_GATED,
    QUANTS,
    ActivationArguments,
)
from cutlass_moe.models.expert_weights import allocate
from cutlass_moe.models.shapes import FP8_BLOCK, PACKINGS

_logger = logging.getLogger("cutlass_moe")
_known: dict[tuple[ServedExperts, str, int], str | None] = {}  # by experts, engine and device


class Unsupported(ValueError):
    """Experts, or a way to call them, that our kernels don't have; says what must be."""


class ServedExperts(NamedTuple):
    """What decides the kernels of a layer: the same for all of a model's layers of one kind."""

    num_experts: int  # of this rank
    top_k: int
    hidden: int
    inter: int  # this rank's share
    dtype: torch.dtype  # of hidden states
    quant: str | None
    activation: ActivationArguments
    interleaved: bool = False
    bias: torch.dtype | None = None

    @property
    def words(self) -> str:
        quant = self.quant or str(self.dtype).removeprefix("torch.")
        return f"{self.num_experts} experts {self.hidden} x {self.inter} in {quant}"

    @property
    def of_tokens(self) -> str | None:
        """The argument `quant` of `fused_moe`: packed weights take tokens in 16 bits."""
        return None if self.quant in PACKINGS else self.quant

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `fused_moe` that are no tensors."""
        named = self.activation._asdict()
        return {"quant": self.of_tokens, "interleaved": self.interleaved, **named}


def why_not(experts: ServedExperts, engine: str, device: int) -> str | None:
    """Why kernels don't run these experts, or None; then their images are loaded.

    Images that are missing are compiled first, where that is allowed. Asked once per kind of
    experts and GPU, and told in the log. device: -1 for the CPU, where nothing is loaded.
    """
    key = (experts, engine, device)
    if key not in _known:
        if device >= 0 and torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured and kernels are not loaded"
        _known[key] = _find_out(experts, engine, device)
    return _known[key]


def _find_out(experts: ServedExperts, engine: str, device: int) -> str | None:
    call = arguments(experts, tokens=1)
    reason = cm.why_not(**call)
    if device >= 0:
        capability = torch.cuda.get_device_capability(device)
        if capability != (9, 0):
            reason = "the GPU must have capability 9.0, got {}.{}".format(*capability)
    if device >= 0 and reason is None:
        try:
            cm.warmup(cm.fused_moe_problems(**call), device)
        except Exception as error:  # whatever it is, the engine serves without our kernels
            reason = f"its images can't be loaded: {error}"
            _logger.warning("%s: own kernels run %s: %s", engine, experts.words, reason)
    if reason is None:
        _logger.info("%s: cutlass_moe runs %s", engine, experts.words)
    else:
        refuse(engine, f"{experts.words}: {reason}")
    return reason


@cache
def refuse(engine: str, reason: str) -> None:
    """Tells in the log, once, why an engine keeps its own kernels.

    Raises RuntimeError instead if CUTLASS_MOE_STRICT=1.
    """
    if STRICT.on():
        raise RuntimeError(f"no kernel for experts of {engine} (CUTLASS_MOE_STRICT=1): {reason}")
    _logger.info("%s: own kernels run experts: %s", engine, reason)


@lru_cache(maxsize=1 << 15)
def workspace_size(experts: ServedExperts, tokens: int) -> int:
    """The bytes of workspace of a call of `fused_moe`."""
    return cm.fused_moe_workspace_size(**arguments(experts, tokens))


def arguments(experts: ServedExperts, tokens: int) -> dict[str, Any]:
    """A call of `fused_moe`, with tensors that have no values."""
    e, h, i = experts.num_experts, experts.hidden, experts.inter
    gates = 1 if experts.activation in NOT_GATED else 2
    quant = experts.of_tokens
    held = QUANTS["fp8" if quant == FP8_BLOCK else quant] if quant else experts.dtype
    tensor = partial(torch.empty, device="meta")
    call: dict[str, Any] = {
        "hidden": tensor(tokens, h, dtype=experts.dtype),
        "topk_weights": tensor(tokens, experts.top_k, dtype=torch.float32),
        "topk_ids": tensor(tokens, experts.top_k, dtype=torch.int32),
        **experts.options,
    }
    for name, n, k, halves in (("w13", gates * i, h, gates), ("w2", h, i, 1)):
        call[name] = tensor(e, n, k, dtype=held)
        if quant == FP8_BLOCK:
            rows = halves * -(-n // halves // BLOCK)
            call[f"{name}_scale"] = tensor(e, rows, -(-k // BLOCK), dtype=torch.float32)
        elif quant:
            call[f"{name}_scale"] = tensor(e, n, dtype=torch.float32)
        if experts.bias:
            call[f"{name}_bias"] = tensor(e, n, dtype=experts.bias)
    if experts.quant in PACKINGS:
        packed = allocate(e, (gates * i, h, i), experts.quant, torch.device("meta"))
        call |= {"w13": packed.w13, "w2": packed.w2}
    return call


def per_channel(scale: Tensor) -> Tensor:
    """Scales [E, N, 1] or [E, N] as float32 [E, N]: a view of them if they are float32."""
    return scale.detach().flatten(1).float()
