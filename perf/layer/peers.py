"""The systems that run whole layers.

Weights in the form each wants, workspaces and buffers are made before the clock starts; all that a
layer computes from hidden states and expert ids is charged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

import cutlass_moe
from perf.layer.cases import ACTIVATION, MoeLayerCase
from perf.layer.operands import LayerInputs, LayerWeights, Router, chosen_by_torch
from perf.systems import NO_PDL, OURS, TRITON, require
from perf.timing import capture, quick_us

Layer = Callable[..., object]  # (hidden, weights, topk_weights, topk_ids, out, residual)


@dataclass(frozen=True)
class PreparedLayers:
    """launch() computes `out` bf16 [T, H] from the inputs. note: what the system chose."""

    launch: Callable[[], object]
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
    case: MoeLayerCase,
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
    case: MoeLayerCase, weights: Sequence[LayerWeights], inputs: LayerInputs, flush: torch.Tensor
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
            found[quick_us(capture([whole.launch], 1), flush)] = whole
        except TritonError:  # more shared memory or registers than there are
            continue
    if not found:
        raise RuntimeError(f"no Triton tiling runs {case.id}")
    return found[min(found)]


LAYER_SYSTEMS: dict[str, Callable[..., PreparedLayers]] = {
    OURS: ours,
    NO_PDL: partial(ours, pdl=False),
    TRITON: triton_layers,
}


def usual_layer_systems(case: MoeLayerCase) -> tuple[str, ...]:
    """What a case is measured with unless a run names systems."""
    return tuple(name for name in LAYER_SYSTEMS if case.suite == "chain" or name != NO_PDL)
