"""The systems that run whole layers, and our layer's parts alone.

Weights in the form each wants, workspaces and buffers are made before the clock starts; all that a
layer computes from hidden states and expert ids is charged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

import cutlass_moe
from cutlass_moe.ops.route import route_reference
from cutlass_moe.tune.timing import FLUSH_BYTES
from perf.layer.cases import LayerCase
from perf.layer.operands import LayerInputs, LayerWeights, Router, chosen_by_torch
from perf.product.operands import TORCH_DTYPES
from perf.product.peers import OURS, require
from perf.timing import GRAPH_LAUNCHES, capture, quick_us

ACTIVATION = "swiglu"
NO_PDL = "no_pdl"
ROUTE_REFERENCE = "route_torch"
Layer = Callable[..., object]  # (hidden, weights, topk_weights, topk_ids, out, residual)


@dataclass(frozen=True)
class PreparedLayers:
    """launch() computes `out` bf16 [T, H] from the inputs. note: what the system chose."""

    launch: Callable[[], None]
    out: torch.Tensor
    note: str = ""


def prepared(
    weights: Sequence[LayerWeights],
    inputs: LayerInputs,
    layer: Layer,
    router: Router,
    note: str = "",
) -> PreparedLayers:
    """The layers one after another, each reading what the one before has written; in a chain each
    adds to its input."""
    outs = [torch.full_like(inputs.hidden, torch.nan) for _ in range(min(len(weights), 2))]

    def launch() -> None:
        hidden = inputs.hidden
        for number, choice in enumerate(inputs.choices(router)):
            out = outs[number % 2]
            layer(hidden, weights[number], *choice, out, hidden if inputs.logits else None)
            hidden = out

    return PreparedLayers(launch, outs[(len(weights) - 1) % 2], note)


def ours(
    case: LayerCase,
    weights: Sequence[LayerWeights],
    inputs: LayerInputs,
    flush: torch.Tensor,
    pdl: bool = True,
) -> PreparedLayers:
    """`fused_moe` with a workspace; in a chain, `topk_router` before it."""
    top_k, some, hidden = case.shape.top_k, weights[0], inputs.hidden
    choice = next(inputs.choices(partial(chosen_by_torch, top_k=top_k)))
    size = cutlass_moe.fused_moe_workspace_size(
        hidden, some.w13, some.w2, *choice, quant=case.quant, activation=ACTIVATION,
        residual=hidden if inputs.logits else None, **some.options,
    )  # fmt: skip
    workspace = torch.empty(size, dtype=torch.uint8, device=hidden.device)

    def layer(
        hidden: torch.Tensor,
        weights: LayerWeights,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        out: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> None:
        cutlass_moe.fused_moe(
            hidden, weights.w13, weights.w2, topk_weights, topk_ids, quant=case.quant,
            activation=ACTIVATION, residual=residual, out=out, workspace=workspace, pdl=pdl,
            **weights.options,
        )  # fmt: skip

    return prepared(weights, inputs, layer, partial(cutlass_moe.topk_router, k=top_k, pdl=pdl))


def triton_layers(
    case: LayerCase, weights: Sequence[LayerWeights], inputs: LayerInputs, flush: torch.Tensor
) -> PreparedLayers:
    """Our Triton pipeline, with the tiling that took least time; in a chain, its own router."""
    require("triton")
    from triton.errors import TritonError

    from perf.layer.triton import TritonLayer, tilings, topk

    shape, device = case.shape, inputs.hidden.device
    found: dict[float, PreparedLayers] = {}
    for tiling in tilings(case.rows / shape.num_experts):
        layer = TritonLayer(shape, case.dtype, case.tokens, tiling, device)
        router = partial(topk, top_k=shape.top_k)
        whole = prepared(weights, inputs, layer, router, str(tiling))
        try:
            found[quick_us(capture([whole.launch], 1).replay, flush)] = whole
        except TritonError:  # more shared memory or registers than there are
            continue
    if not found:
        raise RuntimeError(f"no Triton tiling runs {case.id}")
    return found[min(found)]


LAYER_SYSTEMS: dict[str, Callable[..., PreparedLayers]] = {
    OURS: ours,
    NO_PDL: partial(ours, pdl=False),
    "triton": triton_layers,
}


def usual_layer_systems(case: LayerCase) -> tuple[str, ...]:
    """What a case is measured with unless a run names systems."""
    return tuple(name for name in LAYER_SYSTEMS if case.suite == "chain" or name != NO_PDL)


@dataclass(frozen=True)
class Part:
    """A step of our layer by itself. launches: over distinct inputs; moved: bytes that the step
    must read and write, 0 where none are counted."""

    launches: list[Callable[[], object]]
    moved: int = 0


def parts(
    case: LayerCase, weights: LayerWeights, inputs: LayerInputs
) -> tuple[dict[str, Part], dict[str, Callable[[], object]]]:
    """The layer's small steps, and its two products, each on what the step before it gives."""
    assert inputs.choice is not None
    topk_weights, ids = inputs.choice
    experts, hidden = case.shape.num_experts, inputs.hidden
    table = cutlass_moe.route(ids, experts)
    small = {
        "route": Part([partial(cutlass_moe.route, ids, experts)]),
        ROUTE_REFERENCE: Part([partial(route_reference, ids, experts)]),
    }
    x, scaled = hidden, {}
    if case.quantized:
        x, scaled["per_token_scale"] = cutlass_moe.quantize_per_token(hidden, operand(case))
        small["quantize"] = quantize_part(case, hidden)
        scaled["scale"] = weights.w13_scale
    up = partial(
        cutlass_moe.grouped_matmul, x, weights.w13,
        index=table.index, offsets=table.offsets, activation=ACTIVATION, **scaled,
        out_dtype=torch.float16 if case.quantized else torch.bfloat16,
    )  # fmt: skip
    act = up()
    if case.quantized:
        small["quantize_act"] = quantize_part(case, act)
        act, scaled["per_token_scale"] = cutlass_moe.quantize_per_token(act, operand(case))
        scaled["scale"] = weights.w2_scale
    down = partial(
        cutlass_moe.grouped_matmul, act, weights.w2,
        offsets=table.offsets, **scaled, out_dtype=torch.bfloat16,
    )  # fmt: skip
    rows = down()
    moved = sum(each.nbytes for each in (rows, topk_weights, table.inverse, hidden))
    small["combine"] = Part(
        [
            partial(cutlass_moe.combine, each, topk_weights, table.inverse)
            for each in copies(rows, moved)
        ],
        moved,
    )
    return small, {"up": up, "down": down}


def operand(case: LayerCase) -> torch.dtype:
    return TORCH_DTYPES[case.dtype]


def quantize_part(case: LayerCase, x: torch.Tensor) -> Part:
    moved = x.nbytes + x.numel() * operand(case).itemsize + 4 * len(x)
    quantize = cutlass_moe.quantize_per_token
    return Part([partial(quantize, each, operand(case)) for each in copies(x, moved)], moved)


def copies(tensor: torch.Tensor, moved: int) -> list[torch.Tensor]:
    """The tensor and clones, so many that steps on all of them move more than L2 holds, where a
    graph's launches suffice for that."""
    number = max(2, min(-(-FLUSH_BYTES // moved), GRAPH_LAUNCHES))
    return [tensor, *(tensor.clone() for _ in range(number - 1))]
