"""What calls hand over: tensors and options, and the table of dtypes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from emitters.spec.dtypes import DType
from emitters.spec.gemm import Activation, ActivationFunction

DTYPES = {
    torch.float8_e4m3fn: DType.E4M3,
    torch.float8_e5m2: DType.E5M2,
    torch.int8: DType.INT8,
    torch.bfloat16: DType.BF16,
    torch.float16: DType.FP16,
    torch.float32: DType.FP32,
}


class Operands(NamedTuple):
    """The tensors a grouped GEMM reads; shapes and dtypes as in `grouped_matmul`."""

    x: Tensor
    weight: Tensor
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index
    offsets: Tensor
    per_token_scale: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
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


QUANTS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


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


class LayerOptions(NamedTuple):
    quant: str | None = None
    activation: str = "swiglu"
    interleaved: bool = False
    capacity_factor: float | None = None
    accumulation: str | None = None
    pdl: bool = True
