"""What calls hand over: tensors and options, by keyword and as what travels inside; dtypes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from emitters.spec.dtypes import DType
from emitters.spec.gemm import Activation, ActivationFunction

if TYPE_CHECKING:
    from typing_extensions import Required

_TABLE = (  # torch's dtype, the kernels', and what users call it as that of a layer
    (torch.float8_e4m3fn, DType.E4M3, "fp8"),
    (torch.float8_e5m2, DType.E5M2, None),
    (torch.int8, DType.INT8, "int8"),
    (torch.bfloat16, DType.BF16, "bf16"),
    (torch.float16, DType.FP16, None),
    (torch.float32, DType.FP32, None),
)
DTYPES = {dtype: kernels for dtype, kernels, _ in _TABLE}
TORCH_DTYPES = {kernels: dtype for dtype, kernels, _ in _TABLE}
NAMED_DTYPES = {name: dtype for dtype, _, name in _TABLE if name}
QUANTS = {name: dtype for name, dtype in NAMED_DTYPES.items() if dtype.itemsize == 1}
FLOATS = tuple(dtype for dtype in DTYPES if dtype.is_floating_point and dtype.itemsize > 1)
IDS = (torch.int32, torch.int64)  # of experts


class ProductArguments(TypedDict, total=False):
    """Arguments of `grouped_matmul` by keyword, for functions that take the same."""

    index: Tensor | None
    offsets: Required[Tensor]
    per_token_scale: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    activation: str | None
    interleaved: bool
    starts: Tensor | None
    out_dtype: torch.dtype | None
    accumulation: str | None
    expected_rows: int | None
    num_sms: int | None
    schedule: str | None


class Operands(NamedTuple):
    """The tensors a grouped GEMM reads; shapes and dtypes as in `grouped_matmul`."""

    x: Tensor
    weight: Tensor
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index
    offsets: Tensor
    per_token_scale: Tensor | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None
    starts: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows of the product."""
        return self.x.shape[0] if self.index is None else self.index.shape[0]


class Options(NamedTuple):
    """What a call may ask for besides its tensors, in the order of the op's schema."""

    out_dtype: torch.dtype | None = None
    accumulation: str | None = None
    expected_rows: float | None = None
    num_sms: int | None = None
    schedule: str | None = None
    activation: str | None = None
    interleaved: bool = False

    @property
    def activation_node(self) -> Activation | None:
        return Activation(ActivationFunction(self.activation)) if self.activation else None


def split_product(
    x: Tensor, weight: Tensor, arguments: ProductArguments
) -> tuple[Operands, Options]:
    """Raises TypeError for a name that `grouped_matmul` does not take, and without offsets."""
    options, tensors = _split(arguments, Options._fields, Operands._fields[2:])
    if "offsets" not in tensors:
        raise TypeError("'offsets' must be given, the cumulative ends of the experts' rows")
    return Operands(x, weight, **{"index": None, **tensors}), Options(**options)


class LayerArguments(TypedDict, total=False):
    """Arguments of `fused_moe` by keyword, but for its memory, `out` and `workspace`."""

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
    pdl: bool


class Experts(NamedTuple):
    """Weights of a layer's experts, as `fused_moe` takes them."""

    w13: Tensor
    w2: Tensor
    w13_scale: Tensor | None = None
    w2_scale: Tensor | None = None
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None

    def only(self, e: int) -> Experts:
        """Those of one expert."""
        return Experts(*(None if tensor is None else tensor[e : e + 1] for tensor in self))  # type: ignore


class LayerOperands(NamedTuple):
    """The tensors of a layer; shapes and dtypes as in `fused_moe`."""

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

    @property
    def experts(self) -> Experts:
        return Experts(
            self.w13, self.w2, self.w13_scale, self.w2_scale, self.w13_bias, self.w2_bias
        )


class LayerOptions(NamedTuple):
    """What a layer may be asked for besides its tensors, in the order of the op's schema."""

    quant: str | None = None
    activation: str = "swiglu"
    interleaved: bool = False
    capacity_factor: float | None = None
    accumulation: str | None = None
    pdl: bool = True


def split_layer(
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    arguments: LayerArguments,
) -> tuple[LayerOperands, LayerOptions]:
    """Raises TypeError for a name that `fused_moe` does not take."""
    options, tensors = _split(arguments, LayerOptions._fields, LayerOperands._fields[5:])
    layer = LayerOperands(hidden, w13, w2, topk_weights, topk_ids, **tensors)
    return layer, LayerOptions(**options)


class RouterArguments(TypedDict, total=False):
    """Arguments of `topk_router` by keyword, but for `pdl`."""

    scoring: str
    renormalize: bool
    num_groups: int
    topk_groups: int
    correction_bias: Tensor | None
    scale: float
    threshold: float | None


class Router(NamedTuple):
    """What a router does with logits, in the order of the ops' schemas; see `topk_router`."""

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
    """Options and tensors among keyword arguments. Raises TypeError for other names."""
    chosen = {name: arguments[name] for name in options if name in arguments}
    given = {name: arguments[name] for name in tensors if name in arguments}
    if len(chosen) + len(given) < len(arguments):
        known = (*tensors, *options)
        wrong = next(name for name in arguments if name not in known)
        raise TypeError(f"an argument by name must be one of {', '.join(known)}, got {wrong!r}")
    return chosen, given
