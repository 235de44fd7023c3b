"""The problems of a layer's kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cutlass_moe import shapes
from cutlass_moe.arguments import DTYPES, is_n_major
from cutlass_moe.layer_arguments import Layer, LayerOptions
from cutlass_moe.shapes import ACTIVATION_SCALE, MoeShape
from emitters.problem import (
    ACCUMULATIONS,
    Accumulation,
    Activation,
    ActivationFunction,
    Bias,
    ChannelScale,
    DType,
    EpilogueNode,
    ExpertScale,
    GemmProblem,
    Major,
    PerTokenScale,
)
from emitters.steps import CombineProblem, QuantizeProblem, RouteProblem


class LayerProblems(NamedTuple):
    """In the order of the launches."""

    route: RouteProblem
    quantize_hidden: QuantizeProblem | None
    up: GemmProblem
    quantize_active: QuantizeProblem | None
    down: GemmProblem
    combine: CombineProblem


class Projection(NamedTuple):
    """What a layer's tensors say of one of its two products."""

    scale_dims: int = 0  # of its scale; 0 without one
    bias: DType | None = None
    n_major: bool = False


def layer_problems(
    num_experts: int,
    top_k: int,
    hidden: int,
    inter: int,
    dtypes: tuple[DType, DType],
    activation: str,
    projections: tuple[Projection, Projection],
    accumulation: str | None = None,
    id_bits: int = 32,
) -> LayerProblems:
    """dtypes: of the products' operands, and of the layer's input and output. projections: up and
    down. Of a layer without quantisation both dtypes are the same."""
    operand, outside = dtypes
    quantized = operand.quantized
    function = ActivationFunction(activation)
    active = DType.FP16 if quantized else outside
    scale = ACTIVATION_SCALE if quantized else 1.0
    up, down = projections

    def gemm(of: Projection, n: int, k: int, out: DType, *last: EpilogueNode) -> GemmProblem:
        nodes: list[EpilogueNode] = [PerTokenScale()] if quantized else []
        if of.scale_dims:
            nodes.append(ExpertScale() if of.scale_dims == 1 else ChannelScale())
        if of.bias:
            nodes.append(Bias(of.bias))
        return GemmProblem(
            operand=operand,
            accumulation=Accumulation(accumulation or ACCUMULATIONS[operand][0]),
            out=out,
            n=n,
            k=k,
            num_experts=num_experts,
            gather=bool(last),
            epilogue=(*nodes, *last),
            weight_major=Major.N if of.n_major else Major.K,
        )

    gates = 2 if function.gated else 1
    return LayerProblems(
        route=RouteProblem(num_experts, id_bits),
        quantize_hidden=QuantizeProblem(outside, operand, hidden) if quantized else None,
        up=gemm(up, gates * inter, hidden, active, Activation(function, scale)),
        quantize_active=QuantizeProblem(active, operand, inter, 1 / scale) if quantized else None,
        down=gemm(down, hidden, inter, outside),
        combine=CombineProblem(outside, hidden, top_k),
    )


def problems_of(layer: Layer, options: LayerOptions) -> LayerProblems:
    """Of checked arguments of `fused_moe`."""
    num_experts, hidden, inter = layer.w2.shape

    def projection(weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Projection:
        return Projection(
            0 if scale is None else scale.dim(),
            None if bias is None else DTYPES[bias.dtype],
            is_n_major(weight),
        )

    return layer_problems(
        num_experts,
        layer.topk_ids.shape[1],
        hidden,
        inter,
        (DTYPES[layer.w2.dtype], DTYPES[layer.hidden.dtype]),
        options.activation,
        (
            projection(layer.w13, layer.w13_scale, layer.w13_bias),
            projection(layer.w2, layer.w2_scale, layer.w2_bias),
        ),
        options.accumulation,
        8 * layer.topk_ids.dtype.itemsize,
    )


def problems_of_shape(shape: MoeShape, dtype: str) -> LayerProblems:
    """Of a model's layer as `fused_moe` is called for it: bfloat16 outside, a scale a channel,
    int32 ids.

    dtype: as `shapes.problems` takes it.
    """
    operand = shapes.DTYPES[dtype]
    each = Projection(2 if operand.quantized else 0, DType.BF16 if shape.bias else None)
    return layer_problems(
        shape.num_experts,
        shape.top_k,
        shape.hidden,
        shape.inter,
        (operand, DType.BF16),
        shape.activation,
        (each, each),
    )
