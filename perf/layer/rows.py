"""A results file's layers and chains as rows of figures, and their tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from perf.layer.cases import LayerCase, layer_floor_us
from perf.layer.peers import NO_PDL, ROUTE_REFERENCE
from perf.product.cases import Ceilings
from perf.product.rows import OURS, Table, number
from perf.suites import LAYER_SUITES

TRITON = "triton"
COPIES = ("quantize", "quantize_act", "combine")  # parts that only move bytes
COPY_FACTOR, COPY_US = 1.3, 3.0  # what they may take: so many times a copy's time, and so many us

LAYER_HEADER = (
    "layer, tokens",
    "experts",
    "floor",
    "ours",
    "+-%",
    "triton",
    "ours / triton",
    "error",
    "t. error",
    "route",
    "torch's",
    *COPIES,
    "up",
    "down",
)
CHAIN_HEADER = (
    "chain, tokens; us a layer",
    "floor",
    "ours",
    "+-%",
    NO_PDL,
    TRITON,
    f"ours / {NO_PDL}",
    "ours / triton",
    "error",
    "t. error",
)


@dataclass(frozen=True)
class LayerRow:
    """Microseconds of a layer, of one of the chain's in a chain; and of our layer's parts.

    active_experts: of all layers together. published: the same pipeline's, measured before.
    """

    case: LayerCase
    active_experts: int
    ceilings: Ceilings
    us: dict[str, float]
    errors: dict[str, float]
    spread: float | None
    parts: dict[str, dict[str, float]]
    published: float | None

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def floor(self) -> float:
        return layer_floor_us(self.case, self.active_experts, self.ceilings) / self.case.layers

    def ratio(self, one: str, other: str) -> float | None:
        """Time of one system over another's; None where one of the two is missing."""
        return self.us[one] / self.us[other] if one in self.us and other in self.us else None

    def part(self, name: str) -> float | None:
        return self.parts[name]["us"] if name in self.parts else None

    def allowed(self, part: str) -> float:
        """Microseconds that one of COPIES may take."""
        moved = self.parts[part]["bytes"]
        return COPY_FACTOR * moved / (self.ceilings.copy_gbs * 1e3) + COPY_US


def layer_rows_of(contents: dict[str, Any], published: dict[str, Any]) -> list[LayerRow]:
    """Rows of a results file's layers and chains, in its order."""
    return [
        layer_row_of(record, contents["runs"][record["run"]], published["cases"].get(case_id, {}))
        for case_id, record in contents["cases"].items()
        if record["case"]["suite"] in LAYER_SUITES
    ]


def layer_row_of(
    record: dict[str, Any], run: dict[str, Any], published: dict[str, Any]
) -> LayerRow:
    measured = record["systems"]
    ours = measured.get(OURS)
    return LayerRow(
        case=LayerCase(**record["case"]),
        active_experts=record["workload"]["active_experts"],
        ceilings=Ceilings(**run["ceilings"]),
        us={name: figures["us"] for name, figures in measured.items()},
        errors={name: figures["error"] for name, figures in measured.items()},
        spread=(max(ours["rounds"]) - min(ours["rounds"])) / ours["us"] if ours else None,
        parts=record["parts"],
        published=published.get(TRITON, {}).get("us"),
    )


def layer_tables(rows: Sequence[LayerRow]) -> list[Table]:
    """Whole layers with our parts beside them, and chains."""
    layers = [layer_cells(row) for row in rows if row.case.suite == "layer"]
    chains = [chain_cells(row) for row in rows if row.case.suite == "chain"]
    return [(LAYER_HEADER, layers), (CHAIN_HEADER, chains)]


def layer_cells(row: LayerRow) -> list[str]:
    """Under LAYER_HEADER."""
    return [
        row.name,
        str(row.active_experts),
        *times(row, OURS, TRITON),
        ratio(row, TRITON),
        *errors(row),
        number(row.part("route")),
        number(row.part(ROUTE_REFERENCE)),
        *(copy_cell(row, part) for part in COPIES),
        number(row.part("up")),
        number(row.part("down")),
    ]


def chain_cells(row: LayerRow) -> list[str]:
    """Under CHAIN_HEADER."""
    return [
        row.name,
        *times(row, OURS, NO_PDL, TRITON),
        ratio(row, NO_PDL),
        ratio(row, TRITON),
        *errors(row),
    ]


def times(row: LayerRow, *systems: str) -> Iterable[str]:
    """The floor and each system's time, ours with its spread."""
    yield number(row.floor)
    for system in systems:
        yield number(row.us.get(system))
        if system == OURS:
            yield "-" if row.spread is None else f"{100 * row.spread:.1f}"


def ratio(row: LayerRow, other: str) -> str:
    value = row.ratio(OURS, other)
    return "-" if value is None else f"{value:.2f}"


def errors(row: LayerRow) -> list[str]:
    return [f"{row.errors[s]:.1e}" if s in row.errors else "-" for s in (OURS, TRITON)]


def copy_cell(row: LayerRow, part: str) -> str:
    """Its time and, in brackets, its bytes' rate in GB/s."""
    us = row.part(part)
    return "-" if us is None else f"{us:.1f} ({row.parts[part]['bytes'] / us / 1e3:.0f})"
