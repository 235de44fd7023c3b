"""The steps of our layer by themselves: where its time goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import cutlass_moe
from cutlass_moe.ops.route import route_reference
from cutlass_moe.tune.timing import FLUSH_BYTES
from perf.layer.cases import ACTIVATION, ROUTE_REFERENCE, MoeLayerCase
from perf.layer.operands import LayerInputs, LayerWeights
from perf.timing import GRAPH_LAUNCHES


@dataclass(frozen=True)
class LayerStep:
    """launches: of the step alone, over distinct inputs; moved: bytes that it must read and write,
    0 where none are counted."""

    launches: list[Callable[[], object]]
    moved: int = 0


def layer_steps(
    case: MoeLayerCase, weights: LayerWeights, inputs: LayerInputs
) -> tuple[dict[str, LayerStep], dict[str, Callable[[], object]]]:
    """The layer's small steps, and its two products, each on what the step before it gives."""
    assert inputs.choice is not None
    topk_weights, ids = inputs.choice
    experts, hidden = case.shape.num_experts, inputs.hidden
    table = cutlass_moe.route(ids, experts)
    small = {
        "route": LayerStep([partial(cutlass_moe.route, ids, experts)]),
        ROUTE_REFERENCE: LayerStep([partial(route_reference, ids, experts)]),
    }
    x = hidden
    scaled: dict[str, Any] = {}
    if case.element.quantized:
        x, scaled["per_token_scale"] = cutlass_moe.quantize_per_token(hidden, case.torch_dtype)
        small["quantize"] = quantize_step(case, hidden)
        scaled["scale"] = weights.w13_scale
    up = partial(
        cutlass_moe.grouped_matmul, x, weights.w13,
        index=table.index, offsets=table.offsets, activation=ACTIVATION, **scaled,
        out_dtype=torch.float16 if case.element.quantized else torch.bfloat16,
    )  # fmt: skip
    act = up()
    if case.element.quantized:
        small["quantize_act"] = quantize_step(case, act)
        act, scaled["per_token_scale"] = cutlass_moe.quantize_per_token(act, case.torch_dtype)
        scaled["scale"] = weights.w2_scale
    down = partial(
        cutlass_moe.grouped_matmul, act, weights.w2,
        offsets=table.offsets, **scaled, out_dtype=torch.bfloat16,
    )  # fmt: skip
    rows = down()
    moved = sum(each.nbytes for each in (rows, topk_weights, table.inverse, hidden))
    small["combine"] = LayerStep(
        [
            partial(cutlass_moe.combine, each, topk_weights, table.inverse)
            for each in copies(rows, moved)
        ],
        moved,
    )
    return small, {"up": up, "down": down}


def quantize_step(case: MoeLayerCase, x: torch.Tensor) -> LayerStep:
    moved = x.nbytes + x.numel() * case.torch_dtype.itemsize + 4 * len(x)
    quantize = cutlass_moe.quantize_per_token
    return LayerStep(
        [partial(quantize, each, case.torch_dtype) for each in copies(x, moved)], moved
    )


def copies(tensor: torch.Tensor, moved: int) -> list[torch.Tensor]:
    """The tensor and clones, so many that steps on all of them move more than L2 holds, where a
    graph's launches suffice for that."""
    number = max(2, min(-(-FLUSH_BYTES // moved), GRAPH_LAUNCHES))
    return [tensor, *(tensor.clone() for _ in range(number - 1))]
