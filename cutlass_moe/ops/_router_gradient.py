"""The gradient of the weights that `topk_router` gives, by formula: it is zero but for k logits of
a token, except where a softmax is not renormalised."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cutlass_moe.operands import Router


def router_gradient(
    grad: Tensor, logits: Tensor, weights: Tensor, ids: Tensor, router: Router
) -> Tensor:
    """The gradient of logits [T, E], in their dtype. grad [T, k]: that of weights [T, k].

    With scores s of the chosen experts, and after `renormalize` weights w = scale * s / sum of s:

      gradient of s = scale * (grad - sum of grad * s / sum of s) / sum of s

    Logits that are NaN or infinite have none.
    """
    wide = weights.dtype
    logits, dtype = logits.to(wide), logits.dtype
    finite, kept = logits.isfinite(), ids >= 0
    place = ids.clamp(min=0).long()
    known = kept & finite.gather(1, place)
    grad = grad.to(wide).masked_fill(~known, 0) * router.scale
    if router.renormalize:
        shares = weights / router.scale if router.scale else torch.zeros_like(weights)
        mean = (grad * shares).sum(1, keepdim=True)
        grad = (grad - mean).masked_fill(~known, 0)
        if router.scoring == "softmax":  # the sum of s cancels, and so does all beyond the k logits
            return _spread(grad * shares, kept, place, logits).to(dtype)
    chosen = logits.gather(1, place).where(known, 0)
    if router.scoring == "softmax":
        scores = logits.where(finite, logits.nan_to_num(nan=-torch.inf)).softmax(1)
        spread = _spread(grad, kept, place, logits)
        found = scores * (spread - (scores * spread).sum(1, keepdim=True))
        return found.masked_fill(~finite, 0).to(dtype)
    if router.scoring == "sigmoid":
        scores = chosen.sigmoid()
        slope = scores * (1 - scores)
    else:
        scores = functional.softplus(chosen).sqrt()
        slope = chosen.sigmoid() / (2 * scores).clamp(min=torch.finfo(wide).tiny)
    if router.renormalize:
        total = scores.where(known, 0).sum(1, keepdim=True)
        slope = slope / total.clamp(min=torch.finfo(wide).tiny)
    return _spread(grad * slope, kept, place, logits).to(dtype)


def _spread(values: Tensor, kept: Tensor, place: Tensor, logits: Tensor) -> Tensor:
    """The values [T, k] of kept choices at their places in [T, E], zeros elsewhere."""
    tokens, experts = logits.shape
    place = place.where(kept, experts)  # a column of its own, which is cut off
    return values.new_zeros(tokens, experts + 1).scatter(1, place, values)[:, :experts]
