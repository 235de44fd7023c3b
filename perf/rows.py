"""A results file's cases as rows, and what rows come to together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from perf.cases import DTYPES, MODELS, PARTS, Case, Load, moved_bytes
from perf.machine import Ceilings
from perf.systems import OURS
from perf.timing import spread

SPANS = ((1, 8), (16, 256), (512, 16384))  # tokens, both ends included


@dataclass(frozen=True)
class Row:
    """A case: its run, its run's ceilings, microseconds by system, the spread of our rounds."""

    case: Case
    load: Load
    run: str
    ceilings: Ceilings
    us: dict[str, float]
    spread: float | None

    @property
    def peers(self) -> dict[str, float]:
        """Microseconds of everybody else in the same case, process and run."""
        return {name: us for name, us in self.us.items() if name != OURS}

    @property
    def best(self) -> str:
        """The fastest of the others; "" where none was measured."""
        return min(self.peers, key=lambda name: self.us[name], default="")

    @property
    def ratio(self) -> float | None:
        """Time of the best of the others over ours; None where one of the two is missing."""
        return self.us[self.best] / self.us[OURS] if self.best and OURS in self.us else None

    @property
    def floor(self) -> float:
        """The longer of moving the bytes at the read rate and of the arithmetic at the dense rate
        of the run, in microseconds: of a layer, as if nothing but both products were to be done."""
        moved = moved_bytes(self.case, self.load) / (self.ceilings.read_gbs * 1e3)
        return max(moved, self.case.flops / (self.ceilings.tflops(self.case.dtype) * 1e6))


def rows_of(contents: dict[str, Any]) -> list[Row]:
    """In the order of tables: by suite, model, part, tokens."""
    rows = []
    for record in contents["cases"].values():
        systems, run = record["systems"], contents["runs"][record["run"]]
        ours = systems.get(OURS)
        rows.append(
            Row(
                Case(**record["case"]),
                Load(**record["load"]),
                record["run"],
                Ceilings(**run["ceilings"]),
                {name: system["us"] for name, system in systems.items()},
                spread(ours["us"], ours["rounds"]) if ours else None,
            )
        )
    return sorted(rows, key=lambda row: _place(row.case))


def _place(case: Case) -> tuple[Any, ...]:
    models = list(MODELS)
    model = models.index(case.model) if case.model in models else len(models)
    part = PARTS.index(case.part)
    return (case.suite != "models", case.suite, model, case.model, part, case.routing, case.tokens)


@dataclass(frozen=True)
class Claim:
    """What cases of one kind come to: ratios of the best of the others over ours, by the case."""

    name: str
    rows: Sequence[Row]

    @property
    def ratios(self) -> list[float]:
        return [row.ratio for row in self.rows if row.ratio is not None]

    @property
    def mean(self) -> float:
        return geometric_mean(self.ratios)

    @property
    def worst(self) -> float:
        return min(self.ratios)

    @property
    def slower(self) -> int:
        """Cases in which another is faster."""
        return sum(ratio < 1 for ratio in self.ratios)

    @property
    def leaders(self) -> list[tuple[str, int]]:
        """Who of the others was the fastest, and how often."""
        return Counter(row.best for row in self.rows).most_common()


def claims_of(rows: Sequence[Row]) -> list[Claim]:
    """Claims that have a case: means are over balanced routing of models, apart from the rest."""
    compared = [row for row in rows if row.ratio is not None]
    found = []
    for kind, is_layer in (("products", False), ("layers", True)):
        some = [row for row in compared if row.case.is_layer == is_layer]
        special = [row for row in some if row.case.suite != "models"]
        balanced = [row for row in some if row not in special and not row.case.skewed]
        for dtype in DTYPES:
            mine = [row for row in balanced if row.case.dtype == dtype]
            found.append(Claim(f"{dtype} {kind}", mine))
            for low, high in SPANS:
                within = [row for row in mine if low <= row.case.tokens <= high]
                found.append(Claim(f"{dtype} {kind}, {low} to {high:,} tokens", within))
        skewed = [row for row in some if row not in special and row.case.skewed]
        found += [Claim(f"{kind}, skewed routing", skewed), Claim(f"{kind}, other shapes", special)]
    return [one for one in found if one.rows]


def number(us: float | None) -> str:
    return "-" if us is None else f"{us:.1f}" if us < 1000 else f"{us:.0f}"
