"""Router, combine and the whole MoE layer in plain PyTorch: what the kernels are held to.

They are differentiable, but not through a quantisation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cutlass_moe.activations import activate
from cutlass_moe.quantize import quantize_per_token_reference
from cutlass_moe.routing import row_capacity
from emitters.steps import SCORINGS


def topk_router_reference(
    logits: Tensor,
    k: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
    num_groups: int = 1,
    topk_groups: int = 1,
    correction_bias: Tensor | None = None,
    scale: float = 1.0,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`cutlass_moe.topk_router`, differentiable in logits of any floating dtype.

    Scores and weights are float32, of float64 logits float64. gpt-oss's softmax over the chosen
    logits is softmax with renormalize. Raises as `topk_router` does.
    """
    check_router(logits, k, scoring, num_groups, topk_groups, correction_bias)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    missing = wide.isnan()
    top = torch.finfo(wide.dtype).max
    numbers = wide.clamp(-top, top).masked_fill(missing, -torch.inf)  # a NaN has no gradient
    scores = numbers.sigmoid() if scoring == "sigmoid" else numbers.softmax(-1)
    scores = scores.masked_fill(missing, 0)

    choice = numbers.detach()
    if num_groups > 1 or correction_bias is not None:
        choice = scores.detach()
        if correction_bias is not None:
            choice = (choice + correction_bias.detach()).nan_to_num(nan=-top / 4, neginf=-top / 8)
        choice = choice.masked_fill(missing, -top / 4)  # two of them still have a sum
        choice = choice.masked_fill(~_allowed(choice, num_groups, topk_groups), -torch.inf)
    ids = choice.sort(dim=1, descending=True, stable=True).indices[:, :k]

    weights = scores.gather(1, ids)
    if threshold is not None:
        dropped = weights < threshold
        dropped[:, 0] = False
        weights, ids = weights.masked_fill(dropped, 0), ids.masked_fill(dropped, -1)
    if renormalize:
        weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny)
    return weights * scale, ids.int()


def combine_reference(
    rows: Tensor,
    topk_weights: Tensor,
    inverse: Tensor,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """[T, N] of rows' dtype: residual[t] + sum over j of topk_weights[t, j] * rows[inverse[t, j]].

    rows [R, N], topk_weights [T, k] and residual [T, N]: floating point. inverse int32 or int64
    [T, k]: a pair whose inverse lies outside [0, R) adds nothing, whatever it and the rows hold.
    Sums run over j in order, in float32 or in float64 where rows have it. out, where given, is
    written and returned; it may have another dtype.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    count = len(rows)
    if not count:
        rows = rows.new_zeros(1, rows.shape[1])  # for the pairs without a row to point at
    total = rows.new_zeros(len(inverse), rows.shape[1], dtype=wide)
    if residual is not None:
        total = total + residual.to(wide)
    for row, weight in zip(inverse.unbind(1), topk_weights.unbind(1), strict=True):
        kept = (row >= 0) & (row < count)
        values = rows[row.where(kept, 0).long()].to(wide)
        values = values.masked_fill(~kept[:, None], 0)
        total = total + values * weight.to(wide).masked_fill(~kept, 0)[:, None]
    return total.to(rows.dtype) if out is None else out.copy_(total)


def fused_moe_reference(
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    quant: str | None = None,
    w13_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    expert_map: Tensor | None = None,
    capacity_factor: float | None = None,
    residual: Tensor | None = None,
    accumulation: str | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    pdl: bool = True,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`cutlass_moe.fused_moe`, expert by expert, every step but quantisation in compute_dtype.

    Takes the arguments of `fused_moe`, which checks them, and float32 and float64 tensors besides.
    With `quant`, tokens are quantised as `quantize_per_token` does, and so is the activation, from
    its float32 values. `accumulation`, `workspace` and `pdl` concern kernels only. Experts and
    their tokens are read back to the host.

    Returns [T, H] of compute_dtype, or `out`, of any floating dtype.
    """
    stacked = Experts(w13, w2, w13_scale, w2_scale, w13_bias, w2_bias)
    ids, experts = topk_ids.long(), len(w13)
    if expert_map is not None:
        known = (ids >= 0) & (ids < len(expert_map))
        ids = functional.pad(expert_map.long(), (0, 1), value=-1)[ids.where(known, -1)]
        experts = len(expert_map)
    limit = row_capacity(ids, experts, capacity_factor)
    x, x_scale = hidden.to(compute_dtype), None
    if quant:
        x, x_scale = quantized(hidden, w13.dtype, compute_dtype)

    rows, inverse, first = [x.new_empty(0, w2.shape[1])], torch.full_like(ids, -1), 0
    for e in range(len(w13)):
        token, choice = (ids == e).nonzero(as_tuple=True)
        token, choice = token[:limit], choice[:limit]
        if not len(token):
            continue
        inverse[token, choice] = torch.arange(first, first + len(token), device=ids.device)
        first += len(token)
        scale = None if x_scale is None else x_scale[None, token]
        rows += feed_forward(x[None, token], scale, stacked.only(e), activation, interleaved)
    return combine_reference(torch.cat(rows), topk_weights, inverse, residual=residual, out=out)


class Experts(NamedTuple):
    """Weights of a layer's experts, as `fused_moe` takes them."""

    w13: Tensor
    w2: Tensor
    w13_scale: Tensor | None = None
    w2_scale: Tensor | None = None
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None

    def only(self, e: int) -> Experts:
        """Those of one expert."""
        return Experts(*(None if part is None else part[e : e + 1] for part in self))  # type: ignore


def feed_forward(
    x: Tensor,
    x_scale: Tensor | None,
    experts: Experts,
    activation: str,
    interleaved: bool = False,
) -> Tensor:
    """x [E, M, H] -> [E, M, H]: each expert on rows of its own, in x's dtype.

    x_scale [E, M] says that x holds 8-bit values: the activation is then quantised as well.
    """
    w13, w2, w13_scale, w2_scale, w13_bias, w2_bias = experts
    up = _product(x, x_scale, w13, w13_scale, w13_bias)
    active = activate(up, activation, interleaved)
    if x_scale is None:
        return _product(active, None, w2, w2_scale, w2_bias)
    values, scale = quantized(active, w2.dtype, x.dtype)
    return _product(values, scale, w2, w2_scale, w2_bias)


def quantized(x: Tensor, dtype: torch.dtype, to: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [..., K] -> the values of its 8-bit form and their scale [...], both in dtype `to`.

    Without a gradient.
    """
    values, scale = quantize_per_token_reference(x.detach(), dtype)
    return values.to(to), scale.to(to)


def _product(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """[E, M, N] of x [E, M, K], x_scale [E, M], weight [E, N, K], scale [E, N] or [E], bias
    [E, N]."""
    product = torch.bmm(x, weight.to(x.dtype).transpose(1, 2))
    if x_scale is not None:
        product = product * x_scale[..., None]
    if scale is not None:
        product = product * scale.to(x.dtype).view(len(weight), 1, -1)
    return product if bias is None else product + bias.to(x.dtype)[:, None]


def _allowed(choice: Tensor, num_groups: int, topk_groups: int) -> Tensor:
    """Which experts belong to the groups a token may choose from: bool [T, E]."""
    grouped = choice.unflatten(1, (num_groups, -1))
    best = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(2)
    groups = best.sort(dim=1, descending=True, stable=True).indices[:, :topk_groups]
    allowed = torch.zeros_like(best, dtype=torch.bool).scatter(1, groups, True)
    return allowed[:, :, None].expand_as(grouped).flatten(1)


def check_router(
    logits: Tensor,
    k: int,
    scoring: str,
    num_groups: int,
    topk_groups: int,
    correction_bias: Tensor | None,
) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating-point dtype, got {logits.dtype}")
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits: expected [T, E > 0], got {list(logits.shape)}")
    experts = logits.shape[1]
    if scoring not in SCORINGS:
        raise ValueError(f"scoring: expected 'softmax' or 'sigmoid', got {scoring!r}")
    if num_groups < 1 or experts % num_groups:
        raise ValueError(f"num_groups: expected a divisor of {experts} experts, got {num_groups}")
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(f"topk_groups: expected 1 to {num_groups}, got {topk_groups}")
    most = experts // num_groups * topk_groups
    if not 1 <= k <= most:
        raise ValueError(f"k: expected 1 to {most}, the experts to choose from, got {k}")
    if correction_bias is not None and correction_bias.shape != (experts,):
        got = list(correction_bias.shape)
        raise ValueError(f"correction_bias: expected [{experts}], got {got}")
