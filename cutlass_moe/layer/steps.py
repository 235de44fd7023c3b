"""The problems that a layer's kernels solve, one per launch."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from cutlass_moe.operands import padded
from emitters.spec.dtypes import ACCUMULATIONS, Accumulation, DType
from emitters.spec.epilogue import (
    Activation,
    ActivationFunction,
    ActivationGradient,
    make_epilogue,
)
from emitters.spec.gemm import GemmProblem, Granularity, Major, WeightFormat
from emitters.spec.layer_steps import (
    ActivateBackwardProblem,
    ActivateProblem,
    CombineProblem,
    QuantizeGroupsProblem,
    QuantizeProblem,
    RouteProblem,
)
from emitters.spec.packing import BLOCK_ROWS, Packing
from emitters.spec.registry import Problem, why_illegal
from emitters.spec.weight_grad import Side, WeightGradProblem

Quantize = QuantizeProblem | QuantizeGroupsProblem
MAJORS = {False: Major.K, True: Major.N}  # by whether N is dense
_THIN = 8  # the least columns of a product: 16 bytes


class LayerProblems(NamedTuple):
    """The problems of a layer, in the order of the launches; None for a launch that is not made."""

    route: RouteProblem
    quantize_hidden: Quantize | None
    up: GemmProblem
    quantize_active: Quantize | None
    # where experts have many rows, in place of these two: the product quantises its output itself
    quantized_up: GemmProblem | None
    down: GemmProblem
    combine: CombineProblem

    def why_illegal(self, arch: str) -> str | None:
        """The first reason why a kernel can't be built for `arch`, or None if all can be."""
        reasons = (why_illegal(problem, arch=arch) for problem in self if problem)
        return next(filter(None, reasons), None)

    def padded(self) -> LayerProblems:
        """The problems of the layer with weights that `pad_experts` has padded.

        Those of packed weights are padded to whole blocks of rows before they are packed.
        """
        hidden, inter = padded(self.down.n, DType.BF16), padded(self.down.k, self.down.x)
        if self.down.weight.packing:
            inter = -(-inter // BLOCK_ROWS) * BLOCK_ROWS
        tokens, active = self.quantize_hidden, self.quantize_active
        n, k = 2 * inter if self.up.gated else inter, padded(self.up.k, self.up.x)
        quantized = self.quantized_up
        return self._replace(
            quantize_hidden=None if tokens is None else quantize_rows(tokens, hidden),
            up=replace(self.up, n=n, k=k),
            quantized_up=None if quantized is None else replace(quantized, n=n, k=k),
            quantize_active=None if active is None else replace(active, k=inter),
            down=replace(self.down, n=hidden, k=inter),
            combine=replace(self.combine, n=hidden),
        )


def training_problems(layer: LayerProblems, interleaved: bool = False) -> dict[str, Problem]:
    """The problems of a layer's forward and backward in training, by what they compute.

    layer: the problems of the same layer without training, not quantised. interleaved: as in
    `fused_moe`. With few rows per expert, and where columns are interleaved, the activation and its
    gradient are kernels of their own.
    """
    up, down, combine, node = layer.up, layer.down, layer.combine, layer.up.activation
    assert node is not None
    rows = node.function, up.x, down.k, interleaved
    of_active = replace(_transposed(down), gather=True)
    found: dict[str, Problem] = {
        "route": layer.route,
        "up before activation": replace(up, epilogue=up.epilogue[:-1]),
        "activate": ActivateProblem(*rows),
        "down": down,
        "combine": replace(combine, out=combine.rows),
        "gradient of active": of_active,
        "activate backward": ActivateBackwardProblem(*rows),
        "gradient of rows": replace(_transposed(up), gather=False, out=down.out),
        "gradient of hidden": replace(combine, out=combine.rows, n=up.k, weights=DType.FP32),
        "gradient of w13": _weight_grad(up, Side.RIGHT),
        "gradient of w2": _weight_grad(down, Side.LEFT),
    }
    if not interleaved:
        found["up"] = with_stored_columns(up)
        found["gradient of up"] = with_gradient(of_active, node.function)
    if down.epilogue:  # sums over rows are products with thin rows
        sums = WeightGradProblem(up.x, DType.FP32, _THIN, up.n, up.num_experts)
        found["gradient of w13_bias"] = sums
        found["gradient of w2_bias"] = replace(sums, n=down.n, gathered=Side.RIGHT)
        thin = replace(down, n=_THIN, k=down.n, gather=True, epilogue=(), out=DType.FP32)
        found["w2_bias by weights"] = replace(thin, weight=WeightFormat(up.x))
    return found


def with_stored_columns(up: GemmProblem) -> GemmProblem:
    """The up projection that stores its columns before the activation too."""
    *nodes, node = up.epilogue
    assert isinstance(node, Activation)
    return replace(up, epilogue=(*nodes, replace(node, stored=True)))


def with_gradient(product: GemmProblem, function: ActivationFunction) -> GemmProblem:
    """The gradient of an activation's result that becomes that of its input."""
    return replace(product, epilogue=(ActivationGradient(function),))


def _transposed(problem: GemmProblem) -> GemmProblem:
    """The product with the transposed weights, which are read where they lie, to x's dtype."""
    major = Major.K if problem.weight.major is Major.N else Major.N
    weight = replace(problem.weight, major=major)
    return replace(problem, n=problem.k, k=problem.n, weight=weight, epilogue=(), out=problem.x)


def _weight_grad(product: GemmProblem, gathered: Side) -> WeightGradProblem:
    """The gradient of a product's weights [E, N, K]. gathered: the side, where K is dense."""
    n, k = product.n, product.k
    if product.weight.major is Major.N:
        n, k = k, n
        gathered = Side.LEFT if gathered is Side.RIGHT else Side.RIGHT
    return WeightGradProblem(product.x, product.x, n, k, product.num_experts, gathered)


def quantize_rows(problem: Quantize, k: int) -> Quantize:
    """The problem for rows of K values, which rows of 16 bytes take."""
    return replace(problem, k=k, padded=k % 16 != 0)


class LayerSizes(NamedTuple):
    """The sizes of a layer: E, k, H and I."""

    num_experts: int  # the experts that have weights here
    top_k: int
    hidden: int
    inter: int
    read: int | None = None  # K of the up projection, if it is padded; default H


class Projection(NamedTuple):
    """The properties of one of a layer's two products that follow from its tensors."""

    scale: Granularity | None = None  # of the weights
    bias: DType | None = None
    n_major: bool = False  # weights have N dense instead of K
    alternating: bool = False  # and their columns are gate, up, gate, up, ...
    packing: Packing | None = None  # of packed weights


class Forms(NamedTuple):
    """What else of a call's arguments decides a layer's problems."""

    id_bits: int = 32  # of topk_ids
    weights: DType = DType.FP32  # of topk_weights
    quantized_hidden: bool = False  # hidden has 8 bits already
    summed: bool = True  # a token's rows are summed; else each is an output


def layer_problems(
    sizes: LayerSizes,
    operand: DType,
    outside: DType,
    activation: str,
    up: Projection,
    down: Projection,
    accumulation: str | None = None,
    forms: Forms | None = None,
) -> LayerProblems:
    """The problems of a layer.

    What travels between its kernels has the range of float32, except the activation of a float16
    layer, which is the operand of its down projection. Until it is quantised, an activation is
    bfloat16, which adds at most 0.5% to the error of an int8 layer; with scales along K, where one
    product may quantise its float32 sums itself, it is float32. Where the output is float16, an
    expert's row can exceed it and the weighted sum not, so rows are float32.

    operand: the dtype of the rows that are multiplied and, unless they are packed, of the weights.
    outside: that of the layer's input and output; it equals operand unless the layer is quantised.
    """
    forms = forms or Forms()
    num_experts, top_k, hidden, inter, read = sizes
    quantized = operand.quantized
    function = ActivationFunction(activation)
    blocks = up.scale is not None and up.scale.rows is not None
    active = DType.FP32 if blocks else DType.BF16 if quantized else outside
    rows = DType.FP32 if outside is DType.FP16 else outside
    sums = Accumulation.TWO_LEVEL if blocks else ACCUMULATIONS[operand][0]
    x_scale = Granularity.TOKEN_BLOCK if blocks else Granularity.TOKEN if quantized else None

    def gemm(
        projection: Projection, n: int, k: int, out: DType, node: Activation | None = None
    ) -> GemmProblem:
        return GemmProblem(
            x=operand,
            weight=WeightFormat(projection.packing or operand, MAJORS[projection.n_major]),
            accumulation=Accumulation(accumulation or sums),
            out=out,
            n=n,
            k=k,
            num_experts=num_experts,
            gather=node is not None,
            x_scale=x_scale,
            weight_scale=projection.scale,
            epilogue=make_epilogue(projection.bias, node),
        )

    node = Activation(function, up.alternating)
    first = gemm(up, (1 + function.gated) * inter, read or hidden, active, node)
    tokens = _quantize(outside, operand, hidden, blocks, read not in (None, hidden))
    return LayerProblems(
        route=RouteProblem(num_experts, forms.id_bits),
        quantize_hidden=None if forms.quantized_hidden else tokens,
        up=first,
        quantize_active=_quantize(active, operand, inter, blocks),
        quantized_up=replace(first, out=operand) if blocks else None,
        down=gemm(down, hidden, inter, rows),
        combine=CombineProblem(rows, outside, hidden, top_k if forms.summed else 1, forms.weights),
    )


def _quantize(
    source: DType, target: DType, k: int, blocks: bool, padded: bool = False
) -> Quantize | None:
    """The quantisation of rows to 8 bits, if `target` has them; blocks: a scale per 128 of K."""
    if not target.quantized:
        return None
    if blocks:
        return QuantizeGroupsProblem(source, target, k, padded)
    return QuantizeProblem(source, target, k, padded)
