"""What is asked of a grouped GEMM: everything that changes the numbers its kernel computes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

from emitters.spec.dtypes import ACCUMULATIONS, OUTPUTS, Accumulation, DType, Name
from emitters.spec.plain import from_plain, to_plain

MAX_EXPERTS = 1024  # 32 lanes x 32 experts: the expert search is two ballots
GATE_BLOCK = 8  # gate columns, then as many up columns: how a tile of a gated problem orders them
N_MAJOR_BLOCK = 64  # columns of a box of N-major weights, 128 bytes; of gate and up by turns


class WeightStorage(Name):
    """How the kernel finds an expert's weights."""

    STACKED = "stacked"  # one [E, N, K] tensor, any strides but K's
    TABLE = "table"  # one [N, K] tensor per expert: a table of E tensor maps in global memory


class Major(Name):
    """Which dimension of the weights is dense."""

    K = "k"
    N = "n"  # bf16 and fp16


@dataclass(frozen=True)
class WeightFormat:
    """What the memory of the weights [E, N, K] holds."""

    dtype: DType
    major: Major = Major.K
    storage: WeightStorage = WeightStorage.STACKED


class Granularity(Name):
    """What shares one float32 scale."""

    TOKEN = "token"  # a row of x: per_token_scale[token], [T], read through the same index as x
    CHANNEL = "channel"  # a row of an expert's weights: scale[e, n], [E, N]
    EXPERT = "expert"  # an expert's weights: scale[e], [E]


class EpilogueNode(Protocol):
    """One of the things done to a product's float32 values, after the scales.

    A node is a frozen dataclass; emitters/device/epilogue/nodes.py says how to add one.
    """

    @property
    def kind(self) -> str:
        """Its name in JSON."""

    @property
    def operand(self) -> str | None:
        """The tensor that it reads, by the name of the kernel's parameter; None: it reads none.

        A node that reads one has a property `element` besides, the tensor's DType.
        """


@dataclass(frozen=True)
class Bias:
    """Adds bias[e, n]: [E, N] of `dtype`."""

    dtype: DType
    kind: ClassVar[str] = "bias"
    operand: ClassVar[str] = "bias"

    @property
    def element(self) -> DType:
        return self.dtype


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
OAI_LIMIT, OAI_SLOPE = 7.0, 1.702  # of SWIGLU_OAI


@dataclass(frozen=True)
class Activation:
    """`scale` times the function of the columns; the last node. A gated one makes N / 2 columns of
    N: the host says where an output's gate and up columns lie in weight, scale and bias."""

    function: ActivationFunction
    scale: float = 1.0
    kind: ClassVar[str] = "activation"
    operand: ClassVar[None] = None


NODES: dict[str, type] = {node.kind: node for node in (Bias, Activation)}


@dataclass(frozen=True)
class GemmProblem:
    """out[r, n] = epilogue(scale * sum_k x[index[r], k] * weight[e(r), n, k]), rows r sorted by
    expert e.

    x [T, K] holds `x`, weight [E, N, K] is laid out as `weight` says, out [rows, out_columns] holds
    `out`. Without `gather`, row r of the product reads row r of x. Sums are multiplied by the
    scales of x, then of weight, where there are such; then the epilogue's nodes are applied in
    order, all in float32, before the conversion to `out`. T, the number of rows and the routing are
    not part of a problem.
    """

    x: DType
    weight: WeightFormat
    accumulation: Accumulation
    out: DType
    n: int
    k: int
    num_experts: int
    gather: bool
    x_scale: Granularity | None = None
    weight_scale: Granularity | None = None
    epilogue: tuple[EpilogueNode, ...] = ()
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

    @property
    def words(self) -> str:
        """For lists that people read."""
        size = f"E {self.num_experts} N {self.n} K {self.k}"
        scales = [f"{scale} scale" for scale in (self.x_scale, self.weight_scale) if scale]
        nodes = [node.kind for node in self.epilogue]
        gather = ["gather"] if self.gather else []
        return " ".join([f"{self.x} > {self.out}", size, *gather, *scales, *nodes])

    def why_illegal(self) -> str | None:
        """None where some config could be legal, else the reason in words."""
        return self._why_numbers() or self._why_weight() or self._why_epilogue()

    def _why_numbers(self) -> str | None:
        if self.x not in ACCUMULATIONS:
            return f"x must be {_any(ACCUMULATIONS)}, got {self.x}"
        if self.accumulation not in ACCUMULATIONS[self.x]:
            allowed = _any(ACCUMULATIONS[self.x])
            return f"accumulation of {self.x} must be {allowed}, got {self.accumulation}"
        if self.out not in OUTPUTS:
            return f"the output must be {_any(OUTPUTS)}, got {self.out}"
        if min(self.n, self.k, self.num_experts) < 1:
            return (
                "N, K and the number of experts must be positive, "
                f"got {self.n}, {self.k} and {self.num_experts}"
            )
        if self.num_experts > MAX_EXPERTS:
            return f"there must be at most {MAX_EXPERTS} experts, got {self.num_experts}"
        if self.k * self.x.bytes % 16:
            return f"rows of x and weight must be multiples of 16 bytes, got K {self.k} of {self.x}"
        if self.gated and self.n % (2 * GATE_BLOCK):
            return f"N of a gated activation must be a multiple of {2 * GATE_BLOCK}, got {self.n}"
        if self.n * self.out.bytes % 16:
            return f"rows of the output must be multiples of 16 bytes, got N {self.n} of {self.out}"
        return None

    def _why_weight(self) -> str | None:
        weight = self.weight
        if weight.dtype is not self.x:
            return f"weights must hold x's {self.x}, got {weight.dtype}"
        if weight.major is Major.K:
            return None
        if weight.dtype.bytes != 2:
            return f"N-major weights must be bf16 or fp16, which WGMMA reads, got {weight.dtype}"
        if weight.storage is WeightStorage.TABLE:
            return "N-major weights must be stacked, to be read in place, got a table of them"
        if self.n * weight.dtype.bytes % 16:
            return (
                "rows of N-major weights must be multiples of 16 bytes, "
                f"got N {self.n} of {weight.dtype}"
            )
        return None

    def _why_epilogue(self) -> str | None:
        if self.x_scale not in (None, Granularity.TOKEN):
            return f"x must have one scale per token or none, got one per {self.x_scale}"
        if self.weight_scale not in (None, Granularity.CHANNEL, Granularity.EXPERT):
            return (
                "weights must have one scale per channel, one per expert or none, "
                f"got one per {self.weight_scale}"
            )
        kinds = [node.kind for node in self.epilogue]
        if len(set(kinds)) < len(kinds):
            return f"each epilogue node must come at most once, got {', '.join(kinds)}"
        if Activation.kind in kinds[:-1]:
            return f"the activation must be the last epilogue node, got {', '.join(kinds)}"
        return None

    def to_json(self) -> dict[str, Any]:
        nodes = [{"kind": node.kind, **to_plain(node)} for node in self.epilogue]
        return {"op": self.op, **to_plain(self), "epilogue": nodes}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> GemmProblem:
        """Inverse of `to_json`. Raises ValueError on an unknown op, field, node or value."""
        rest = dict(plain)
        if rest.pop("op", None) != cls.op:
            raise ValueError(f"a problem's op must be {cls.op!r}, got {plain.get('op')!r}")
        try:
            nodes = tuple(_node_from_json(node) for node in rest.pop("epilogue"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a {cls.op} problem: {error}") from error
        return from_plain(cls, {**rest, "epilogue": nodes}, f"{cls.op} problem")


def make_epilogue(bias: DType | None, activation: Activation | None) -> tuple[EpilogueNode, ...]:
    """The nodes of a product that has these, in their order."""
    nodes: list[EpilogueNode] = [] if bias is None else [Bias(bias)]
    return (*nodes, activation) if activation is not None else tuple(nodes)


def weight_granularity(scale_dims: int) -> Granularity | None:
    """Of a weight scale with so many dimensions: [E, N] or [E]; 0 without one."""
    return {0: None, 1: Granularity.EXPERT}.get(scale_dims, Granularity.CHANNEL)


def _node_from_json(plain: dict[str, Any]) -> EpilogueNode:
    rest = dict(plain)
    kind = rest.pop("kind")
    if kind not in NODES:
        raise ValueError(f"an epilogue node must be one of {sorted(NODES)}, got {kind!r}")
    node: EpilogueNode = from_plain(NODES[kind], rest, f"{kind} node")
    return node


def _any(names: Any) -> str:
    return ", ".join(map(str, names))
