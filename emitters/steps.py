"""The steps of a layer around its GEMMs: what is asked of their kernels, and what is chosen."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

from emitters.config import MAX_EXPERTS, Config, config_from_json
from emitters.problem import DType, GemmProblem

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
            return cls(**rest, **{name: DType(rest.pop(name)) for name in dtypes})
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


Problem = GemmProblem | Step
AnyConfig = Config | StepConfig
_PROBLEMS: dict[str, type[GemmProblem] | type[Step]] = {
    c.op: c for c in (GemmProblem, RouteProblem)
}


def problem_from_json(plain: dict[str, Any]) -> Problem:
    """Raises ValueError on an unknown op, field or value."""
    op = dict(plain).get("op")
    if op not in _PROBLEMS:
        raise ValueError(f"expected a problem with an op of {sorted(_PROBLEMS)}, got {op!r}")
    return _PROBLEMS[op].from_json(plain)


def any_config_from_json(plain: dict[str, Any]) -> AnyConfig:
    """Raises ValueError on an unknown template, field or value."""
    if dict(plain).get("template") == StepConfig.template:
        return StepConfig.from_json(plain)
    return config_from_json(plain)
