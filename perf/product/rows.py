"""A results file's cases as rows of figures, with peers' published ones where the run has none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perf.product.cases import Case, Ceilings, Workload, floor_us, flops
from perf.suites import LAYER_SUITES

OURS = "cutlass_moe"
RIVALS = ("triton", "torch", "deepgemm", "quack", "padded_bmm")  # what a user could call instead
PUBLISHED = Path(__file__).with_name("published.json")
DAGGER = "†"  # marks published figures
Table = tuple[Sequence[str], list[list[str]]]  # a header and lines under it


@dataclass(frozen=True)
class Row:
    """One case's figures in microseconds. published: systems whose time is not of the run."""

    case: Case
    load: Workload
    ceilings: Ceilings
    us: dict[str, float]
    graph_us: dict[str, float]
    spread: float | None
    published: frozenset[str]

    @property
    def name(self) -> str:
        case = self.case
        routing = "" if case.routing == "balanced" else f" {case.routing}"
        return f"{case.model} {case.gemm} {case.dtype} {case.tokens}{routing}"

    @property
    def floor(self) -> float:
        return floor_us(self.case, self.load, self.ceilings)

    @property
    def floor64(self) -> float:
        return floor_us(self.case, self.load, self.ceilings, round_rows=True)

    @property
    def best_rival(self) -> str | None:
        rivals = [name for name in RIVALS if name in self.us]
        return min(rivals, key=lambda name: self.us[name]) if rivals else None

    @property
    def speedup(self) -> float | None:
        """The best rival's time over ours; None where one of the two is missing."""
        best = self.best_rival
        return self.us[best] / self.us[OURS] if best and OURS in self.us else None

    def tflops(self, system: str) -> float:
        return flops(self.case) / self.us[system] / 1e6


def rows_of(contents: dict[str, Any], published: dict[str, Any]) -> list[Row]:
    """Rows of a results file's products, in its order. published: of `load_published`."""
    return [
        row_of(record, contents["runs"][record["run"]], published["cases"].get(case_id, {}))
        for case_id, record in contents["cases"].items()
        if record["case"]["suite"] not in LAYER_SUITES
    ]


def row_of(record: dict[str, Any], run: dict[str, Any], published: dict[str, Any]) -> Row:
    case = Case(**record["case"])
    measured = record["systems"]
    us = {name: figures["us"] for name, figures in measured.items()}
    missing = {name: figures for name, figures in published.items() if name not in us}
    for name, figures in missing.items():
        us[name] = figures["us"] if "us" in figures else flops(case) / figures["tflops"] / 1e6
    graphs = {name: figures["graph_us"] for name, figures in measured.items()}
    ours = measured.get(OURS)
    return Row(
        case=case,
        load=Workload(**record["workload"]),
        ceilings=Ceilings(**run["ceilings"]),
        us=us,
        graph_us={name: value for name, value in graphs.items() if value is not None},
        spread=(max(ours["rounds"]) - min(ours["rounds"])) / ours["us"] if ours else None,
        published=frozenset(missing),
    )


def load_published() -> dict[str, Any]:
    return json.loads(PUBLISHED.read_text())


def ours_over_ours(rows: Sequence[Row], **changed: str) -> dict[str, float]:
    """Our time over ours of the case with fields changed, by the row's name; where there is one."""
    us = {row.case: row.us[OURS] for row in rows if OURS in row.us}
    ratios = {}
    for row in rows:
        other = replace(row.case, **changed)
        if row.case in us and other in us and other != row.case:
            ratios[row.name] = us[row.case] / us[other]
    return ratios


def number(us: float | None) -> str:
    return "-" if us is None else f"{us:.1f}" if us < 1000 else f"{us:.0f}"
