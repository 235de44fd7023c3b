"""What is asked: everything that changes the numbers a kernel computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from emitters.spec.dtypes import Accumulation, DType, Name
from emitters.spec.weight_map import gate_strides


class WeightStorage(Name):
    """How the kernel finds an expert's weights."""

    STACKED = "stacked"  # one [E, N, K] tensor, any strides but K's
    TABLE = "table"  # one [N, K] tensor per expert: a table of E tensor maps in global memory


class Major(Name):
    """Which dimension of the weights is dense."""

    K = "k"
    N = "n"  # bf16 and fp16


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


class ActivationFunction(Name):
    """Of a column x; where gated, of a gate column g and an up column u."""

    SWIGLU = "swiglu"  # silu(g) * u
    GEGLU = "geglu"  # gelu(g) * u
    REGLU = "reglu"  # relu(g) * u
    SWIGLU_OAI = "swiglu_oai"  # g * sigmoid(1.702 g) * (u + 1), g <= 7 and -7 <= u <= 7: gpt-oss
    GELU = "gelu"  # x * (1 + erf(x / sqrt 2)) / 2
    SILU = "silu"  # x * sigmoid(x)
    RELU = "relu"
    RELU2 = "relu2"  # relu(x) squared

    @property
    def gated(self) -> bool:
        return self in _GATED


_GATED = (
    ActivationFunction.SWIGLU,
    ActivationFunction.GEGLU,
    ActivationFunction.REGLU,
    ActivationFunction.SWIGLU_OAI,
)


@dataclass(frozen=True)
class Activation:
    """`scale` times the function of the columns; the last node. A gated one makes N / 2 columns of
    N: the host says where an output's gate and up columns lie in weight, scale and bias."""

    function: ActivationFunction
    scale: float = 1.0
    kind: ClassVar[str] = "activation"


EpilogueNode = PerTokenScale | ChannelScale | ExpertScale | Bias | Activation
_NODES: dict[str, type] = {
    c.kind: c for c in (PerTokenScale, ChannelScale, ExpertScale, Bias, Activation)
}
GATE_BLOCK = 8  # gate columns, then as many up columns: how a tile of a gated problem orders them
N_MAJOR_BLOCK = 64  # columns of a box of N-major weights, 128 bytes; of gate and up by turns


def make_epilogue(
    per_token_scale: bool, scale_dims: int, bias: DType | None, activation: Activation | None
) -> tuple[EpilogueNode, ...]:
    """Nodes of what a product has, in the usual order. scale_dims: of its scale; 0 without one."""
    nodes: list[EpilogueNode] = [PerTokenScale()] if per_token_scale else []
    if scale_dims:
        nodes.append(ExpertScale() if scale_dims == 1 else ChannelScale())
    if bias is not None:
        nodes.append(Bias(bias))
    if activation is not None:
        nodes.append(activation)
    return tuple(nodes)


@dataclass(frozen=True)
class GemmProblem:
    """out[r, n] = epilogue(sum_k x[index[r], k] * weight[e(r), n, k]), rows r sorted by expert e.

    x [T, K] and weight [E, N, K] hold `operand`, out [rows, out_columns] holds `out`. Without
    `gather`, row r of the product reads row r of x. The epilogue's nodes are applied in order, in
    float32, before the conversion to `out`. T, the number of rows and the routing are not part of a
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
    weight_major: Major = Major.K
    op: ClassVar[str] = "grouped_gemm"

    def __post_init__(self) -> None:
        # hashed at every call of the op: computed once
        object.__setattr__(self, "_hash", hash(tuple(getattr(self, f.name) for f in fields(self))))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    @property
    def activation(self) -> Activation | None:
        last = self.epilogue[-1] if self.epilogue else None
        return last if isinstance(last, Activation) else None

    @property
    def gated(self) -> bool:
        return self.activation is not None and self.activation.function.gated

    @property
    def out_columns(self) -> int:
        return self.n // 2 if self.gated else self.n

    def weight_view(
        self, strides: tuple[int, ...], interleaved: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Extents, and strides of all but the innermost, of the tensor map that reads weights.

        In elements, innermost first. strides: of E, N and K. interleaved: whether rows of a gated
        problem's weights are gate, up, gate, up, ..., which N-major ones can't be; else the first
        half of them is gate.
        """
        experts = self.num_experts if self.weights is WeightStorage.STACKED else 1
        expert_stride, row_stride, k_stride = strides
        if experts == 1:
            expert_stride = max(row_stride, k_stride)  # never used, but checked
        if self.weight_major is Major.N:
            if not self.gated:
                return (self.n, self.k, experts), (k_stride, expert_stride)
            half = self.out_columns
            return (half, self.k, 2, experts), (k_stride, half, expert_stride)
        if not self.gated:
            return (self.k, self.n, experts), (row_stride, expert_stride)
        column, gate = (stride * row_stride for stride in gate_strides(self.n, interleaved))
        extents = (self.k, GATE_BLOCK, 2, self.out_columns // GATE_BLOCK, experts)
        return extents, (column, gate, GATE_BLOCK * column, expert_stride)

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
                weight_major=Major(rest.pop("weight_major")),
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
    if "function" in values:
        values["function"] = ActivationFunction(values["function"])
    return _NODES[kind](**values)
