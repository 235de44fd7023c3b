"""The steps of a layer around its GEMMs: what is asked of their kernels, and what is chosen."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from math import frexp
from typing import Any, ClassVar, TypeVar

from emitters.spec.config_sm90 import MAX_EXPERTS
from emitters.spec.dtypes import OUTPUTS, DType

ROW_VECTOR = 8  # elements of a row that a thread takes at a time: 16 bytes of 16-bit ones
MAX_ROW = 32_768
MAX_TOP_K = 32
SCORINGS = ("softmax", "sigmoid")  # of a router
MAX_FUSED_EXPERTS = 512  # of route_logits: a thread sums up one, and 512 have 128 registers each

_S = TypeVar("_S", bound="Step")


@dataclass(frozen=True)
class Step:
    """A problem of one of these kernels. T and the routing are not part of it."""

    op: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, **asdict(self)}

    @classmethod
    def from_json(cls: type[_S], plain: dict[str, Any]) -> _S:
        """Inverse of `to_json`. Raises ValueError on an unknown field or value."""
        rest = dict(plain)
        if rest.pop("op", None) != cls.op:
            raise ValueError(f"expected a problem with op {cls.op!r}, got {plain.get('op')!r}")
        dtypes = [f.name for f in fields(cls) if f.type == "DType"]
        try:
            rest |= {name: DType(rest[name]) for name in dtypes}
            return cls(**rest)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a {cls.op} problem: {error}") from error

    def why_illegal(self) -> str | None:
        """None where a kernel can be built, else the reason in words."""
        raise NotImplementedError


@dataclass(frozen=True)
class RouteProblem(Step):
    """Pairs (token, choice) sorted by expert, stably. id_bits: of an expert's id, 32 or 64."""

    num_experts: int
    id_bits: int
    op: ClassVar[str] = "route"

    def why_illegal(self) -> str | None:
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            return f"{self.num_experts} experts: 1 to {MAX_EXPERTS}"
        if self.id_bits not in (32, 64):
            return f"ids of {self.id_bits} bits: 32 or 64"
        return None


@dataclass(frozen=True)
class TopkProblem(Step):
    """Each token's best experts and their weights, from logits [T, num_experts].

    scoring: "softmax" or "sigmoid". num_groups: equal runs of experts, of which a token may choose
    from some.
    """

    num_experts: int
    logits: DType
    scoring: str
    num_groups: int
    op: ClassVar[str] = "topk_router"

    def why_illegal(self) -> str | None:
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            return f"{self.num_experts} experts: 1 to {MAX_EXPERTS}"
        if self.logits not in OUTPUTS:
            return f"logits of {self.logits}: supported are {', '.join(OUTPUTS)}"
        if self.scoring not in SCORINGS:
            return f"scoring {self.scoring!r}: {' or '.join(SCORINGS)}"
        if not 1 <= self.num_groups <= MAX_TOP_K or self.num_experts % self.num_groups:
            return f"{self.num_groups} equal groups of {self.num_experts} experts: 1 to {MAX_TOP_K}"
        return None


@dataclass(frozen=True)
class RouteLogitsProblem(TopkProblem):
    """Both at once, of a few tokens: their best experts, and pairs sorted by expert."""

    op: ClassVar[str] = "route_logits"

    def why_illegal(self) -> str | None:
        if self.num_experts > MAX_FUSED_EXPERTS:
            return f"{self.num_experts} experts: at most {MAX_FUSED_EXPERTS}"
        return super().why_illegal()


@dataclass(frozen=True)
class StepConfig:
    """threads: of a CTA."""

    threads: int = 256
    template: ClassVar[str] = "step"

    def to_json(self) -> dict[str, Any]:
        return {"template": self.template, **asdict(self)}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> StepConfig:
        """Inverse of `to_json`. Raises ValueError on an unknown field."""
        try:
            return cls(**{k: v for k, v in plain.items() if k != "template"})
        except TypeError as error:
            raise ValueError(f"not a {cls.template} config: {error}") from error


@dataclass(frozen=True)
class QuantizeProblem(Step):
    """Rows of `source` -> q of `target` [R, K], scale float32 [R]: rows * source_scale ~ q * scale.

    The scale is that of `cutlass_moe.quantize_per_token`, times source_scale, a power of two, but 1
    for a row of zeros.
    """

    source: DType
    target: DType
    k: int
    source_scale: float = 1.0
    op: ClassVar[str] = "quantize"

    def row_threads(self, threads: int) -> int:
        """Of a CTA's threads those that take a row, a power of two: 32 elements each, if so many
        threads are there."""
        found = 1
        while found * 4 * ROW_VECTOR < self.k and found * 2 <= threads:
            found *= 2
        return found

    def ctas(self, rows: int, threads: int) -> int:
        return -(-rows * self.row_threads(threads) // threads)

    def why_illegal(self) -> str | None:
        if self.source not in OUTPUTS:
            return f"rows of {self.source}: supported are {', '.join(OUTPUTS)}"
        if not self.target.quantized:
            return f"rows quantised to {self.target}: supported are e4m3, e5m2, int8"
        if self.k % ROW_VECTOR or not 0 < self.k <= MAX_ROW:
            return f"K {self.k}: a multiple of {ROW_VECTOR} up to {MAX_ROW}"
        mantissa, exponent = frexp(self.source_scale)
        if mantissa != 0.5 or abs(exponent) > 16:
            return f"source_scale {self.source_scale}: a power of two from 2^-17 to 2^15"
        return None


@dataclass(frozen=True)
class CombineProblem(Step):
    """out[t] = residual[t] + sum over j < top_k of weights[t, j] * rows[inverse[t, j]], all of
    `dtype` [., N], in float32 and in this order."""

    dtype: DType
    n: int
    top_k: int
    op: ClassVar[str] = "combine"

    def ctas(self, tokens: int, threads: int) -> int:
        return -(-tokens * self.n // (ROW_VECTOR * threads))

    def why_illegal(self) -> str | None:
        if self.dtype not in OUTPUTS:
            return f"rows of {self.dtype}: supported are {', '.join(OUTPUTS)}"
        if self.n % ROW_VECTOR or not 0 < self.n <= MAX_ROW:
            return f"N {self.n}: a multiple of {ROW_VECTOR} up to {MAX_ROW}"
        most = MAX_TOP_K * 2 // self.dtype.bytes  # in a thread's registers all at once
        if not 1 <= self.top_k <= most:
            return f"{self.top_k} rows of {self.dtype} a token: between 1 and {most}"
        return None
