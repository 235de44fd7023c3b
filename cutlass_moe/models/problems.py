"""The problems of a layer's kernels, and all that a model's kernels are built for."""

from __future__ import annotations

from dataclasses import replace

from cutlass_moe.layer.steps import (
    LayerProblems,
    LayerSizes,
    Projection,
    layer_problems,
    training_problems,
)
from cutlass_moe.models.shapes import DTYPES, MoeShape
from cutlass_moe.operands import FP8_BLOCK, PACKINGS
from cutlass_moe.ops.block_scales import BLOCKS
from emitters.spec.dtypes import DType
from emitters.spec.epilogue import ActivationFunction
from emitters.spec.gemm import GemmProblem, Granularity, Major, block_count
from emitters.spec.layer_steps import (
    MAX_FUSED_EXPERTS,
    RouteLogitsProblem,
    TopkProblem,
)
from emitters.spec.packing import Packing
from emitters.spec.registry import Problem
from emitters.spec.weight_grad import WeightGradProblem


def problems_of_shape(shape: MoeShape, dtype: str) -> LayerProblems:
    """Of a model's layer as `fused_moe` is called for it: bfloat16 outside, a scale a channel, a
    bfloat16 bias, int32 ids, of which a token has those of all ranks. Where no kernel takes rows of
    inter or hidden, the layer is that of `pad_experts`.

    dtype: "fp8" (e4m3), "fp8_block" (scales of 128 x 128 blocks; where a rank's share cuts blocks
    of inter, of the 64 or 32 rows that divide it), "int8", "bf16", or "int4_g128", "int4_g32" or
    "mxfp4" (packed weights, bfloat16 activations). Raises ValueError for
    another, and for a shape whose activation no kernel has.
    """
    if shape.activation is None:
        raise ValueError(f"{shape.name}: no kernel has its experts' activation")
    if dtype not in DTYPES:
        raise ValueError(f"expected a dtype of {', '.join(DTYPES)}, got {dtype!r}")
    operand = DTYPES[dtype]
    scale = Granularity.CHANNEL if operand.quantized else None
    up = down = Projection(scale, DType.BF16 if shape.bias else None)
    if dtype in PACKINGS:
        up, down = (one._replace(packing=Packing(dtype)) for one in (up, down))
    if dtype == FP8_BLOCK:
        gated = ActivationFunction(shape.activation).gated
        up = up._replace(scale=_blocks(shape.gemms["up"].n, shape.inter, gated))
        down = down._replace(scale=Granularity.BLOCK_128)
    return layer_problems(
        LayerSizes(shape.num_experts, shape.routed.top_k, shape.hidden, shape.inter),
        operand,
        DType.BF16,
        shape.activation,
        up,
        down,
    ).padded()


def block_rows(inter: int) -> int:
    """The rows of blocks of scales that divide the inner size, or a rank's share of it."""
    return next((rows for rows in BLOCKS if inter % rows == 0), 128)


def _blocks(n: int, inter: int, gated: bool) -> Granularity:
    """The granularity that a call poses with the scales of an up projection [N, K].

    As `block_granularity` takes it: of those with as many blocks, the one with the most rows.
    """
    count = block_count(n, block_rows(inter), gated)
    return next(one for rows, one in BLOCKS.items() if block_count(n, rows, gated) == count)


def gemm_problems(shape: MoeShape, dtype: str) -> dict[str, GemmProblem]:
    """A model's grouped GEMMs: "up" (rows gathered) and "down" (rows in order), with bf16 output,
    and, where a kernel has the activation, "activated", the up projection with it. dtype as in
    `problems_of_shape`."""
    layer = problems_of_shape(_with_activation(shape), dtype)
    up = replace(layer.up, out=DType.BF16, epilogue=layer.up.epilogue[:-1])
    if dtype == FP8_BLOCK:
        up = replace(up, weight_scale=_blocks(up.n, shape.inter, gated=False))
    products = {"up": up, "down": layer.down}
    if shape.activation is not None:
        products["activated"] = replace(layer.up, out=DType.BF16)
    return products


def weight_grad_problems(shape: MoeShape, dtype: str) -> dict[str, Problem]:
    """The gradients of a model's weights by `grouped_weight_grad`, where they can be trained.

    Each is written in bfloat16, and added to a float32 gradient; of weights with K dense, as
    `fused_moe` has them by default, and with N dense, as the modules of `cutlass_moe.nn` have them.
    Raises ValueError unless dtype is "bf16".
    """
    if dtype != "bf16":
        raise ValueError(f"gradients of weights are those of bf16 weights, got {dtype!r}")
    layer = problems_of_shape(_with_activation(shape), dtype)
    found: dict[str, Problem] = {}
    for major in Major:
        trained = _trained(layer, major)
        for name, weight in (("up", "w13"), ("down", "w2")):
            written = trained[f"gradient of {weight}"]
            assert isinstance(written, WeightGradProblem)
            added = replace(written, out=DType.FP32, accumulate=True)
            found[f"{name} gradient {major}"] = written
            found[f"{name} gradient {major} added"] = added
    return found


def model_problems(shape: MoeShape, dtype: str, training: bool = False) -> dict[str, Problem]:
    """All that a model's layer launches by `grouped_matmul`, `fused_moe`, `quantize_per_token` of
    bf16, by `combine` with bf16 or float32 weights, `route`, and by `topk_router` and
    `route_logits` of bf16 or float32 logits, with the model's scoring and groups. What only an
    activation or a scoring that no kernel has would launch is left out. dtype as in
    `problems_of_shape`. training: what `fused_moe` launches for gradients too, of weights with K
    dense and, as the modules of `cutlass_moe.nn` have them, with N dense."""
    layer = problems_of_shape(_with_activation(shape), dtype)
    found: dict[str, Problem] = {**gemm_problems(shape, dtype)}
    for weights in (layer.combine.out, DType.FP32):
        found[f"combine {weights}"] = replace(layer.combine, weights=weights)
    for bits in (32, 64):
        found[f"route int{bits}"] = replace(layer.route, id_bits=bits)
    for logits in (DType.BF16, DType.FP32):
        if shape.scoring is None:
            break
        router = (shape.routed.num_experts, logits, shape.scoring, shape.num_groups)
        found[f"topk_router {logits}"] = TopkProblem(*router)
        if shape.routed.num_experts <= MAX_FUSED_EXPERTS and shape.all_ranks is None:
            found[f"route_logits {logits}"] = RouteLogitsProblem(*router)
    if layer.quantize_hidden and layer.quantize_active:
        found["quantize hidden"] = layer.quantize_hidden
        found["quantize inter"] = layer.quantize_active
    if layer.quantized_up and shape.activation:  # a layer's up projection, by its rows
        found["activated, few rows"] = layer.up
        found["activated, quantised"] = layer.quantized_up
    if training:
        found |= weight_grad_problems(shape, dtype)
        for major in Major:
            for name, problem in _trained(layer, major).items():
                if problem not in found.values():
                    found[f"training, {major} dense: {name}"] = problem
    return found


def _trained(layer: LayerProblems, major: Major) -> dict[str, Problem]:
    """The problems of a layer's forward and backward, for weights with this dimension dense."""
    up, down = (
        replace(product, weight=replace(product.weight, major=major))
        for product in (layer.up, layer.down)
    )
    combine = replace(layer.combine, weights=DType.FP32)
    return training_problems(layer._replace(up=up, down=down, combine=combine))


def _with_activation(shape: MoeShape) -> MoeShape:
    """With an activation that has as many columns, where it has none."""
    if shape.activation is not None:
        return shape
    return replace(shape, activation="swiglu" if shape.gated else "silu")
