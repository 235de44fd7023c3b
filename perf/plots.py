"""Plots of results: time and rates against tokens, with the floors drawn; the README's figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from perf.layer.rows import LayerRow
from perf.product.cases import DECODE_TOKENS, flops
from perf.product.rows import RIVALS, ProductRow
from perf.rows import DAGGER
from perf.systems import NO_PDL, OURS, STREAM, TRITON

COLORS = {
    OURS: "tab:red",
    TRITON: "tab:blue",
    "torch": "tab:orange",
    "deepgemm": "tab:green",
    "quack": "tab:purple",
    "padded_bmm": "tab:brown",
    STREAM: "0.3",
    NO_PDL: "tab:pink",
}
RATE_TOKENS = 128  # where plots of rates begin: before, all are near zero
DOOR_LABELS = {OURS: "cutlass_moe", TRITON: "our own Triton pipeline"}  # of the README's figure
DOOR_STYLE = {
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "perf",  # else every run writes other ids
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def write_plots(
    rows: Sequence[ProductRow], layers: Sequence[LayerRow], results: Path
) -> list[Path]:
    """PNGs of what has two token counts or more: of the gemm suite one for each model and dtype, of
    whole layers one for each dtype, of chains one."""
    written = []

    def write(draw: Callable[..., Figure], mine: Sequence[Any], *named: str) -> None:
        if len({row.case.tokens for row in mine}) > 1:
            path = results.with_name("-".join([results.stem, *named]) + ".png")
            draw(mine, named).savefig(path, dpi=100)
            written.append(path)

    chosen = [r for r in rows if r.case.suite == "gemm" and r.case.routing == "balanced"]
    for model, dtype in dict.fromkeys((row.case.model, row.case.dtype) for row in chosen):
        mine = [row for row in chosen if (row.case.model, row.case.dtype) == (model, dtype)]
        write(plot, mine, model, dtype)
    whole = [row for row in layers if row.case.suite == "layer"]
    for dtype in dict.fromkeys(row.case.dtype for row in whole):
        write(plot_layers, [row for row in whole if row.case.dtype == dtype], "layer", dtype)
    write(plot_layers, [row for row in layers if row.case.suite == "chain"], "chain")
    return written


def write_door(layers: Sequence[LayerRow], results: Path) -> list[Path]:
    """The README's figure, an SVG: the layers of the first dtype that has two token counts."""
    whole = [row for row in layers if row.case.suite == "layer" and OURS in row.us]
    for dtype in dict.fromkeys(row.case.dtype for row in whole):
        rows = [row for row in whole if row.case.dtype == dtype]
        if len({row.case.tokens for row in rows}) > 1:
            path = results.with_name(f"{results.stem}-layer.svg")
            with matplotlib.rc_context(DOOR_STYLE):
                plot_door(rows).savefig(path, facecolor="white", metadata={"Date": None})
            return [path]
    return []


def plot_door(rows: Sequence[LayerRow]) -> Figure:
    """A panel for each model: time over tokens, the floor below it, and how many times as long as
    ours the other takes."""
    models = list(dict.fromkeys(row.case.model for row in rows))
    figure = Figure(figsize=(3.2 * len(models), 3.5))
    figure.subplots_adjust(left=0.2 / len(models), right=0.99, top=0.80, bottom=0.14, wspace=0.22)
    grid = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(grid, models, strict=True):
        mine = sorted((r for r in rows if r.case.model == model), key=lambda r: r.case.tokens)
        draw_door(axes, mine)
        axes.set_title(f"{model}, {mine[0].case.dtype}", fontsize=10)
    grid[0].set_ylabel("microseconds of one layer")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=3, frameon=False)
    return figure


def draw_door(axes: Any, rows: Sequence[LayerRow]) -> None:
    tokens, floors = [row.case.tokens for row in rows], [row.floor for row in rows]
    lowest = min(*floors, *(row.us[OURS] for row in rows)) / 1.6
    for system, label in reversed(DOOR_LABELS.items()):
        some = [row for row in rows if system in row.us]
        times = [row.us[system] for row in some]
        width = 2.0 if system == OURS else 1.2
        axes.plot(
            [row.case.tokens for row in some], times, color=COLORS[system], marker="o",
            markersize=4, linewidth=width, label=label,
        )  # fmt: skip
    axes.fill_between(
        tokens,
        floors,
        lowest,
        color="0.88",
        label="below the floor: bytes and flops alone take longer",
    )
    for row in rows:
        ratio = row.ratio(TRITON, OURS)
        if ratio is not None:
            axes.annotate(
                f"{ratio:.2f}x", (row.case.tokens, row.us[TRITON]), (-4, 4), fontsize=8,
                textcoords="offset points", ha="right", color=COLORS[TRITON],
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="tokens", xticks=tokens)
    axes.set(xlim=(tokens[0] / 8, tokens[-1] * 2.2), ylim=(lowest, None))
    axes.margins(y=0.12)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def plot(rows: Sequence[ProductRow], named: Sequence[str]) -> Figure:
    gemms = list(dict.fromkeys(row.case.gemm for row in rows))
    draws: tuple[tuple[Callable[..., None], Sequence[ProductRow]], ...] = (
        (draw_us, rows),
        (draw_gbs, [r for r in rows if r.case.tokens <= max(DECODE_TOKENS)]),
        (draw_tflops, [r for r in rows if r.case.tokens >= RATE_TOKENS]),
    )
    drawn = [(draw_one, some) for draw_one, some in draws if some]
    figure = Figure(figsize=(6.5 * len(gemms), 4.5 * len(drawn)), layout="tight")
    grid = figure.subplots(len(drawn), len(gemms), squeeze=False)
    for column, gemm in enumerate(gemms):
        for line, (draw_one, some) in enumerate(drawn):
            mine = sorted((r for r in some if r.case.gemm == gemm), key=lambda r: r.case.tokens)
            draw_one(grid[line][column], mine)
        grid[0][column].set_title(f"{', '.join(named)}: {gemm}")
    return figure


def plot_layers(rows: Sequence[LayerRow], named: Sequence[str]) -> Figure:
    """Time over the floor: one column for each model and dtype."""
    columns = list(dict.fromkeys((row.case.model, row.case.dtype) for row in rows))
    figure = Figure(figsize=(6.5 * len(columns), 9), layout="tight")
    grid = figure.subplots(2, len(columns), squeeze=False)
    for column, (model, dtype) in enumerate(columns):
        mine = [row for row in rows if (row.case.model, row.case.dtype) == (model, dtype)]
        mine = sorted(mine, key=lambda row: row.case.tokens)
        tokens, upper, lower = [row.case.tokens for row in mine], *grid[:, column]
        upper.plot(tokens, [row.floor for row in mine], color="0.6", linestyle="--", label="floor")
        for system in (OURS, NO_PDL, TRITON):
            some = [row for row in mine if system in row.us]
            draw(upper, system, [(row.case.tokens, row.us[system], row) for row in some])
            over = [(row.case.tokens, row.us[system] / row.floor, row) for row in some]
            draw(lower, system, over)
        upper.set(yscale="log", ylabel="us a layer", title=f"{named[0]}: {model}, {dtype}")
        lower.set(ylabel="time / floor", ylim=(0, None))
        finish(upper, tokens)
        finish(lower, tokens)
    return figure


def draw_us(axes: Any, rows: Sequence[ProductRow]) -> None:
    tokens = [row.case.tokens for row in rows]
    axes.fill_between(
        tokens, [row.floor for row in rows], 0.1, color="0.9", label="below the floor"
    )
    for system in (OURS, *RIVALS, STREAM):
        draw(axes, system, [(r.case.tokens, r.us[system], r) for r in rows if system in r.us])
    lowest = min(row.floor for row in rows)
    axes.set(yscale="log", ylabel="us", ylim=(lowest / 1.5, None))
    finish(axes, tokens)


def draw_gbs(axes: Any, rows: Sequence[ProductRow]) -> None:
    """Bytes that the product must move, by each system's time. The yardstick, which reads the
    weights alone, is drawn at the rate of a product that is as fast."""
    tokens = [row.case.tokens for row in rows]
    read = [row.ceilings.read_gbs for row in rows]
    axes.plot(tokens, read, color="0.6", linestyle="--", label="read rate")
    for system in (OURS, *RIVALS, STREAM):
        draw(axes, system, [(r.case.tokens, r.gbs(system), r) for r in rows if system in r.us])
    axes.set(ylabel="GB/s", ylim=(0, None))
    finish(axes, tokens)


def draw_tflops(axes: Any, rows: Sequence[ProductRow]) -> None:
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


def draw(
    axes: Any, system: str, points: Sequence[tuple[int, float, ProductRow | LayerRow]]
) -> None:
    """A line of one system; points with a dagger alone where its figures are published ones."""
    if not points:
        return
    foreign = all(isinstance(row, ProductRow) and system in row.published for _, _, row in points)
    axes.plot(
        [tokens for tokens, _, _ in points],
        [value for _, value, _ in points],
        color=COLORS[system],
        marker="x" if foreign else "o",
        linestyle="none" if foreign else "-",
        label=system + (f" {DAGGER}" if foreign else ""),
    )
