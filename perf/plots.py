"""Plots of results: time and rate against tokens, with the floors drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from perf.cases import flops
from perf.rows import DAGGER, OURS, RIVALS, Row

COLORS = {
    OURS: "tab:red",
    "triton": "tab:blue",
    "torch": "tab:orange",
    "deepgemm": "tab:green",
    "quack": "tab:purple",
    "padded_bmm": "tab:brown",
}
RATE_TOKENS = 128  # where plots of rates begin: before, all are near zero


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
    figure = Figure(figsize=(6.5 * len(gemms), 9), layout="tight")
    grid = figure.subplots(2, len(gemms), squeeze=False)
    for column, gemm in enumerate(gemms):
        mine = sorted((r for r in rows if r.case.gemm == gemm), key=lambda row: row.case.tokens)
        draw_us(grid[0][column], mine)
        draw_tflops(grid[1][column], [r for r in mine if r.case.tokens >= RATE_TOKENS] or mine)
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
    axes.set(yscale="log", ylabel="us", ylim=(lowest / 1.5, None))
    finish(axes, tokens)


def draw_tflops(axes: Any, rows: Sequence[Row]) -> None:
    tokens = [row.case.tokens for row in rows]
    floors = [row.floor for row in rows]
    floors64 = [row.floor64 for row in rows]
    for name, us, style in (("floor", floors, "--"), ("floor64", floors64, "-.")):
        bound = [flops(row.case) / least / 1e6 for row, least in zip(rows, us, strict=True)]
        axes.plot(tokens, bound, color="0.6", linestyle=style, label=f"at {name}")
    for system in (OURS, *RIVALS):
        draw(axes, system, [(r.case.tokens, r.tflops(system), r) for r in rows if system in r.us])
    axes.set(ylabel="TFLOP/s", ylim=(0, None))
    finish(axes, tokens)


def finish(axes: Any, tokens: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.tick_params(axis="x", labelrotation=45)
    axes.set_xlabel("tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def draw(axes: Any, system: str, points: Sequence[tuple[int, float, Row]]) -> None:
    """A line of one system; points with a dagger alone where its figures are published ones."""
    if not points:
        return
    foreign = all(system in row.published for _, _, row in points)
    axes.plot(
        [tokens for tokens, _, _ in points],
        [value for _, value, _ in points],
        color=COLORS[system],
        marker="x" if foreign else "o",
        linestyle="none" if foreign else "-",
        label=system + (f" {DAGGER}" if foreign else ""),
    )
