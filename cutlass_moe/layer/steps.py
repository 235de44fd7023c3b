"""The problems of a layer's kernels."""

from __future__ import annotations

from typing import NamedTuple

from emitters.spec.dtypes import ACCUMULATIONS, Accumulation, DType
from emitters.spec.gemm import (
    Activation,
    ActivationFunction,
    GemmProblem,
    Granularity,
    Major,
    WeightFormat,
    make_epilogue,
    weight_granularity,
)
from emitters.spec.layer_steps import (
    CombineProblem,
    QuantizeProblem,
    RouteProblem,
)
from emitters.spec.registry import why_illegal

# Activations are kept as float16 until they are quantised: bfloat16 there costs 8e-3 relative error
# of the layer's output, float16 3.6e-3. Times this they overflow at 2 million, not at 65504.
ACTIVATION_SCALE = 1 / 32


class LayerProblems(NamedTuple):
    """In the order of the launches."""

    route: RouteProblem
    quantize_hidden: QuantizeProblem | None
    up: GemmProblem
    quantize_active: QuantizeProblem | None
    down: GemmProblem
    combine: CombineProblem

    def why_illegal(self, arch: str) -> str | None:
        """None where every kernel can be built, else the first reason."""
        reasons = (why_illegal(problem, arch=arch) for problem in self if problem)
        return next(filter(None, reasons), None)


class LayerSizes(NamedTuple):
    num_experts: int  # of the weights
    top_k: int
    hidden: int
    inter: int


class Projection(NamedTuple):
    """What a layer's tensors say of one of its two products."""

    scale_dims: int = 0  # of its scale; 0 without one
    bias: DType | None = None
    n_major: bool = False


def layer_problems(
    sizes: LayerSizes,
    operand: DType,
    outside: DType,
    activation: str,
    up: Projection,
    down: Projection,
    accumulation: str | None = None,
    id_bits: int = 32,
) -> LayerProblems:
    """operand: what the products' weights and rows hold; outside: the layer's input and output, the
    same without quantisation."""
    num_experts, top_k, hidden, inter = sizes
    quantized = operand.quantized
    function = ActivationFunction(activation)
    active = DType.FP16 if quantized else outside
    scale = ACTIVATION_SCALE if quantized else 1.0

    def gemm(
        of: Projection, n: int, k: int, out: DType, node: Activation | None = None
    ) -> GemmProblem:
        return GemmProblem(
            x=operand,
            weight=WeightFormat(operand, Major.N if of.n_major else Major.K),
            accumulation=Accumulation(accumulation or ACCUMULATIONS[operand][0]),
            out=out,
            n=n,
            k=k,
            num_experts=num_experts,
            gather=node is not None,
            x_scale=Granularity.TOKEN if quantized else None,
            weight_scale=weight_granularity(of.scale_dims),
            epilogue=make_epilogue(of.bias, node),
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
