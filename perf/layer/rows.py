"""A results file's layers and chains as rows, and their tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from perf.layer.cases import ROUTE_REFERENCE, MoeLayerCase, layer_floor_us
from perf.rows import Row, Table, measured, number, percent
from perf.systems import NO_PDL, OURS, TRITON

COPIES = ("quantize", "quantize_act", "combine")  # steps that only move bytes
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
class LayerRow(Row[MoeLayerCase]):
    """Microseconds of a layer, of one of the chain's in a chain; and of our layer's steps.

    active_experts: of all layers together. published: the same pipeline's, measured before.
    """

    active_experts: int
    errors: dict[str, float]
    steps: dict[str, dict[str, float]]
    published: float | None

    @property
    def floor(self) -> float:
        return layer_floor_us(self.case, self.active_experts, self.ceilings) / self.case.layers

    def step_us(self, name: str) -> float | None:
        return self.steps[name]["us"] if name in self.steps else None

    def allowed(self, step: str) -> float:
        """Microseconds that one of COPIES may take."""
        moved = self.steps[step]["bytes"]
        return COPY_FACTOR * moved / (self.ceilings.copy_gbs * 1e3) + COPY_US


def layer_row_of(
    record: dict[str, Any], run: dict[str, Any], published: dict[str, Any]
) -> LayerRow:
    """published: the case's figures by system."""
    return LayerRow(
        case=MoeLayerCase(**record["case"]),
        **measured(record, run),
        active_experts=record["workload"]["active_experts"],
        errors={name: system["error"] for name, system in record["systems"].items()},
        steps=record["steps"],
        published=published.get(TRITON, {}).get("us"),
    )


def layer_tables(rows: Sequence[LayerRow]) -> list[Table]:
    """Whole layers with our steps beside them, and chains."""
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
        number(row.step_us("route")),
        number(row.step_us(ROUTE_REFERENCE)),
        *(copy_cell(row, step) for step in COPIES),
        number(row.step_us("up")),
        number(row.step_us("down")),
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
            yield percent(row.spread)


def ratio(row: LayerRow, other: str) -> str:
    value = row.ratio(OURS, other)
    return "-" if value is None else f"{value:.2f}"


def errors(row: LayerRow) -> list[str]:
    return [f"{row.errors[s]:.1e}" if s in row.errors else "-" for s in (OURS, TRITON)]


def copy_cell(row: LayerRow, step: str) -> str:
    """Its time and, in brackets, its bytes' rate in GB/s."""
    us = row.step_us(step)
    return "-" if us is None else f"{us:.1f} ({row.steps[step]['bytes'] / us / 1e3:.0f})"
