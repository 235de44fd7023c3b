"""What is asked: everything that changes the numbers a kernel computes."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar


class Name(str, enum.Enum):
    """An enum that prints and serialises as its value."""

    def __str__(self) -> str:
        return str(self.value)


class DType(Name):
    """Element types of operands and outputs."""

    E4M3 = "e4m3"
    E5M2 = "e5m2"
    INT8 = "int8"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    @property
    def bytes(self) -> int:
        return _BYTES[self]

    @property
    def quantized(self) -> bool:
        """Values mean something only together with a scale."""
        return self.bytes == 1


_BYTES = {
    DType.E4M3: 1,
    DType.E5M2: 1,
    DType.INT8: 1,
    DType.BF16: 2,
    DType.FP16: 2,
    DType.FP32: 4,
}


class Accumulation(Name):
    """How products are summed along K."""

    FAST = "fast"  # fp8 inside the tensor core, about 14 bits
    TWO_LEVEL = "two_level"  # fp8, promoted to fp32 registers after every 128 bytes of K
    FP32 = "fp32"  # bf16 and fp16
    INT32 = "int32"  # int8, exact


ACCUMULATIONS: dict[DType, tuple[Accumulation, ...]] = {  # the first is the default
    DType.E4M3: (Accumulation.FAST, Accumulation.TWO_LEVEL),
    DType.E5M2: (Accumulation.FAST, Accumulation.TWO_LEVEL),
    DType.INT8: (Accumulation.INT32,),
    DType.BF16: (Accumulation.FP32,),
    DType.FP16: (Accumulation.FP32,),
}
OUTPUTS = (DType.BF16, DType.FP16, DType.FP32)


class WeightStorage(Name):
    """How the kernel finds an expert's weights."""

    STACKED = "stacked"  # one [E, N, K] tensor, any strides but K's
    TABLE = "table"  # one [N, K] tensor per expert: a table of E tensor maps in global memory


@dataclass(frozen=True)
class PerTokenScale:
    """Multiplies a row by per_token_scale[token]: float32 [T], read through the same index as x."""

    kind: ClassVar[str] = "per_token_scale"


@dataclass(frozen=True)
class ChannelScale:
    """Multiplies column n of expert e by scale[e, n]: float32 [E, N]."""

    kind: ClassVar[str] = "channel_scale"


@dataclass(frozen=True)
class ExpertScale:
    """Multiplies every column of expert e by scale[e]: float32 [E]."""

    kind: ClassVar[str] = "expert_scale"


@dataclass(frozen=True)
class Bias:
    """Adds bias[e, n]: [E, N] of `dtype`."""

    dtype: DType
    kind: ClassVar[str] = "bias"


EpilogueNode = PerTokenScale | ChannelScale | ExpertScale | Bias
_NODES: dict[str, type] = {c.kind: c for c in (PerTokenScale, ChannelScale, ExpertScale, Bias)}


@dataclass(frozen=True)
class GemmProblem:
    """out[r, n] = epilogue(sum_k x[index[r], k] * weight[e(r), n, k]), rows r sorted by expert e.

    x [T, K] and weight [E, N, K] hold `operand`, out [rows, N] holds `out`. Without `gather`, row
    r of the product reads row r of x. The epilogue's nodes are applied in order, in float32,
    before the conversion to `out`. T, the number of rows and the routing are not part of a
    problem.
    """

    operand: DType
    accumulation: Accumulation
    out: DType
    n: int
    k: int
    num_experts: int
    gather: bool
    epilogue: tuple[EpilogueNode, ...] = ()
    weights: WeightStorage = WeightStorage.STACKED
    op: ClassVar[str] = "grouped_gemm"

    def __post_init__(self) -> None:
        # hashed at every call of the op: computed once
        object.__setattr__(self, "_hash", hash(tuple(getattr(self, f.name) for f in fields(self))))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def to_json(self) -> dict[str, Any]:
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["epilogue"] = [{"kind": node.kind, **asdict(node)} for node in self.epilogue]
        return {"op": self.op, **plain}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> GemmProblem:
        """Inverse of `to_json`. Raises ValueError on an unknown op, field, node or value."""
        rest = dict(plain)
        if rest.pop("op", None) != cls.op:
            raise ValueError(f"expected a problem with op {cls.op!r}, got {plain.get('op')!r}")
        try:
            return cls(
                operand=DType(rest.pop("operand")),
                accumulation=Accumulation(rest.pop("accumulation")),
                out=DType(rest.pop("out")),
                weights=WeightStorage(rest.pop("weights")),
                epilogue=tuple(_node_from_json(node) for node in rest.pop("epilogue")),
                **rest,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a {cls.op} problem: {error}") from error


def _node_from_json(plain: dict[str, Any]) -> EpilogueNode:
    values = dict(plain)
    kind = values.pop("kind")
    if kind not in _NODES:
        raise ValueError(f"unknown epilogue node {kind!r}, expected one of {sorted(_NODES)}")
    if "dtype" in values:
        values["dtype"] = DType(values["dtype"])
    return _NODES[kind](**values)
