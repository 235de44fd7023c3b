"""topk_router and route_logits: choose each token's experts and weights from a router's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from cutlass_moe.operands import DTYPES, Router, RouterArguments
from cutlass_moe.ops._define import define, define_gradient
from cutlass_moe.ops._router_gradient import router_gradient
from cutlass_moe.ops._types import check_types, typed
from cutlass_moe.ops.dispatch import launch_step, step_kernel
from cutlass_moe.ops.grouped_matmul import wants_gradient
from cutlass_moe.ops.route import RoutingTable, check_capacity, route, row_capacity
from cutlass_moe.runtime.fallback import announce_fallback
from cutlass_moe.runtime.kernel import Kernel
from cutlass_moe.runtime.parameters import router_values
from emitters.spec.layer_steps import (
    MAX_FUSED_EXPERTS,
    MAX_TOP_K,
    SCORINGS,
    RouteLogitsProblem,
    TopkProblem,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

_LARGEST = torch.finfo(torch.float32).max
# Measured on an H200: up to these numbers of tokens and of logits, one launch that also routes is
# faster than two.
_FUSED_TOKENS, _FUSED_LOGITS = 16, 4096


def topk_router(
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
    pdl: bool = True,
) -> tuple[Tensor, Tensor]:
    """Chooses k experts per token, and their weights, as Mixtral, Qwen3, DeepSeek-V3, gpt-oss do.

    It works in this order, in float32:

      1. score = softmax(logits) over all experts, or sigmoid(logits),
         or sqrt(log(1 + exp(logits))) for "sqrtsoftplus" (DeepSeek-V4)
      2. choice = logit, or score + correction_bias if there is a bias or num_groups > 1
      3. groups: of num_groups equal runs of ids, the topk_groups runs with the largest sum of their
         two best choices stay; other experts are out
      4. the k experts with the largest choice; ties go to the lower id, NaN comes last with score 0
      5. weight = score; choices after the first with a score below threshold get id -1, weight 0
      6. renormalize: divides a token's weights by their sum
      7. multiplies all weights by scale

    logits [T, E]: bfloat16, float16 or float32. scoring: "softmax", "sigmoid" or
      "sqrtsoftplus".
    correction_bias [E]: floating point. threshold: default none are dropped.
    pdl: lets the kernel start before its predecessor ends (programmatic dependent launch); it waits
      for the predecessor before it reads anything.

    Returns (topk_weights float32 [T, k], topk_ids int32 [T, k]), best first. Kernels serve k <= 32
    and groups of up to 1024 experts; the reference serves others, and float64 logits. topk_weights
    are differentiable in logits, by a formula in torch that also serves torch.compile; logits that
    are NaN or infinite have no gradient, and neither has correction_bias, which only chooses.

    Raises TypeError or ValueError that says what must be and what came.
    """
    router = Router(
        k, scoring, renormalize, num_groups, topk_groups, correction_bias, scale, threshold
    )
    try:
        if type(renormalize) is not bool or type(pdl) is not bool:  # torch would take anything
            check_types(topk_router, locals())
        return _topk_router_op(logits, *router, pdl)
    except Exception:
        check_types(topk_router, locals())
        raise


def route_logits(
    logits: Tensor,
    k: int,
    *,
    num_experts: int | None = None,
    expert_map: Tensor | None = None,
    capacity_factor: float | None = None,
    pdl: bool = True,
    **arguments: Unpack[RouterArguments],
) -> tuple[RoutingTable, Tensor, Tensor]:
    """`topk_router`, then `route` of the experts it chose; few tokens take one launch for both.

    logits, k and arguments: as in `topk_router`. num_experts, expert_map, capacity_factor: as in
    `route`; num_experts defaults to E, and either of the first two makes it two launches, as does a
    gradient, which topk_weights have as in `topk_router`.

    Returns (RoutingTable, topk_weights float32 [T, k], topk_ids int32 [T, k]). Pairs that are
    dropped keep their weights. Raises what both functions raise.
    """
    router = Router(k, **arguments)
    try:
        if type(router.renormalize) is not bool or type(pdl) is not bool:  # as in topk_router
            check_types(route_logits, locals())
        trained = wants_gradient((logits,))
        if num_experts is None and expert_map is None and not trained:
            *table, weights, ids = _route_logits_op(logits, *router, capacity_factor, pdl)
            return RoutingTable(*table), weights, ids
        weights, ids = _topk_router_op(logits, *router, pdl)
        experts = logits.shape[1] if num_experts is None else num_experts
        table = route(ids, experts, expert_map=expert_map, capacity_factor=capacity_factor, pdl=pdl)
        return table, weights, ids
    except Exception:
        check_types(route_logits, locals())
        raise


def _values(
    logits: Tensor, router: Router, bias: Tensor | None, weights: Tensor, ids: Tensor
) -> dict[str, int]:
    """The values of a router kernel's parameters. bias: correction_bias as float32.

    Tensors are contiguous; weights and ids are written.
    """
    addresses = {
        "logits": logits.data_ptr(),
        "correction_bias": 0 if bias is None else bias.data_ptr(),
        "weights": weights.data_ptr(),
        "ids": ids.data_ptr(),
    }
    return router_values(
        addresses,
        num_tokens=len(logits),
        k=router.k,
        topk_groups=router.topk_groups,
        renormalize=router.renormalize,
        scale=router.scale,
        threshold=router.threshold,
    )


def _check(logits: Tensor, router: Router) -> None:
    """Checks the arguments of `topk_router`."""
    bias = router.correction_bias
    check_router(logits, router)
    for name, value in (("scale", router.scale), ("threshold", router.threshold or 0.0)):
        if not -_LARGEST <= value <= _LARGEST:
            raise ValueError(f"{name} must be a finite float32, got {value}")
    if bias is None:
        return
    if not bias.is_floating_point():
        raise TypeError(f"correction_bias must have a floating-point dtype, got {bias.dtype}")
    if bias.device != logits.device:
        raise ValueError(f"correction_bias must be on {logits.device}, got one on {bias.device}")


def _find(kind: type[TopkProblem], logits: Tensor, router: Router) -> Kernel | None:
    """The router kernel of this kind, or None after a warning if there is none."""
    dtype = DTYPES.get(logits.dtype)
    if router.k > MAX_TOP_K or dtype is None:
        reason = (
            f"k must be at most {MAX_TOP_K} and logits bfloat16, float16 or float32, "
            f"got k {router.k} and {logits.dtype}"
        )
        announce_fallback(reason, capturable=True)
        return None
    problem = kind(logits.shape[1], dtype, router.scoring, router.num_groups)
    return step_kernel(problem, logits.get_device())


# The ops.

_Pair = tuple[Tensor, Tensor]


def _empty(logits: Tensor, router: Router) -> _Pair:
    """Uninitialised tensors for the weights and ids of these logits."""
    shape = (logits.shape[0], router.k)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(shape, dtype=wide), logits.new_empty(shape, dtype=torch.int32)


def _operands(logits: Tensor, router: Router) -> tuple[Tensor, Tensor | None]:
    """Logits and correction_bias as kernels read them: contiguous, the bias in float32."""
    bias = router.correction_bias
    return logits.contiguous(), None if bias is None else bias.float().contiguous()


def _topk_router_impl(logits: Tensor, *arguments: Any) -> _Pair:
    router, pdl = Router(*arguments[:-1]), arguments[-1]
    _check(logits, router)
    kernel = None
    if logits.is_cuda and len(logits):
        kernel = _find(TopkProblem, logits, router)
    if kernel is None:
        return topk_router_reference(logits, **router._asdict())
    weights, ids = _empty(logits, router)
    logits, bias = _operands(logits, router)
    warps = kernel.record.threads // 32
    values = _values(logits, router, bias, weights, ids)
    launch_step(kernel, values, -(-len(logits) // warps), logits.get_device(), pdl)
    return weights, ids


def _route_logits_impl(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    router, (capacity_factor, pdl) = Router(*arguments[:-2]), arguments[-2:]
    _check(logits, router)
    check_capacity(capacity_factor)
    experts = logits.shape[1]
    few = 0 < len(logits) <= _FUSED_TOKENS and logits.numel() <= _FUSED_LOGITS
    kernel = None
    if logits.is_cuda and few and experts <= MAX_FUSED_EXPERTS:
        kernel = _find(RouteLogitsProblem, logits, router)
    if kernel is None:
        weights, ids = _topk_router_impl(logits, *router, pdl)
        table = route(ids, experts, capacity_factor=capacity_factor, pdl=pdl)
    else:
        weights, ids = _empty(logits, router)
        table = RoutingTable.empty(ids, experts)
        logits, bias = _operands(logits, router)
        values = _values(logits, router, bias, weights, ids)
        values |= {
            "capacity": row_capacity(ids, experts, capacity_factor),
            "max_rows": ids.numel(),
            "overflow": 0,
            "index": table.index.data_ptr(),
            "offsets": table.offsets.data_ptr(),
            "inverse": table.inverse.data_ptr(),
        }
        launch_step(kernel, values, 1, logits.get_device(), pdl)
    return table.index, table.offsets, table.inverse, weights, ids


def _topk_router_fake(logits: Tensor, *arguments: Any) -> _Pair:
    router = Router(*arguments[:-1])
    _check(logits, router)
    return _empty(logits, router)


def _route_logits_fake(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    router = Router(*arguments[:-2])
    _check(logits, router)
    weights, ids = _empty(logits, router)
    table = RoutingTable.empty(ids, logits.shape[1])
    return table.index, table.offsets, table.inverse, weights, ids


_INPUTS = (
    "Tensor logits, int k, str scoring, bool renormalize, int num_groups, int topk_groups, "
    "Tensor? correction_bias, float scale, float? threshold"
)
_topk_router_op = define(
    f"topk_router({_INPUTS}, bool pdl) -> (Tensor, Tensor)", _topk_router_impl, _topk_router_fake
)
_route_logits_op = define(
    f"route_logits({_INPUTS}, float? capacity_factor, bool pdl)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _route_logits_impl,
    _route_logits_fake,
)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: _Pair) -> None:
    logits, *router, _ = inputs
    weights, ids = output
    ctx.mark_non_differentiable(ids)
    ctx.save_for_backward(logits, weights, ids)
    ctx.router = Router(*router)


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    logits, weights, ids = ctx.saved_tensors
    gradient = router_gradient(grad, logits, weights, ids, ctx.router)
    return (gradient, *(None,) * (len(Router._fields) + 1))


define_gradient("topk_router", _gradients, _save_for_backward)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: functional.softplus(logits).sqrt(),
}


@typed
def topk_router_reference(
    logits: Tensor, k: int, **arguments: Unpack[RouterArguments]
) -> tuple[Tensor, Tensor]:
    """`cutlass_moe.topk_router` in plain PyTorch, differentiable, for logits of any floating dtype.

    Scores and weights are float32, or float64 for float64 logits. gpt-oss's softmax over the chosen
    logits is scoring "softmax" with renormalize. Raises TypeError or ValueError as `topk_router`
    does.
    """
    router = Router(k, **arguments)
    check_router(logits, router)
    bias = router.correction_bias
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    missing = wide.isnan()
    top = torch.finfo(wide.dtype).max
    numbers = wide.clamp(-top, top).masked_fill(missing, -torch.inf)  # a NaN has no gradient
    scores = SCORES[router.scoring](numbers)
    scores = scores.masked_fill(missing, 0)

    choice = numbers.detach()
    if router.num_groups > 1 or bias is not None:
        choice = scores.detach()
        if bias is not None:
            choice = (choice + bias.detach()).nan_to_num(nan=-top / 4, neginf=-top / 8)
        choice = choice.masked_fill(missing, -top / 4)  # two of them still have a sum
        choice = choice.masked_fill(~_allowed(choice, router), -torch.inf)
    ids = choice.sort(dim=1, descending=True, stable=True).indices[:, :k]

    weights = scores.gather(1, ids)
    if router.threshold is not None:
        dropped = weights < router.threshold
        dropped[:, 0] = False
        weights, ids = weights.masked_fill(dropped, 0), ids.masked_fill(dropped, -1)
    if router.renormalize:
        weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny)
    return weights * router.scale, ids.int()


def _allowed(choice: Tensor, router: Router) -> Tensor:
    """Whether each expert is in a group that the token may choose from: bool [T, E]."""
    grouped = choice.unflatten(1, (router.num_groups, -1))
    best = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(2)
    groups = best.sort(dim=1, descending=True, stable=True).indices[:, : router.topk_groups]
    allowed = torch.zeros_like(best, dtype=torch.bool).scatter(1, groups, True)
    return allowed[:, :, None].expand_as(grouped).flatten(1)


def check_router(logits: Tensor, router: Router) -> None:
    """Checks logits and the choice of experts; raises TypeError or ValueError."""
    k, scoring, _, num_groups, topk_groups, correction_bias, _, _ = router
    if not logits.is_floating_point():
        raise TypeError(f"logits must have a floating-point dtype, got {logits.dtype}")
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f"logits must be [T, E > 0], got {list(logits.shape)}")
    experts = logits.shape[1]
    if scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, got {scoring!r}")
    if num_groups < 1 or experts % num_groups:
        raise ValueError(f"num_groups must be a divisor of {experts} experts, got {num_groups}")
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(f"topk_groups must be 1 to num_groups {num_groups}, got {topk_groups}")
    most = experts // num_groups * topk_groups
    if not 1 <= k <= most:
        raise ValueError(f"k must be 1 to {most}, the number of experts to choose from, got {k}")
    if correction_bias is not None and correction_bias.shape != (experts,):
        got = list(correction_bias.shape)
        raise ValueError(f"correction_bias must be [{experts}], got {got}")
