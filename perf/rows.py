"""What the rows of products and of layers have in common, and what rows come to together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any, Generic, TypeVar

from perf.cases import BenchCase
from perf.machine import Ceilings
from perf.systems import OURS
from perf.timing import spread

PUBLISHED = Path(__file__).with_name("published.json")
DAGGER = "†"  # marks published figures
FIGURES_HEADER = ("figure", "mean", "worst", "target", "cases", ">= 1", "worst case")

Table = tuple[Sequence[str], list[list[str]]]  # a header and lines under it
C = TypeVar("C", bound=BenchCase)


@dataclass(frozen=True)
class Row(Generic[C]):
    """A case of a results file: its run's ceilings, microseconds by system, the spread of ours."""

    case: C
    ceilings: Ceilings
    us: dict[str, float]
    spread: float | None

    @property
    def name(self) -> str:
        return self.case.name

    def ratio(self, one: str, other: str) -> float | None:
        """Time of one system over another's; None where one of the two is missing."""
        return self.us[one] / self.us[other] if one in self.us and other in self.us else None


def measured(record: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Row, less its case, from a case's record and its run's."""
    systems = record["systems"]
    ours = systems.get(OURS)
    return {
        "ceilings": Ceilings(**run["ceilings"]),
        "us": {name: system["us"] for name, system in systems.items()},
        "spread": spread(ours["us"], ours["rounds"]) if ours else None,
    }


def load_published() -> dict[str, Any]:
    return json.loads(PUBLISHED.read_text())


def number(us: float | None) -> str:
    return "-" if us is None else f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


@dataclass(frozen=True)
class Figure:
    """Ratios by the case's name. worst: min where more is better, max where less is. target: what
    is asked of the mean or, with each, of the worst case."""

    name: str
    ratios: dict[str, float]
    worst: Callable[..., Any] = min
    target: float | None = None
    each: bool = False

    @property
    def cells(self) -> list[str]:
        """Under FIGURES_HEADER."""
        worst = self.worst(self.ratios, key=lambda name: self.ratios[name])
        values = self.ratios.values()
        return [
            self.name,
            f"{geometric_mean(values):.3f}",
            f"{self.ratios[worst]:.3f}",
            self.verdict,
            str(len(values)),
            str(sum(value >= 1 for value in values)),
            worst,
        ]

    @property
    def verdict(self) -> str:
        """The target, and whether it is met."""
        if self.target is None:
            return "-"
        values = self.ratios.values()
        asked = self.worst(values) if self.each else geometric_mean(values)
        met = asked >= self.target if self.worst is min else asked <= self.target
        sign = ">=" if self.worst is min else "<="
        return f"{sign} {self.target:.2f} {'each ' * self.each}{'met' if met else 'MISSED'}"
