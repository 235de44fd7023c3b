"""Named shapes of mixture-of-experts layers that people run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from cutlass_moe import operands
from emitters.spec.dtypes import DType
from emitters.spec.epilogue import ActivationFunction
from emitters.spec.layer_steps import SCORINGS
from emitters.spec.packing import BLOCK_ROWS

DTYPES = {name: operands.DTYPES[dtype] for name, dtype in operands.NAMED_DTYPES.items()}
DTYPES |= dict.fromkeys(operands.PACKINGS, DType.BF16)  # of packed 4-bit weights, x's
FP8_BLOCK, PACKINGS = operands.FP8_BLOCK, operands.PACKINGS  # some of their names
DEFAULT_DTYPE = "fp8"  # of a model that asks for none
FUNCTIONS = tuple(map(str, ActivationFunction))
CLAMPED = str(ActivationFunction.SWIGLU_OAI)
CLAMPED_NUMBERS = tuple(operands.Numbers())  # limit, alpha and beta where none are given


def padded_size(size: int, dtype: str) -> int:
    """The least inter or hidden from this size up that kernels take, for one of DTYPES."""
    if dtype in PACKINGS:
        return -(-size // BLOCK_ROWS) * BLOCK_ROWS
    return operands.padded(size, DTYPES[dtype])


class Gemm(NamedTuple):
    """One expert's matrix product: N columns of output, K of input."""

    n: int
    k: int


class Routed(NamedTuple):
    """What a router sees of a layer: all ranks' experts, and how many a token chooses of them."""

    num_experts: int
    top_k: int


@dataclass(frozen=True)
class MoeShape:
    """hidden: width of the layer's input and output; inter: width between the projections, of one
    expert; bias: whether both projections have one; activation: as in `grouped_matmul`, or None
    where no kernel has it, and then gated says whether the up projection makes two columns for one;
    scoring and num_groups: the router's, as in `topk_router`, scoring None where that has it not;
    all_ranks: where the router sees more experts, other ranks' above all.

    Raises ValueError for values of other types, sizes below 1, unknown names and groups that do
    not divide."""

    name: str
    num_experts: int
    top_k: int
    hidden: int
    inter: int
    bias: bool = False
    activation: str | None = "swiglu"
    scoring: str | None = "softmax"
    num_groups: int = 1
    all_ranks: Routed | None = None
    gated: bool = True  # read where activation is None alone

    def __post_init__(self) -> None:
        for field in ("num_experts", "top_k", "hidden", "inter", "num_groups"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise ValueError(f"{self.name}: {field} must be a positive integer, got {value!r}")
        if type(self.name) is not str or type(self.bias) is not bool:
            raise ValueError(f"expected a string as name and a bool as bias, got {self}")
        for field, names in (("activation", FUNCTIONS), ("scoring", SCORINGS)):
            value = getattr(self, field)
            if value is not None and value not in names:
                expected = ", ".join(names)
                raise ValueError(f"{self.name}: {field} must be one of {expected}, got {value!r}")
        if self.routed.num_experts % self.num_groups:
            raise ValueError(
                f"{self.name}: num_groups {self.num_groups} does not divide "
                f"{self.routed.num_experts} experts"
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
            all_ranks=self.routed if ep > 1 else self.all_ranks,
        )

    def padded(self, dtype: str) -> MoeShape:
        """The shape with the inter that kernels take for weights of this dtype, one of DTYPES.

        `cutlass_moe.pad_experts` makes such weights of others; those to be packed must be padded
        before.
        """
        return replace(self, inter=padded_size(self.inter, dtype))

    @property
    def routed(self) -> Routed:
        """The experts that tokens choose among, and how many each chooses."""
        return self.all_ranks or Routed(self.num_experts, self.top_k)

    @property
    def gemms(self) -> dict[str, Gemm]:
        """up makes the activation's columns from a token, down makes a token from its result."""
        gated = self.gated
        if self.activation is not None:
            gated = ActivationFunction(self.activation).gated
        columns = 2 * self.inter if gated else self.inter
        return {"up": Gemm(columns, self.hidden), "down": Gemm(self.hidden, self.inter)}


MODELS: dict[str, MoeShape] = {
    shape.name: shape
    for shape in (
        MoeShape("qwen3-30b", 128, 8, 2048, 768),
        MoeShape("qwen3-235b", 128, 8, 4096, 1536),
        MoeShape("qwen3-next", 512, 10, 2048, 512),
        MoeShape("mixtral", 8, 2, 4096, 14336),
        MoeShape("dsv3", 256, 8, 7168, 2048, scoring="sigmoid", num_groups=8),
        # one of 8 ranks: a token visits about one local expert
        MoeShape(
            "dsv3-ep8",
            32,
            1,
            7168,
            2048,
            scoring="sigmoid",
            num_groups=8,
            all_ranks=Routed(256, 8),
        ),  # fmt: skip
        MoeShape("dsv2-lite", 64, 6, 2048, 1408),
        MoeShape("kimi-k2", 384, 8, 7168, 2048, scoring="sigmoid"),
        MoeShape("glm-4.5-air", 128, 8, 4096, 1408, scoring="sigmoid"),
        MoeShape("llama4-maverick", 128, 1, 5120, 8192, scoring="sigmoid"),
        MoeShape("gpt-oss-120b", 128, 4, 2880, 2880, bias=True, activation="swiglu_oai"),
        MoeShape("gpt-oss-20b", 32, 4, 2880, 2880, bias=True, activation="swiglu_oai"),
    )
}
