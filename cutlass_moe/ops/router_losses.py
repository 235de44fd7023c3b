"""Losses that trainers add so that routers stay balanced and logits small, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from cutlass_moe.operands import IDS
from cutlass_moe.ops._types import typed
from cutlass_moe.ops.router import SCORES
from emitters.spec.layer_steps import SCORINGS


@typed
def load_balancing_loss(
    logits: Tensor, topk_ids: Tensor, *, scoring: str = "softmax", mask: Tensor | None = None
) -> Tensor:
    """The auxiliary loss of Switch Transformer for k experts a token; 1 where all are balanced.

      E / (k * T) * sum over experts e of count[e] * p[e]

    count[e] is the number of (token, choice) pairs of e, which has no gradient, and p[e] the mean
    over tokens of the score of e, where a token's scores are divided by their sum. This is
    DeepSeek's and Megatron's form; transformers' `load_balancing_loss_func` is k times as large.

    logits [T, E]: floating point. topk_ids int32 or int64 [T, k], as `topk_router` gives them: an
      id outside [0, E) is not counted. scoring: as in `topk_router`. mask bool [T]: the tokens that
      count, such as those that are no padding; default all.

    Returns one float32, or float64 for float64 logits; 0 if no token counts. Differentiable in
    logits; waits for no GPU. Raises TypeError or ValueError that says what must be and what came.
    """
    _check_logits(logits, mask)
    if scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")
    if topk_ids.dtype not in IDS:
        raise TypeError(f"topk_ids must be int32 or int64, got {topk_ids.dtype}")
    tokens, experts = logits.shape
    if topk_ids.dim() != 2 or len(topk_ids) != tokens:
        raise ValueError(f"topk_ids must be [{tokens}, k], got {list(topk_ids.shape)}")
    scores = SCORES[scoring](_wide(logits))
    if scoring != "softmax":
        scores = scores / scores.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    counted = (topk_ids >= 0) & (topk_ids < experts)
    number = scores.new_full((), tokens)
    if mask is not None:
        scores = scores.where(mask[:, None], 0)
        counted = counted & mask[:, None]
        number = mask.sum()
    place = topk_ids.where(counted, experts).long().flatten()
    counts = torch.zeros(experts + 1, dtype=torch.int32, device=logits.device)
    counts = counts.scatter_add(0, place, torch.ones_like(place, dtype=torch.int32))[:experts]
    pairs = number.clamp(min=1).square() * max(topk_ids.shape[1], 1)
    return (counts * scores.sum(0)).sum() * experts / pairs


@typed
def router_z_loss(logits: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The z-loss of ST-MoE: the mean over tokens of logsumexp(logits)^2, which keeps logits small.

    logits [T, E]: floating point. mask: as in `load_balancing_loss`. Returns one float32, or
    float64 for float64 logits; 0 if no token counts. Differentiable in logits. Raises TypeError or
    ValueError that says what must be and what came.
    """
    _check_logits(logits, mask)
    squares = _wide(logits).logsumexp(1).square()
    if mask is None:
        return squares.sum() / max(len(squares), 1)
    return squares.where(mask, 0).sum() / mask.sum().clamp(min=1)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_logits(logits: Tensor, mask: Tensor | None) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits must have a floating-point dtype, got {logits.dtype}")
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits must be [T, E > 0], got {list(logits.shape)}")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be torch.bool, got {mask.dtype}")
    if mask.shape != logits.shape[:1]:
        raise ValueError(f"mask must be [{logits.shape[0]}], got {list(mask.shape)}")
