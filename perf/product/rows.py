"""A results file's products as rows, with peers' published figures where the run has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from perf.product.cases import ProductCase, Workload, floor64_us, floor_us, flops, moved_bytes
from perf.rows import DAGGER, Row, measured
from perf.systems import OURS, TRITON

RIVALS = (TRITON, "torch", "deepgemm", "quack", "padded_bmm")  # what a user could call instead


@dataclass(frozen=True)
class ProductRow(Row[ProductCase]):
    """published: systems whose time is not of the run."""

    load: Workload
    graph_us: dict[str, float]
    published: frozenset[str]

    @property
    def floor(self) -> float:
        return floor_us(self.case, self.load, self.ceilings)

    @property
    def floor64(self) -> float:
        return floor64_us(self.case, self.load, self.ceilings)

    @property
    def best_rival(self) -> str | None:
        rivals = [name for name in RIVALS if name in self.us]
        return min(rivals, key=lambda name: self.us[name]) if rivals else None

    @property
    def speedup(self) -> float | None:
        """The best rival's time over ours; None where one of the two is missing."""
        best = self.best_rival
        return self.ratio(best, OURS) if best else None

    def tflops(self, system: str) -> float:
        return flops(self.case) / self.us[system] / 1e6

    def gbs(self, system: str) -> float:
        """Bytes that the product must move, by the system's time."""
        return moved_bytes(self.case, self.load) / self.us[system] / 1e3

    def mark(self, system: str | None) -> str:
        """A dagger where the system's time is a published one."""
        return DAGGER if system in self.published else ""


def product_row_of(
    record: dict[str, Any], run: dict[str, Any], published: dict[str, Any]
) -> ProductRow:
    """published: the case's figures by system."""
    case = ProductCase(**record["case"])
    fields = measured(record, run)
    us = fields.pop("us")
    missing = {name: system for name, system in published.items() if name not in us}
    for name, system in missing.items():
        us[name] = system["us"] if "us" in system else flops(case) / system["tflops"] / 1e6
    graphs = {name: system["graph_us"] for name, system in record["systems"].items()}
    return ProductRow(
        case=case,
        us=us,
        **fields,
        load=Workload(**record["workload"]),
        graph_us={name: value for name, value in graphs.items() if value is not None},
        published=frozenset(missing),
    )


def ours_over_ours(rows: Sequence[ProductRow], **changed: Any) -> dict[str, float]:
    """Our time over ours of the case with fields changed, by the row's name; where there is one."""
    us = {row.case: row.us[OURS] for row in rows if OURS in row.us}
    ratios = {}
    for row in rows:
        other = replace(row.case, **changed)
        if row.case in us and other in us and other != row.case:
            ratios[row.name] = us[row.case] / us[other]
    return ratios
