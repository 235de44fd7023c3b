"""The problems and the config of a layer's kernels around its GEMMs: its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from emitters.spec.dtypes import LARGEST, OUTPUTS, DType
from emitters.spec.epilogue import NUMBERS, ActivationFunction
from emitters.spec.gemm import K_BLOCK, MAX_EXPERTS
from emitters.spec.plain import from_plain, to_plain

ROW_VECTOR = 8  # elements of a row that a thread reads at a time: 16 bytes if they have 16 bits
MAX_ROW = 32_768  # elements
GROUPS_PER_THREAD = 4  # of `quantize_groups`, read before the first is used
MAX_TOP_K = 32
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
MAX_FUSED_EXPERTS = 512  # for route_logits: it needs a thread per expert and 128 registers each

_S = TypeVar("_S", bound="Step")


@dataclass(frozen=True)
class Step:
    """The problem of one of these kernels; T and the routing are not part of it."""

    op: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, **to_plain(self)}

    @classmethod
    def from_json(cls: type[_S], plain: dict[str, Any]) -> _S:
        """The inverse of `to_json`; raises ValueError for an unknown op, field or value."""
        rest = dict(plain)
        if rest.pop("op", None) != cls.op:
            raise ValueError(f"a problem's op must be {cls.op!r}, got {plain.get('op')!r}")
        return from_plain(cls, rest, f"{cls.op} problem")

    @property
    def words(self) -> str:
        """A short description, for lists that people read."""
        fields = to_plain(self)
        shown = [name for name in _WORDS if fields.get(name, _PLAIN.get(name)) != _PLAIN.get(name)]
        return " ".join([self.op, *(_WORDS[name].format(fields[name]) for name in shown)])

    @property
    def least_threads(self) -> int:
        """The least number of threads that a CTA must have."""
        return 32

    def why_illegal(self) -> str | None:
        """Why no kernel can be built for this problem, or None."""
        raise NotImplementedError


_WORDS = {  # how `words` shows each field, in this order
    "num_experts": "E {}",
    "id_bits": "int{}",
    "logits": "{}",
    "scoring": "{}",
    "num_groups": "groups {}",
    "function": "{}",
    "dtype": "{}",
    "inter": "I {}",
    "interleaved": "interleaved",
    "source": "{} >",
    "target": "{}",
    "rows": "{} >",
    "out": "{}",
    "k": "K {}",
    "padded": "padded",
    "n": "N {}",
    "top_k": "k {}",
    "weights": "{} weights",
}
_PLAIN = {  # values that `words` leaves out
    "num_groups": 1,
    "padded": False,
    "weights": "fp32",
    "interleaved": False,
}


@dataclass(frozen=True)
class RouteProblem(Step):
    """Sorts (token, choice) pairs by expert, stably. id_bits: 32 or 64, of an expert's id."""

    num_experts: int
    id_bits: int
    op: ClassVar[str] = "route"

    @property
    def least_threads(self) -> int:
        return self.num_experts  # one per expert

    def why_illegal(self) -> str | None:
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            return f"the number of experts must be 1 to {MAX_EXPERTS}, got {self.num_experts}"
        if self.id_bits not in (32, 64):
            return f"ids must have 32 or 64 bits, got {self.id_bits}"
        return None


@dataclass(frozen=True)
class TopkProblem(Step):
    """Chooses each token's experts and their weights from logits [T, num_experts].

    logits: their dtype. scoring: of SCORINGS. num_groups: equal runs of experts; a token
    chooses from its best groups only.
    """

    num_experts: int
    logits: DType
    scoring: str
    num_groups: int
    op: ClassVar[str] = "topk_router"

    def why_illegal(self) -> str | None:
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            return f"the number of experts must be 1 to {MAX_EXPERTS}, got {self.num_experts}"
        if self.logits not in OUTPUTS:
            return f"logits must be one of {', '.join(OUTPUTS)}, got {self.logits}"
        if self.scoring not in SCORINGS:
            return f"scoring must be one of {', '.join(SCORINGS)}, got {self.scoring!r}"
        if not 1 <= self.num_groups <= MAX_TOP_K or self.num_experts % self.num_groups:
            return (
                f"num_groups must be 1 to {MAX_TOP_K} and a divisor of {self.num_experts} experts, "
                f"got {self.num_groups}"
            )
        return None


@dataclass(frozen=True)
class RouteLogitsProblem(TopkProblem):
    """Chooses the experts of a few tokens and sorts their pairs by expert, in one launch."""

    op: ClassVar[str] = "route_logits"

    @property
    def least_threads(self) -> int:
        return self.num_experts  # one per expert

    def why_illegal(self) -> str | None:
        if self.num_experts > MAX_FUSED_EXPERTS:
            most = MAX_FUSED_EXPERTS
            return f"the number of experts must be at most {most}, got {self.num_experts}"
        return super().why_illegal()


@dataclass(frozen=True)
class QuantizeProblem(Step):
    """Quantises rows [R, K] of `source` to q [R, K] of `target` and scale float32 [R].

    As `cutlass_moe.quantize_per_token` does: rows ~ q * scale. padded: each row of q ends with 8
    zeros, because K is no multiple of 16.
    """

    source: DType
    target: DType
    k: int
    padded: bool = False
    op: ClassVar[str] = "quantize"

    @property
    def q_vectors(self) -> int:
        """The number of ROW_VECTOR values in a row of q."""
        return self.k // ROW_VECTOR + self.padded

    def row_threads(self, threads: int) -> int:
        """The number of threads that share a row: a power of two, with about 32 elements each.

        threads: per CTA; no more can share a row.
        """
        sharing = 1
        while sharing * 4 * ROW_VECTOR < self.k and sharing * 2 <= threads:
            sharing *= 2
        return sharing

    def ctas(self, rows: int, threads: int) -> int:
        """The number of CTAs for this many rows, with this many threads per CTA."""
        return -(-rows * self.row_threads(threads) // threads)

    def why_illegal(self) -> str | None:
        if self.source not in OUTPUTS:
            return f"rows must be one of {', '.join(OUTPUTS)}, got {self.source}"
        if self.target not in LARGEST:
            return f"rows must be quantised to one of {', '.join(LARGEST)}, got {self.target}"
        if self.k % ROW_VECTOR or not 0 < self.k <= MAX_ROW:
            return f"K must be a multiple of {ROW_VECTOR} up to {MAX_ROW}, got {self.k}"
        if self.padded and self.k % 16 == 0:
            return f"K must be no multiple of 16 where rows of q are padded, got {self.k}"
        return None


@dataclass(frozen=True)
class QuantizeGroupsProblem(Step):
    """Quantises rows [R, K] to q [R, K] with a float32 scale per 128 of K.

    As `cutlass_moe.quantize_per_token_group` does. padded: as in `QuantizeProblem`.
    """

    source: DType
    target: DType
    k: int
    padded: bool = False
    op: ClassVar[str] = "quantize_groups"

    @property
    def groups(self) -> int:
        """The groups of a row."""
        return -(-self.k // K_BLOCK)

    def ctas(self, rows: int, threads: int) -> int:
        """The number of CTAs for this many rows, with this many threads per CTA."""
        return -(-rows * self.groups * K_BLOCK // (threads * ROW_VECTOR * GROUPS_PER_THREAD))

    def why_illegal(self) -> str | None:
        if self.source not in OUTPUTS:
            return f"rows must be one of {', '.join(OUTPUTS)}, got {self.source}"
        if self.target not in LARGEST:
            return f"rows must be quantised to one of {', '.join(LARGEST)}, got {self.target}"
        if self.k % ROW_VECTOR or self.k < 1:
            return f"K must be a positive multiple of {ROW_VECTOR}, got {self.k}"
        if self.padded and self.k % 16 == 0:
            return f"K must be no multiple of 16 where rows of q are padded, got {self.k}"
        return None


@dataclass(frozen=True)
class CombineProblem(Step):
    """Sums each token's rows, weighted.

    rows, out, weights: the dtypes of the rows [., N], of residual and output [., N], and of the
    router weights.

      out[t] = residual[t] + sum over j < top_k of weights[t, j] * rows[inverse[t, j]]

    in float32, in the order of j.
    """

    rows: DType
    out: DType
    n: int
    top_k: int
    weights: DType = DType.FP32
    op: ClassVar[str] = "combine"

    @property
    def columns(self) -> int:
        """The number of columns that a thread sums: those of 16 bytes of a row."""
        return 16 // self.rows.bytes

    def ctas(self, tokens: int, threads: int) -> int:
        """The number of CTAs for this many tokens, with this many threads per CTA."""
        return -(-tokens * self.n // (self.columns * threads))

    def why_illegal(self) -> str | None:
        for name in ("rows", "out", "weights"):
            dtype = getattr(self, name)
            if dtype not in OUTPUTS:
                return f"{name} must be one of {', '.join(OUTPUTS)}, got {dtype}"
        if self.n % self.columns or not 0 < self.n <= MAX_ROW:
            return f"N must be a multiple of {self.columns} up to {MAX_ROW}, got {self.n}"
        if not 1 <= self.top_k <= MAX_TOP_K:
            return f"top_k must be 1 to {MAX_TOP_K}, got {self.top_k}"
        return None


@dataclass(frozen=True)
class GatherSumProblem(Step):
    """Sums groups of rows [., N], each of any size: out[g] = sum of the rows that group g names.

    rows, out: dtypes. Sums are float32, in the order of the group.
    """

    rows: DType
    out: DType
    n: int
    op: ClassVar[str] = "gather_sum"

    @property
    def columns(self) -> int:
        """The number of columns that a thread sums: those of 16 bytes of a row."""
        return 16 // self.rows.bytes

    def ctas(self, groups: int, threads: int) -> int:
        """The number of CTAs for this many groups, with this many threads per CTA."""
        return -(-groups * self.n // (self.columns * threads))

    def why_illegal(self) -> str | None:
        for name in ("rows", "out"):
            dtype = getattr(self, name)
            if dtype not in OUTPUTS:
                return f"{name} must be one of {', '.join(OUTPUTS)}, got {dtype}"
        if self.n % self.columns or not 0 < self.n <= MAX_ROW:
            return f"N must be a multiple of {self.columns} up to {MAX_ROW}, got {self.n}"
        return None


@dataclass(frozen=True)
class ActivateProblem(Step):
    """Applies an activation to the rows of a layer's up projection: h [R, 2I or I] -> [R, I].

    dtype: of both. inter: I. interleaved: columns of a gated one are gate, up, gate, up, ...
    """

    function: ActivationFunction
    dtype: DType
    inter: int
    interleaved: bool = False
    op: ClassVar[str] = "activate"

    @property
    def columns(self) -> int:
        """The columns of h."""
        return self.inter * (2 if self.function.gated else 1)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The names of the float32 launch parameters that the function takes."""
        return NUMBERS if self.function is ActivationFunction.SWIGLU_OAI else ()

    def ctas(self, pairs: int, threads: int) -> int:
        """The number of CTAs for this many (token, choice) pairs: a warp takes a pair's row."""
        return -(-pairs * 32 // threads)

    def why_illegal(self) -> str | None:
        if self.dtype not in _ACTIVATED:
            return f"rows must be one of {', '.join(_ACTIVATED)}, got {self.dtype}"
        if self.inter % ROW_VECTOR or not 0 < self.inter <= MAX_ROW:
            return f"I must be a multiple of {ROW_VECTOR} up to {MAX_ROW}, got {self.inter}"
        if self.interleaved and not self.function.gated:
            return f"only gated activations can be interleaved, got {self.function}"
        return None


@dataclass(frozen=True)
class ActivateBackwardProblem(ActivateProblem):
    """The gradients of a layer's activation, whose result a, weighted, the down projection reads.

    From h and the gradient d [R, I] of the unweighted a, for each row with its router weight w:

      gradient of h = w * d * a'(h)        weighted activation = w * a(h)
      gradient of w = sum over the row's columns of d * a(h)
    """

    op: ClassVar[str] = "activate_backward"


_ACTIVATED = (DType.BF16, DType.FP16)


@dataclass(frozen=True)
class StepConfig:
    """The config of all these kernels: the number of threads per CTA."""

    threads: int = 256
    template: ClassVar[str] = "step"

    def to_json(self) -> dict[str, Any]:
        return {"template": self.template, **to_plain(self)}

    @property
    def words(self) -> str:
        """A short description, for lists that people read."""
        return f"{self.threads} threads"

    def why_illegal(self, problem: Step) -> str | None:
        """Why no kernel can be built with this config for a legal problem, or None."""
        if self.threads % 32 or not 32 <= self.threads <= 1024:
            return f"threads must be a multiple of 32 up to 1024, got {self.threads}"
        if self.threads < problem.least_threads:
            least = problem.least_threads
            return f"threads must be at least one per expert ({least}), got {self.threads}"
        return None
