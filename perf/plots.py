"""Plots of a GPU's results: the layers of the README's figure, every case's ratio, training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from perf.cases import DTYPES, FIGURE_MODELS, FIGURE_TOKENS
from perf.rows import Row
from perf.systems import LAYERS, OURS, PRODUCTS
from perf.training_report import TORCH, Report, times

COLORS = {
    name: f"tab:{color}"
    for name, color in zip(
        PRODUCTS,
        ("red", "cyan", "blue", "purple", "green", "olive", "orange", "pink", "gray", "brown"),
        strict=True,
    )
}
MARKERS = dict(zip(DTYPES, "os^Dvp", strict=True))
STYLE = {
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "perf",  # else every run writes other ids
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def write_plots(rows: Sequence[Row], results: Path) -> list[Path]:
    """SVGs beside the results file: -layer, where layers have two token counts, and -ratios."""
    layers = [
        row
        for row in rows
        if (row.case.part, row.case.dtype, row.case.routing) == ("layer", "fp8", "balanced")
        and row.case.model in FIGURE_MODELS
        and row.case.tokens in FIGURE_TOKENS
        and OURS in row.us
    ]
    drawn = {"ratios": plot_ratios([row for row in rows if row.ratio is not None])}
    if len({row.case.tokens for row in layers}) > 1:
        drawn["layer"] = plot_layers(layers)
    written = []
    for name, figure in drawn.items():
        path = results.with_name(f"{results.stem}-{name}.svg")
        with matplotlib.rc_context(STYLE):
            figure.savefig(path, facecolor="white", metadata={"Date": None})
        written.append(path)
    return written


def plot_layers(rows: Sequence[Row]) -> Figure:
    """A panel for each model: time over tokens, the floor below it, and how many times as long as
    ours the best of the others takes."""
    models = list(dict.fromkeys(row.case.model for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.2 * len(models), 3.7))
        figure.subplots_adjust(
            left=0.2 / len(models), right=0.99, top=0.76, bottom=0.14, wspace=0.22
        )
        grid = figure.subplots(1, len(models), squeeze=False)[0]
        for axes, model in zip(grid, models, strict=True):
            draw_layers(axes, [row for row in rows if row.case.model == model])
            axes.set_title(f"{model}, {rows[0].case.dtype}", fontsize=10)
        grid[0].set_ylabel("microseconds of one layer")
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=3, frameon=False)
    return figure


def draw_layers(axes: Any, rows: Sequence[Row]) -> None:
    tokens, floors = [row.case.tokens for row in rows], [row.floor for row in rows]
    lowest = min(*floors, *(row.us[OURS] for row in rows)) / 1.6
    for system in reversed(LAYERS):
        some = [row for row in rows if system in row.us]
        if some:
            axes.plot(
                [row.case.tokens for row in some], [row.us[system] for row in some],
                color=COLORS[system], marker="o", markersize=4, label=system,
                linewidth=2.0 if system == OURS else 1.2,
            )  # fmt: skip
    label = "below the floor: bytes and flops alone take longer"
    axes.fill_between(tokens, floors, lowest, color="0.88", label=label)
    for row in rows:
        if row.ratio is not None:
            axes.annotate(
                f"{row.ratio:.2f}x", (row.case.tokens, row.us[row.best]), (-4, 4), fontsize=8,
                textcoords="offset points", ha="right", color=COLORS[row.best],
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="tokens", xticks=tokens)
    axes.set(xlim=(tokens[0] / 8, tokens[-1] * 2.2), ylim=(lowest, None))
    axes.margins(y=0.12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def plot_ratios(rows: Sequence[Row]) -> Figure:
    """Every case: time of the best of the others over ours, in the colour of that one."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4), layout="tight")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, kind, is_layer in zip(panels, ("products", "layers"), (False, True), strict=True):
            mine = [row for row in rows if row.case.is_layer == is_layer]
            for best, dtype in dict.fromkeys((row.best, row.case.dtype) for row in mine):
                some = [row for row in mine if (row.best, row.case.dtype) == (best, dtype)]
                axes.scatter(
                    [row.case.tokens for row in some], [row.ratio for row in some], s=14,
                    color=COLORS[best], marker=MARKERS[dtype], label=f"{best}, {dtype}", alpha=0.7,
                )  # fmt: skip
            axes.axhline(1.0, color="0.4", linewidth=0.8)
            axes.set(xscale="log", xlabel="tokens", title=kind)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=6, ncols=2)
        panels[0].set_ylabel("best of the others / ours")
    return figure


def write_training_plot(report: Report, path: Path) -> Path:
    """Writes an SVG beside a file of results of training."""
    drawn = path.with_suffix(".svg")
    with matplotlib.rc_context(STYLE):
        plot_training(report).savefig(drawn, facecolor="white", metadata={"Date": None})
    return drawn


def plot_training(report: Report) -> Figure:
    """Bars of forward and backward, ours beside torch's, both relative to ours of the case."""
    cases = [one for one in report["cases"] if times(one) is not None]
    figure = Figure(figsize=(8, 0.5 + 0.45 * len(cases)), layout="tight")
    axes = figure.subplots()
    for at, one in enumerate(cases):
        whole = one["systems"][OURS]["both_us"]
        for name, offset in ((OURS, -0.2), (TORCH, 0.2)):
            found, begin = one["systems"][name], 0.0
            for way, alpha in (("forward", 0.6), ("backward", 1.0)):
                share = found[f"{way}_us"] / whole
                label = f"{name}, {way}" if not at else None
                axes.barh(
                    at + offset, share, 0.36, begin, color=COLORS[name], alpha=alpha, label=label
                )
                begin += share
            milliseconds = f"{found['both_us'] / 1000:.1f} ms"
            axes.annotate(milliseconds, (begin, at + offset), (3, 0), textcoords="offset points",
                          va="center", fontsize=8)  # fmt: skip
    names = [f"{one['case']['name']}, {one['case']['tokens']:,} tokens" for one in cases]
    axes.set_yticks(range(len(cases)), names)
    axes.invert_yaxis()
    axes.set_xlabel("time of a layer forward and backward, over ours")
    axes.margins(x=0.1)
    above = {"loc": "lower center", "bbox_to_anchor": (0.4, 1.0)}
    axes.legend(frameon=False, fontsize=8, ncols=4, **above)
    return figure
