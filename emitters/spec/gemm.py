"""The problem of a grouped GEMM: everything that changes the numbers its kernel computes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

from emitters.spec.dtypes import ACCUMULATIONS, OUTPUTS, Accumulation, DType, Name
from emitters.spec.epilogue import NODES, Activation, ActivationGradient, EpilogueNode
from emitters.spec.packing import BLOCK_ROWS, Packing
from emitters.spec.plain import from_plain, to_plain

MAX_EXPERTS = 1024  # 32 lanes x 32 experts: two ballots of a warp find an expert
GATE_BLOCK = 8  # a tile of a gated problem alternates 8 gate columns and 8 up columns
N_MAJOR_BLOCK = 64  # columns (128 bytes) per box of N-major weights; gate and up boxes alternate
K_BLOCK = 128  # elements of K that share a scale, where scales vary along K


class WeightStorage(Name):
    """The way in which the kernel finds an expert's weights."""

    STACKED = "stacked"  # one [E, N, K] tensor, through one tensor map
    TABLE = "table"  # one [N, K] tensor per expert, through a table of E tensor maps


class Major(Name):
    """The dimension of the weights that is dense (stride 1)."""

    K = "k"
    N = "n"  # bf16 and fp16


@dataclass(frozen=True)
class WeightFormat:
    """The element type and memory layout of the weights [E, N, K].

    Packed 4-bit weights hold their scales themselves, beside those that a problem names.
    """

    dtype: DType | Packing
    major: Major = Major.K
    storage: WeightStorage = WeightStorage.STACKED

    @property
    def packing(self) -> Packing | None:
        """The format of packed weights; None for others, which have x's dtype."""
        return self.dtype if isinstance(self.dtype, Packing) else None


class Granularity(Name):
    """The group of values that shares one float32 scale."""

    TOKEN = "token"  # one per row of x: per_token_scale [T], read through the same index as x
    CHANNEL = "channel"  # one per row of an expert's weights: scale [E, N]
    EXPERT = "expert"  # one per expert: scale [E]
    # these vary along K: one per row of x and 128 of K, per_token_scale [T, K / 128];
    TOKEN_BLOCK = "1x128"
    # one per so many rows of an expert's weights and 128 of K, scale [E, N / rows, K / 128]
    BLOCK_128 = "128x128"
    BLOCK_64 = "64x128"
    BLOCK_32 = "32x128"

    @property
    def rows(self) -> int | None:
        """The rows of weights that share a scale which varies along K; None for other groups."""
        return _BLOCK_ROWS.get(self)


_BLOCK_ROWS = {Granularity.BLOCK_128: 128, Granularity.BLOCK_64: 64, Granularity.BLOCK_32: 32}


@dataclass(frozen=True)
class GemmProblem:
    """A grouped GEMM: each row of the product is a row of x times the weights of its expert.

      out[r, n] = epilogue(scales * sum over k of x[index[r], k] * weight[e, n, k])

    for the rows r of expert e; rows are sorted by expert. x is [T, K], weight [E, N, K] and out
    [rows, out_columns]. In float32, a sum is multiplied by the scale of x, then by that of weight,
    if there are any; then the epilogue's nodes follow in order, then the conversion to `out`.
    Scales that vary along K multiply the sum of each 128 of K instead. Such a product may quantise
    its output too, to e4m3 with a float32 scale per row and 128 columns, as `QuantizeGroupsProblem`
    does. T, the number of rows and the routing are not part of a problem.
    """

    x: DType
    weight: WeightFormat
    accumulation: Accumulation
    out: DType
    n: int
    k: int
    num_experts: int
    gather: bool  # whether rows are read through index; without it row r reads row r of x
    x_scale: Granularity | None = None
    weight_scale: Granularity | None = None
    epilogue: tuple[EpilogueNode, ...] = ()
    op: ClassVar[str] = "grouped_gemm"

    @cached_property
    def _hash(self) -> int:
        """Computed once, because every call of the op hashes its problem."""
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def activation(self) -> Activation | None:
        """The epilogue's activation, or None."""
        last = self.epilogue[-1] if self.epilogue else None
        return last if isinstance(last, Activation) else None

    @property
    def gated(self) -> bool:
        return self.activation is not None and self.activation.function.gated

    @property
    def alternating(self) -> bool:
        """Whether the columns of a tile are gate, up, gate, up, ..., as in memory."""
        return self.activation is not None and self.activation.alternating

    @property
    def stored(self) -> bool:
        """Whether the columns before the activation are an output too."""
        return self.activation is not None and self.activation.stored

    @property
    def gradient(self) -> ActivationGradient | None:
        """The epilogue's gradient of an activation, or None."""
        last = self.epilogue[-1] if self.epilogue else None
        return last if isinstance(last, ActivationGradient) else None

    @property
    def quantized_out(self) -> bool:
        """Whether the output is quantised, with a scale per row and 128 columns."""
        return self.out.quantized

    @property
    def sole_output(self) -> bool:
        """Whether the kernel writes the output alone."""
        return not self.stored and self.gradient is None

    @property
    def numbers(self) -> tuple[str, ...]:
        """The names of the float32 launch parameters that the epilogue takes."""
        last = self.activation or self.gradient
        return last.numbers if last else ()

    @property
    def out_columns(self) -> int:
        """Columns of the output: N, or N / 2 with a gated activation."""
        return self.n // 2 if self.gated else self.n

    @property
    def out_groups(self) -> int:
        """The scales of a row of a quantised output."""
        return -(-self.out_columns // K_BLOCK)

    @property
    def two_level(self) -> bool:
        return self.accumulation is Accumulation.TWO_LEVEL

    @property
    def block_rows(self) -> int | None:
        """The rows of weights that share a scale, if scales vary along K; else None."""
        return self.weight_scale.rows if self.weight_scale else None

    @property
    def scale_blocks(self) -> tuple[int, int]:
        """The scales along N and along K of an expert's weights, if they vary along K.

        The gates and the ups of a gated problem have blocks of their own.
        """
        assert self.block_rows is not None
        return block_count(self.n, self.block_rows, self.gated), -(-self.k // K_BLOCK)

    @property
    def words(self) -> str:
        """A short description, for lists that people read."""
        size = f"E {self.num_experts} N {self.n} K {self.k}"
        scales = [f"{scale} scale" for scale in (self.x_scale, self.weight_scale) if scale]
        nodes = [node.kind for node in self.epilogue]
        gather = ["gather"] if self.gather else []
        operands = f"{self.x} x {self.weight.packing}" if self.weight.packing else self.x
        return " ".join([f"{operands} > {self.out}", size, *gather, *scales, *nodes])

    def why_illegal(self) -> str | None:
        """Why no config can be legal for this problem, or None."""
        return (
            self._why_numbers() or self._why_weight() or self._why_scales() or self._why_epilogue()
        )

    def _why_numbers(self) -> str | None:
        if self.x not in ACCUMULATIONS:
            return f"x must be {_any(ACCUMULATIONS)}, got {self.x}"
        if self.accumulation not in ACCUMULATIONS[self.x]:
            allowed = _any(ACCUMULATIONS[self.x])
            return f"accumulation must be {allowed} for {self.x}, got {self.accumulation}"
        if self.out not in OUTPUTS and not (self.out is DType.E4M3 and self.block_rows):
            quantized = f" (with scales that vary along K, {DType.E4M3} too)"
            return f"the output must be {_any(OUTPUTS)}{quantized}, got {self.out}"
        if min(self.n, self.k, self.num_experts) < 1:
            return (
                "N, K and the number of experts must be positive, "
                f"got {self.n}, {self.k} and {self.num_experts}"
            )
        if self.num_experts > MAX_EXPERTS:
            return f"the number of experts must be at most {MAX_EXPERTS}, got {self.num_experts}"
        if self.k * self.x.bytes % 16:
            return f"K must be {_16_bytes(self.x)} for rows of x and weight, got {self.k}"
        if self.gated and self.n % (2 * GATE_BLOCK):
            multiple = 2 * GATE_BLOCK
            return f"N must be a multiple of {multiple} for a gated activation, got {self.n}"
        if self.n * self.out.bytes % 16:
            return f"N must be {_16_bytes(self.out)} for rows of the output, got {self.n}"
        if self.quantized_out and self.out_columns % 16:
            return f"rows must have {_16_bytes(self.out)}, got {self.out_columns} columns"
        return None

    def _why_weight(self) -> str | None:
        weight = self.weight
        if isinstance(weight.dtype, Packing):
            return self._why_packed()
        if weight.dtype is not self.x:
            return f"weights must be {self.x} like x, got {weight.dtype}"
        if weight.major is Major.K:
            return None
        if weight.dtype.bytes != 2:
            return (
                "N-major weights must be bf16 or fp16 (WGMMA reads 8-bit operands K-major only), "
                f"got {weight.dtype}"
            )
        if weight.storage is WeightStorage.TABLE:
            return "N-major weights must be one stacked tensor, got a table of one per expert"
        if self.n * weight.dtype.bytes % 16:
            return f"N must be {_16_bytes(weight.dtype)} for N-major weights, got {self.n}"
        return None

    def _why_packed(self) -> str | None:
        if self.x is not DType.BF16:
            return f"x must be bf16 for packed weights, got {self.x}"
        if self.weight.major is not Major.K:
            return f"packed weights must be K-major, got {self.weight.major}-major"
        if self.weight.storage is WeightStorage.TABLE:
            return "packed weights must be one stacked tensor, got a table of one per expert"
        multiple = 2 * BLOCK_ROWS if self.gated else BLOCK_ROWS
        if self.n % multiple:
            halves = " (gates and ups in blocks of their own)" if self.gated else ""
            return f"N must be a multiple of {multiple} for packed weights{halves}, got {self.n}"
        return None

    def _why_scales(self) -> str | None:
        if self.x_scale is Granularity.TOKEN_BLOCK or self.block_rows:
            return self._why_block_scales()
        if self.x_scale not in (None, Granularity.TOKEN):
            return f"x must have one scale per token or none, got one per {self.x_scale}"
        if self.weight_scale not in (None, Granularity.CHANNEL, Granularity.EXPERT):
            return (
                "weights must have one scale per channel, one per expert or none, "
                f"got one per {self.weight_scale}"
            )
        return None

    def _why_block_scales(self) -> str | None:
        if self.x_scale is not Granularity.TOKEN_BLOCK or not self.block_rows:
            return (
                "x and weights must both have scales that vary along K or neither, got one per "
                f"{self.x_scale} and one per {self.weight_scale}"
            )
        if not self.two_level:
            return (
                f"accumulation must be {Accumulation.TWO_LEVEL} with scales that vary along K, "
                f"got {self.accumulation}"
            )
        return None

    def _why_epilogue(self) -> str | None:
        kinds = [node.kind for node in self.epilogue]
        if len(set(kinds)) < len(kinds):
            return f"each epilogue node must come at most once, got {', '.join(kinds)}"
        if {Activation.kind, ActivationGradient.kind} & set(kinds[:-1]):
            return f"the activation must be the last epilogue node, got {', '.join(kinds)}"
        if self.gradient and not self.gather:
            return "an activation's gradient must be of gathered rows, got rows in order"
        if self.alternating and not (self.gated and self.weight.major is Major.N):
            return (
                "an alternating activation must be a gated one of N-major weights, got "
                f"{self.activation} and {self.weight.major}-major ones"
            )
        if self.alternating and self.stored:
            return "an alternating activation must not be stored, got one that is both"
        if self.quantized_out and not self.sole_output:
            return "a quantised output must be the only one"
        return None

    def to_json(self) -> dict[str, Any]:
        nodes = [{"kind": node.kind, **to_plain(node)} for node in self.epilogue]
        return {"op": self.op, **to_plain(self), "epilogue": nodes}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> GemmProblem:
        """The inverse of `to_json`; raises ValueError for an unknown op, field, node or value."""
        rest = dict(plain)
        if rest.pop("op", None) != cls.op:
            raise ValueError(f"a problem's op must be {cls.op!r}, got {plain.get('op')!r}")
        epilogue = rest.pop("epilogue", None)
        try:
            nodes = tuple(_node_from_json(node) for node in epilogue)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"the epilogue of a {cls.op} problem must be a list of nodes, each with a kind, "
                f"got {epilogue!r}"
            ) from error
        return from_plain(cls, {**rest, "epilogue": nodes}, f"{cls.op} problem")


def block_count(n: int, rows: int, gated: bool) -> int:
    """The scales along N, each of so many rows, of an expert's weights [N, K]."""
    return 2 * -(-n // 2 // rows) if gated else -(-n // rows)


def weight_granularity(scale_dims: int) -> Granularity | None:
    """The granularity of a weight scale with this many dimensions, [E, N] or [E]; 0: no scale."""
    return {0: None, 1: Granularity.EXPERT}.get(scale_dims, Granularity.CHANNEL)


def _node_from_json(plain: dict[str, Any]) -> EpilogueNode:
    rest = dict(plain)
    kind = rest.pop("kind")
    if kind not in NODES:
        raise ValueError(f"an epilogue node must be one of {sorted(NODES)}, got {kind!r}")
    node: EpilogueNode = from_plain(NODES[kind], rest, f"{kind} node")
    return node


def _any(names: Any) -> str:
    """ "a", "a or b", "a, b or c"."""
    *others, last = map(str, names)
    return f"{', '.join(others)} or {last}" if others else last


def _16_bytes(dtype: DType) -> str:
    return f"a multiple of {16 // dtype.bytes} (16 bytes of {dtype})"
