"""Whole layers and chains of them: cases, and the least time a GPU could take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cutlass_moe.models.shapes import MODELS, MoeShape
from perf.cases import BenchCase
from perf.machine import Ceilings
from perf.product.cases import ProductCase

LAYER_TOKENS = (1, 16, 128, 1024, 8192)
CHAIN_MODEL = "qwen3-30b"
CHAIN_TOKENS = (1, 2, 4, 16, 32)
CHAIN_LAYERS = 8
CHAIN_DTYPES = ("fp8", "int8")
ACTIVATION = "swiglu"
ROUTE_REFERENCE = "route_torch"  # a step that ours is held against
HIDDEN_BYTES = 2  # bf16: the layer's input and output


@dataclass(frozen=True)
class MoeLayerCase(BenchCase):
    """SwiGLU layers of a model, one after another, from hidden bf16 [T, H] to as much.

    suite "layer": one layer, its expert ids given. suite "chain": `layers` of them, each with
    weights of its own and with router logits, from which a kernel makes its ids; each adds its
    input to its output, as models do. What 8-bit weights multiply is quantised per token.
    """

    layers: int = 1

    @property
    def shape(self) -> MoeShape:
        return MODELS[self.model]

    @property
    def quant(self) -> str | None:
        """As `fused_moe` takes it."""
        return self.dtype if self.element.quantized else None

    @property
    def rows(self) -> int:
        return self.tokens * self.shape.top_k

    @property
    def up(self) -> ProductCase:
        """The up projection as a case of its own: what draws the layer's routing."""
        shape = self.shape
        n, k = shape.gemms["up"]
        return ProductCase(
            self.suite, self.model, self.dtype, self.tokens, "up", shape.num_experts, shape.top_k,
            n, k,
        )  # fmt: skip


def layer_cases(models: Iterable[str], dtypes: Iterable[str]) -> list[MoeLayerCase]:
    return [
        MoeLayerCase("layer", model, dtype, tokens)
        for dtype in dtypes
        for model in models
        for tokens in LAYER_TOKENS
    ]


def chain_cases(dtypes: Iterable[str]) -> list[MoeLayerCase]:
    return [
        MoeLayerCase("chain", CHAIN_MODEL, dtype, tokens, CHAIN_LAYERS)
        for dtype in dtypes
        for tokens in CHAIN_TOKENS
    ]


def layer_floor_us(case: MoeLayerCase, active_experts: int, ceilings: Ceilings) -> float:
    """Of all the case's layers: the longer of reading the active experts' weights and the hidden
    states, in and out, and of doing the products at the dense rate. active_experts: their sum."""
    shape = case.shape
    elements = 3 * shape.hidden * shape.inter
    hidden = 2 * case.layers * case.tokens * shape.hidden * HIDDEN_BYTES
    moved = active_experts * elements * case.element.bytes + hidden
    flops = 2 * case.layers * case.rows * elements
    return max(moved / (ceilings.read_gbs * 1e3), flops / (ceilings.tflops(case.dtype) * 1e6))
