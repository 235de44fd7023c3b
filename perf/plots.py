"""Plots of results: time and rate against tokens, with the floor drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from perf.cases import flops
from perf.report import DAGGER, OURS, RIVALS, Row

COLORS = {
    OURS: "tab:red",
    "triton": "tab:blue",
    "torch": "tab:orange",
    "deepgemm": "tab:green",
    "quack": "tab:purple",
}


def write_plots(rows: Sequence[Row], results: Path) -> list[Path]:
    """One PNG for each model and dtype of the gemm suite that has two token counts or more."""
    written = []
    chosen = [r for r in rows if r.case.suite == "gemm" and r.case.routing == "balanced"]
    for model, dtype in dict.fromkeys((row.case.model, row.case.dtype) for row in chosen):
        mine = [row for row in chosen if (row.case.model, row.case.dtype) == (model, dtype)]
        if len({row.case.tokens for row in mine}) > 1:
            path = results.with_name(f"{results.stem}-{model}-{dtype}.png")
            plot(mine, f"{model}, {dtype}", path)
            written.append(path)
    return written


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    gemms = list(dict.fromkeys(row.case.gemm for row in rows))
    figure = Figure(figsize=(5.5 * len(gemms), 8), layout="tight")
    grid = figure.subplots(2, len(gemms), squeeze=False)
    for column, gemm in enumerate(gemms):
        mine = sorted((r for r in rows if r.case.gemm == gemm), key=lambda row: row.case.tokens)
        draw_us(grid[0][column], mine)
        draw_tflops(grid[1][column], mine)
        grid[0][column].set_title(f"{title}: {gemm}")
    figure.savefig(path, dpi=100)


def draw_us(axes: Any, rows: Sequence[Row]) -> None:
    tokens = [row.case.tokens for row in rows]
    axes.fill_between(
        tokens, [row.floor for row in rows], 0.1, color="0.9", label="below the floor"
    )
    for system in (OURS, *RIVALS):
        draw(axes, system, [(r.case.tokens, r.us[system], r) for r in rows if system in r.us])
    lowest = min(row.floor for row in rows)
    axes.set(xscale="log", yscale="log", ylabel="us", ylim=(lowest / 1.5, None))
    axes.legend(fontsize=8)


def draw_tflops(axes: Any, rows: Sequence[Row]) -> None:
    tokens = [row.case.tokens for row in rows]
    bound = [flops(row.case) / row.floor / 1e6 for row in rows]
    axes.plot(tokens, bound, color="0.6", linestyle="--", label="at the floor")
    for system in (OURS, *RIVALS):
        draw(axes, system, [(r.case.tokens, r.tflops(system), r) for r in rows if system in r.us])
    axes.set(xscale="log", xlabel="tokens", ylabel="TFLOP/s")
    axes.legend(fontsize=8)


def draw(axes: Any, system: str, points: Sequence[tuple[int, float, Row]]) -> None:
    """A line of one system; dotted and marked where its figures are published ones."""
    if not points:
        return
    foreign = all(system in row.published for _, _, row in points)
    axes.plot(
        [tokens for tokens, _, _ in points],
        [value for _, value, _ in points],
        color=COLORS[system],
        marker="o",
        linestyle=":" if foreign else "-",
        label=system + (f" {DAGGER}" if foreign else ""),
    )
