"""The problems of a layer's kernels, and all that a model's kernels are built for."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from cutlass_moe.shapes import DTYPES, MoeShape
from emitters.legality import why_illegal
from emitters.problem import (
    ACCUMULATIONS,
    Accumulation,
    Activation,
    ActivationFunction,
    DType,
    GemmProblem,
    Major,
    make_epilogue,
)
from emitters.steps import (
    MAX_FUSED_EXPERTS,
    CombineProblem,
    Problem,
    QuantizeProblem,
    RouteLogitsProblem,
    RouteProblem,
    TopkProblem,
)

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

    def gemm(
        of: Projection, n: int, k: int, out: DType, node: Activation | None = None
    ) -> GemmProblem:
        return GemmProblem(
            operand=operand,
            accumulation=Accumulation(accumulation or ACCUMULATIONS[operand][0]),
            out=out,
            n=n,
            k=k,
            num_experts=num_experts,
            gather=node is not None,
            epilogue=make_epilogue(quantized, of.scale_dims, of.bias, node),
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


def problems_of_shape(shape: MoeShape, dtype: str) -> LayerProblems:
    """Of a model's layer as `fused_moe` is called for it: bfloat16 outside, a scale a channel, a
    bfloat16 bias, int32 ids, of which a token has those of all ranks.

    dtype: "fp8" (e4m3), "int8" or "bf16". Raises ValueError for another.
    """
    if dtype not in DTYPES:
        raise ValueError(f"expected a dtype of {', '.join(DTYPES)}, got {dtype!r}")
    operand = DTYPES[dtype]
    each = Projection(2 if operand.quantized else 0, DType.BF16 if shape.bias else None)
    return layer_problems(
        shape.num_experts,
        shape.routed.top_k,
        shape.hidden,
        shape.inter,
        (operand, DType.BF16),
        shape.activation,
        (each, each),
    )


def gemm_problems(shape: MoeShape, dtype: str) -> dict[str, GemmProblem]:
    """A model's grouped GEMMs: "up" (rows gathered) and "down" (rows in order), with bf16 output,
    and "activated", the up projection of `fused_moe`. Arguments as in `problems_of_shape`."""
    layer = problems_of_shape(shape, dtype)
    up = replace(layer.up, out=DType.BF16, epilogue=layer.up.epilogue[:-1])
    return {"up": up, "down": layer.down, "activated": layer.up}


def model_problems(shape: MoeShape, dtype: str) -> dict[str, Problem]:
    """All that a model's layer launches by `grouped_matmul`, `fused_moe`, `quantize_per_token` of
    bf16, and by `route`, `topk_router` and `route_logits` of bf16 or float32 logits, with the
    model's scoring and groups. Arguments as in `problems_of_shape`."""
    layer = problems_of_shape(shape, dtype)
    found: dict[str, Problem] = {**gemm_problems(shape, dtype), "combine": layer.combine}
    for bits in (32, 64):
        found[f"route int{bits}"] = replace(layer.route, id_bits=bits)
    for logits in (DType.BF16, DType.FP32):
        router = (shape.routed.num_experts, logits, shape.scoring, shape.num_groups)
        found[f"topk_router {logits}"] = TopkProblem(*router)
        if shape.routed.num_experts <= MAX_FUSED_EXPERTS and shape.all_ranks is None:
            found[f"route_logits {logits}"] = RouteLogitsProblem(*router)
    if layer.quantize_hidden and layer.quantize_active:
        found["quantize hidden"] = layer.quantize_hidden
        found["quantize activated"] = layer.quantize_active
        found["quantize inter"] = replace(layer.quantize_hidden, k=shape.inter)
    return found
