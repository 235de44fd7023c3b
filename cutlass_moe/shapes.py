"""Named shapes of mixture-of-experts layers that people run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from emitters.problem import (
    ACCUMULATIONS,
    Activation,
    ActivationFunction,
    Bias,
    ChannelScale,
    DType,
    GemmProblem,
    PerTokenScale,
)

DTYPES = {"fp8": DType.E4M3, "int8": DType.INT8, "bf16": DType.BF16}  # as users call them
# Activations are kept as float16 until they are quantised: bfloat16 there costs 8e-3 relative error
# of the layer's output, float16 3.6e-3. Times this they overflow at 2 million, not at 65504.
ACTIVATION_SCALE = 1 / 32


class Gemm(NamedTuple):
    """One expert's matrix product: N columns of output, K of input."""

    n: int
    k: int


@dataclass(frozen=True)
class MoeShape:
    """hidden: width of the layer's input and output; inter: width between the projections, of one
    expert; bias: whether both projections have one; activation: as in `grouped_matmul`. Raises
    ValueError for values of other types, sizes below 1 and unknown activations."""

    name: str
    num_experts: int
    top_k: int
    hidden: int
    inter: int
    bias: bool = False
    activation: str = "swiglu"

    def __post_init__(self) -> None:
        for field in ("num_experts", "top_k", "hidden", "inter"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise ValueError(f"{self.name}: {field} must be a positive integer, got {value!r}")
        if type(self.name) is not str or type(self.bias) is not bool:
            raise ValueError(f"expected a string as name and a bool as bias, got {self}")
        names = tuple(map(str, ActivationFunction))
        if self.activation not in names:
            expected = ", ".join(names)
            raise ValueError(
                f"{self.name}: activation must be one of {expected}, got {self.activation!r}"
            )

    def shard(self, tp: int = 1, ep: int = 1) -> MoeShape:
        """What one rank holds of the layer: 1 / tp of each expert's inter, 1 / ep of the experts.

        Its top_k is the mean number of local experts a token visits, rounded down, at least 1.
        Raises ValueError where tp or ep does not divide.
        """
        if self.inter % tp:
            raise ValueError(f"{self.name}: tp {tp} does not divide inter {self.inter}")
        if self.num_experts % ep:
            raise ValueError(f"{self.name}: ep {ep} does not divide {self.num_experts} experts")
        return replace(
            self,
            name=self.name + (f"-tp{tp}" if tp > 1 else "") + (f"-ep{ep}" if ep > 1 else ""),
            num_experts=self.num_experts // ep,
            top_k=max(1, self.top_k // ep),
            inter=self.inter // tp,
        )

    @property
    def gemms(self) -> dict[str, Gemm]:
        """up makes the activation's columns from a token, down makes a token from its result."""
        columns = 2 * self.inter if ActivationFunction(self.activation).gated else self.inter
        return {"up": Gemm(columns, self.hidden), "down": Gemm(self.hidden, self.inter)}


MODELS: dict[str, MoeShape] = {
    shape.name: shape
    for shape in (
        MoeShape("qwen3-30b", 128, 8, 2048, 768),
        MoeShape("qwen3-235b", 128, 8, 4096, 1536),
        MoeShape("qwen3-next", 512, 10, 2048, 512),
        MoeShape("mixtral", 8, 2, 4096, 14336),
        MoeShape("dsv3", 256, 8, 7168, 2048),
        MoeShape(
            "dsv3-ep8", 32, 1, 7168, 2048
        ),  # one of 8 ranks: a token visits about one local expert
        MoeShape("dsv2-lite", 64, 6, 2048, 1408),
        MoeShape("kimi-k2", 384, 8, 7168, 2048),
        MoeShape("glm-4.5-air", 128, 8, 4096, 1408),
        MoeShape("llama4-maverick", 128, 1, 5120, 8192),
        MoeShape("gpt-oss-120b", 128, 4, 2880, 2880, bias=True, activation="swiglu_oai"),
    )
}


def problems(shape: MoeShape, dtype: str) -> dict[str, GemmProblem]:
    """The layer's problems: "up" (rows gathered) and "down" (rows in order), with bf16 output, and
    "activated", up with the activation, whose output is fp16 times ACTIVATION_SCALE where 8-bit.

    dtype: "fp8" (e4m3), "int8" or "bf16"; the 8-bit ones have a per-token and a per-channel scale.
    A bias is bf16; of the ranks that share an expert, all but one give zeros to the sum of down.
    Raises ValueError for another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"expected a dtype of {', '.join(DTYPES)}, got {dtype!r}")
    operand = DTYPES[dtype]
    scales = (PerTokenScale(), ChannelScale()) if operand.quantized else ()
    epilogue = (*scales, *((Bias(DType.BF16),) if shape.bias else ()))
    found = {
        name: GemmProblem(
            operand=operand,
            accumulation=ACCUMULATIONS[operand][0],
            out=DType.BF16,
            n=gemm.n,
            k=gemm.k,
            num_experts=shape.num_experts,
            gather=name == "up",
            epilogue=epilogue,
        )
        for name, gemm in shape.gemms.items()
    }
    scale = ACTIVATION_SCALE if operand.quantized else 1.0
    activation = Activation(ActivationFunction(shape.activation), scale)
    out = DType.FP16 if operand.quantized else DType.BF16
    found["activated"] = replace(found["up"], out=out, epilogue=(*epilogue, activation))
    return found
