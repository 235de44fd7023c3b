"""The arguments of the public ops, as keyword types and as the tuples that travel inside; dtypes.

op               keyword arguments    tensors          options
grouped_matmul   ProductArguments     Operands         Options
fused_moe        LayerArguments       LayerOperands    LayerOptions
topk_router      RouterArguments      -                Router
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from emitters.spec.dtypes import DType
from emitters.spec.epilogue import Activation, ActivationFunction
from emitters.spec.packing import Packing

if TYPE_CHECKING:
    from typing_extensions import Required

_TABLE = (  # torch's dtype, the kernels' dtype, and the name that users give it
    (torch.float8_e4m3fn, DType.E4M3, "fp8"),
    (torch.float8_e5m2, DType.E5M2, None),
    (torch.int8, DType.INT8, "int8"),
    (torch.bfloat16, DType.BF16, "bf16"),
    (torch.float16, DType.FP16, None),
    (torch.float32, DType.FP32, None),
)
DTYPES = {dtype: kernels for dtype, kernels, _ in _TABLE}
TORCH_DTYPES = {kernels: dtype for dtype, kernels, _ in _TABLE}
FP8_BLOCK = "fp8_block"  # e4m3 with scales that vary along K: 1 x 128, and 128 x 128 of weights
NAMED_DTYPES = {name: dtype for dtype, _, name in _TABLE if name}
NAMED_DTYPES[FP8_BLOCK] = torch.float8_e4m3fn
QUANTS = {name: dtype for name, dtype in NAMED_DTYPES.items() if dtype.itemsize == 1}
PACKINGS = tuple(map(str, Packing))  # names of the formats of packed 4-bit weights
FLOATS = tuple(dtype for dtype in DTYPES if dtype.is_floating_point and dtype.itemsize > 1)
IDS = (torch.int32, torch.int64)  # dtypes of expert ids


def padded(size: int, dtype: DType) -> int:
    """The least extent from `size` up that rows of this dtype may have: a multiple of 16 bytes.

    It decides wherever kernels need padding: for the inner size of experts, for K and for N.
    """
    multiple = 16 // dtype.bytes
    return -(-size // multiple) * multiple


class Numbers(NamedTuple):
    """The numbers of a clamped SwiGLU: g * sigmoid(alpha g) * (u + beta), g <= limit, |u| <= limit.

    The defaults are those of "swiglu_oai", which is gpt-oss's.
    """

    limit: float = 7.0
    alpha: float = 1.702
    beta: float = 1.0


def clamped_numbers(
    activation: str | None, limit: float | None, alpha: float | None, beta: float | None
) -> Numbers | None:
    """The numbers of an activation that is a clamped SwiGLU, else None.

    "swiglu_oai" is one, and so is "swiglu" if a number is given: its others are then those of a
    plain SwiGLU, limit infinity, alpha 1 and beta 0. Raises ValueError for numbers of another
    activation, and for a limit that is not positive.
    """
    given = {"limit": limit, "alpha": alpha, "beta": beta}
    given = {name: value for name, value in given.items() if value is not None}
    if activation == "swiglu_oai":
        numbers = Numbers()
    elif activation == "swiglu" and given:
        numbers = Numbers(math.inf, 1.0, 0.0)
    elif given:
        raise ValueError(
            f"activation must be 'swiglu' or 'swiglu_oai' where {', '.join(given)} is given, got "
            f"{activation!r}"
        )
    else:
        return None
    numbers = numbers._replace(**given)  # type: ignore[arg-type]
    if not numbers.limit > 0:
        raise ValueError(f"limit must be positive, got {numbers.limit}")
    return numbers


class ProductArguments(TypedDict, total=False):
    """The keyword arguments of `grouped_matmul`, for functions that take the same ones."""

    index: Tensor | None
    offsets: Required[Tensor]
    per_token_scale: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    activation: str | None
    interleaved: bool
    limit: float | None
    alpha: float | None
    beta: float | None
    starts: Tensor | None
    out_dtype: torch.dtype | None
    accumulation: str | None
    expected_rows: int | None
    num_sms: int | None
    schedule: str | None


class Operands(NamedTuple):
    """The tensors that a grouped GEMM reads; shapes and dtypes as in `grouped_matmul`."""

    x: Tensor
    weight: Tensor
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index
    offsets: Tensor
    per_token_scale: Tensor | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None
    starts: Tensor | None = None


class Options(NamedTuple):
    """The arguments of `grouped_matmul` that are not tensors, in the order of the op's schema."""

    out_dtype: torch.dtype | None = None
    accumulation: str | None = None
    expected_rows: float | None = None
    num_sms: int | None = None
    schedule: str | None = None
    activation: str | None = None
    interleaved: bool = False
    limit: float | None = None
    alpha: float | None = None
    beta: float | None = None

    @property
    def numbers(self) -> Numbers | None:
        """The numbers of a clamped SwiGLU; None for any other activation."""
        return clamped_numbers(self.activation, self.limit, self.alpha, self.beta)

    def activation_node(self, n_major: bool) -> Activation | None:
        """The activation as a node of the kernel's epilogue. n_major: whether weights are."""
        if self.activation is None:
            return None
        function = "swiglu_oai" if self.numbers is not None else self.activation
        return Activation(ActivationFunction(function), n_major and self.interleaved)


def split_product(
    x: Tensor, weight: Tensor, arguments: ProductArguments
) -> tuple[Operands, Options]:
    """Splits the arguments of `grouped_matmul` into tensors and options.

    Raises TypeError for a name that `grouped_matmul` does not take, and if offsets is missing.
    """
    options, tensors = _split(arguments, Options._fields, Operands._fields[2:])
    if "offsets" not in tensors:
        raise TypeError(
            "'offsets' must be given (int32 [E], the cumulative ends of the experts' rows), got "
            f"only {', '.join(['x', 'weight', *arguments])}"
        )
    return Operands(x, weight, **{"index": None, **tensors}), Options(**options)


class LayerArguments(TypedDict, total=False):
    """The keyword arguments of `fused_moe`, except `out` and `workspace`."""

    quant: str | None
    w13_scale: Tensor | None
    w2_scale: Tensor | None
    activation: str
    interleaved: bool
    w13_bias: Tensor | None
    w2_bias: Tensor | None
    expert_map: Tensor | None
    capacity_factor: float | None
    residual: Tensor | None
    accumulation: str | None
    limit: float | None
    alpha: float | None
    beta: float | None
    hidden_scale: Tensor | None
    active_scale: Tensor | None
    out_dtype: torch.dtype | None
    max_rows: int | None
    overflow: Tensor | None
    reduce: str
    weight_on_input: bool
    batch_invariant: bool
    pdl: bool


class Experts(NamedTuple):
    """The weights of a layer's experts, with scales and biases, as `fused_moe` takes them."""

    w13: Tensor
    w2: Tensor
    w13_scale: Tensor | None = None
    w2_scale: Tensor | None = None
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None

    def only(self, e: int) -> Experts:
        """The weights of expert e alone, as views [1, ...]."""
        return Experts(*(None if tensor is None else tensor[e : e + 1] for tensor in self))  # type: ignore


class LayerOperands(NamedTuple):
    """The tensors that a layer reads; shapes and dtypes as in `fused_moe`."""

    hidden: Tensor
    w13: Tensor
    w2: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    w13_scale: Tensor | None = None
    w2_scale: Tensor | None = None
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    expert_map: Tensor | None = None
    residual: Tensor | None = None
    hidden_scale: Tensor | None = None
    active_scale: Tensor | None = None
    overflow: Tensor | None = None

    @property
    def experts(self) -> Experts:
        return Experts(
            self.w13, self.w2, self.w13_scale, self.w2_scale, self.w13_bias, self.w2_bias
        )


class LayerOptions(NamedTuple):
    """The arguments of `fused_moe` that are not tensors, in the order of the op's schema."""

    quant: str | None = None
    activation: str = "swiglu"
    interleaved: bool = False
    capacity_factor: float | None = None
    accumulation: str | None = None
    pdl: bool = True
    limit: float | None = None
    alpha: float | None = None
    beta: float | None = None
    out_dtype: torch.dtype | None = None
    max_rows: int | None = None
    reduce: str = "sum"
    weight_on_input: bool = False
    batch_invariant: bool = False

    @property
    def numbers(self) -> Numbers | None:
        """The numbers of a clamped SwiGLU; None for any other activation."""
        return clamped_numbers(self.activation, self.limit, self.alpha, self.beta)

    @property
    def function(self) -> ActivationFunction:
        """The activation as kernels know it."""
        return ActivationFunction("swiglu_oai" if self.numbers else self.activation)

    def rows(self, pairs: int) -> int:
        """The most rows that the products have, of this many (token, choice) pairs."""
        return pairs if self.max_rows is None else min(pairs, self.max_rows)

    def outside(self, hidden: torch.dtype) -> torch.dtype:
        """The dtype of the layer's output, for hidden of this dtype."""
        if hidden.itemsize > 1:
            return hidden
        return self.out_dtype or torch.bfloat16


LAYER_SCHEMA = (  # of LayerOperands and LayerOptions, in the schemas of ops
    "Tensor hidden, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, "
    "Tensor? w13_scale, Tensor? w2_scale, Tensor? w13_bias, Tensor? w2_bias, Tensor? expert_map, "
    "Tensor? residual, Tensor? hidden_scale, Tensor? active_scale, Tensor? overflow, "
    "str? quant, str activation, bool interleaved, float? capacity_factor, str? accumulation, "
    "bool pdl, float? limit, float? alpha, float? beta, ScalarType? out_dtype, int? max_rows, "
    "str reduce, bool weight_on_input, bool batch_invariant"
)


def split_layer(
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    arguments: LayerArguments,
) -> tuple[LayerOperands, LayerOptions]:
    """Splits the arguments of `fused_moe` into tensors and options.

    Raises TypeError for a name that `fused_moe` does not take.
    """
    options, tensors = _split(arguments, LayerOptions._fields, LayerOperands._fields[5:])
    layer = LayerOperands(hidden, w13, w2, topk_weights, topk_ids, **tensors)
    return layer, LayerOptions(**options)


class RouterArguments(TypedDict, total=False):
    """The keyword arguments of `topk_router`, except `pdl`."""

    scoring: str
    renormalize: bool
    num_groups: int
    topk_groups: int
    correction_bias: Tensor | None
    scale: float
    threshold: float | None


class Router(NamedTuple):
    """The arguments of `topk_router` except logits and `pdl`, in the order of the op's schema."""

    k: int
    scoring: str = "softmax"
    renormalize: bool = True
    num_groups: int = 1
    topk_groups: int = 1
    correction_bias: Tensor | None = None
    scale: float = 1.0
    threshold: float | None = None


def _split(
    arguments: Any, options: tuple[str, ...], tensors: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits keyword arguments into options and tensors. Raises TypeError for other names."""
    options_given = {name: arguments[name] for name in options if name in arguments}
    tensors_given = {name: arguments[name] for name in tensors if name in arguments}
    if len(options_given) + len(tensors_given) < len(arguments):
        known = (*tensors, *options)
        wrong = next(name for name in arguments if name not in known)
        raise TypeError(f"a keyword argument must be one of {', '.join(known)}, got {wrong!r}")
    return options_given, tensors_given
