"""Tables from results. Figures come from the JSON alone; none is typed by hand.

A system that could not be measured in the run is shown with its figure of published.json, marked
with a dagger, and counts as a peer like the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from perf.layer.cases import CHAIN_LAYERS
from perf.layer.figures import layer_figures
from perf.layer.rows import LayerRow, layer_row_of, layer_tables
from perf.product.cases import SCHEDULES
from perf.product.figures import product_figures
from perf.product.rows import ProductRow, ours_over_ours, product_row_of
from perf.rows import DAGGER, FIGURES_HEADER, Table, load_published, number, percent
from perf.suites import GEMM_TOKENS, LAYER_SUITES
from perf.systems import OURS, STREAM, TRITON

BEGIN, END = "<!-- perf:begin -->", "<!-- perf:end -->"

HEADER = (
    "model gemm dtype tokens",
    "floor",
    "floor64",
    "ours",
    "+-%",
    "GB/s",
    "TFLOP/s",
    "graph",
    "triton",
    "t.graph",
    "torch",
    "no gath",
    "dg/qk",
    "yard",
    "floor%",
    "x",
)
LEGEND = (
    "us. ours +-%: largest less smallest round; graph, t.graph: a launch inside a graph, ours and "
    "triton's; no gath: torch without its gather; dg/qk: DeepGEMM (fp8) or QuACK (bf16); yard: "
    "stream, the yardstick, or the tutorial's padded_bmm; floor%: floor of ours; x: best of the "
    "others over ours; quantize, quantize_act, combine: GB/s in brackets; error: relative; "
    f"{DAGGER}: published, not of this run"
)


def rows_of(contents: dict[str, Any]) -> tuple[list[ProductRow], list[LayerRow]]:
    """A results file's products, and its layers and chains, in its order."""
    products, layers = [], []
    published = load_published()["cases"]
    for case_id, record in contents["cases"].items():
        given = record, contents["runs"][record["run"]], published.get(case_id, {})
        if record["case"]["suite"] in LAYER_SUITES:
            layers.append(layer_row_of(*given))
        else:
            products.append(product_row_of(*given))
    return products, layers


def cells(row: ProductRow) -> list[str]:
    """A row of the full table, under HEADER."""

    def us(system: str) -> str:
        return number(row.us.get(system)) + row.mark(system)

    ours = row.us.get(OURS)
    return [
        row.name,
        number(row.floor),
        number(row.floor64),
        us(OURS),
        percent(row.spread),
        "-" if ours is None else f"{row.gbs(OURS):.0f}",
        "-" if ours is None else f"{row.tflops(OURS):.0f}",
        number(row.graph_us.get(OURS)),
        us(TRITON),
        number(row.graph_us.get(TRITON)),
        us("torch"),
        us("torch_gemm"),
        us("quack" if row.case.dtype == "bf16" else "deepgemm"),
        us("padded_bmm" if row.case.suite == "tutorial" else STREAM),
        "-" if ours is None else f"{100 * row.floor / ours:.0f}",
        "-" if row.speedup is None else f"{row.speedup:.2f}",
    ]


SCHEDULES_HEADER = ("schedules", "most rows", "floor64", "ours", *SCHEDULES, "/ balanced")


def tables(rows: Sequence[ProductRow], layers: Sequence[LayerRow]) -> list[Table]:
    """Products, the schedules side by side, layers and chains, and what all come to; none is
    empty."""
    scheduled = [row for row in rows if row.case.suite == "schedules"]
    found: list[Table] = [
        (HEADER, [cells(row) for row in rows if row.case.suite != "schedules"]),
        (SCHEDULES_HEADER, schedule_lines(scheduled)),
        *layer_tables(layers),
        (
            FIGURES_HEADER,
            [figure.cells for figure in (*product_figures(rows), *layer_figures(layers))],
        ),
    ]
    return [(header, lines) for header, lines in found if lines]


def schedule_lines(rows: Sequence[ProductRow]) -> list[list[str]]:
    """Microseconds of our own choice and of each schedule, under SCHEDULES_HEADER."""
    ratios = ours_over_ours(rows, routing="balanced")
    return [
        [
            row.name,
            str(row.load.max_rows),
            number(row.floor64),
            *(number(row.us.get(name)) for name in (OURS, *SCHEDULES)),
            f"{ratios[row.name]:.2f}" if row.name in ratios else "-",
        ]
        for row in rows
    ]


def text_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Columns as narrow as they can be: hundreds of rows fit what a terminal keeps."""
    table = [header, *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    return "\n".join(
        " ".join(
            [
                line[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in table
    )


def summary(contents: dict[str, Any], case_ids: Sequence[str], asked: int) -> str:
    """What a run says at its end: reasons first, so that the end of a long output has the table."""
    records = {case_id: contents["cases"][case_id] for case_id in case_ids}
    runs = dict.fromkeys(record["run"] for record in records.values())
    missing = reasons(records)
    broken = sum(line.startswith(("FAILED", "WRONG")) for line in missing)
    end = f"{len(records)} of {asked} cases"
    end += ", STOPPED by the budget" if len(records) < asked else ""
    end += f", {broken} kinds of FAILED or WRONG, see above the table" if broken else ""
    done = {**contents, "cases": records}
    texts = (text_table(*table) for table in tables(*rows_of(done)))
    return "\n".join(
        [*missing, *(describe(contents["runs"][name]) for name in runs), LEGEND, *texts, end]
    )


def reasons(records: dict[str, Any]) -> list[str]:
    """Why systems are missing, each reason once with the number of its cases, failures first."""
    found: dict[str, list[str]] = {}
    for case_id, record in records.items():
        for name, reason in record["absent"].items():
            found.setdefault(f"{reason}: {name}", []).append(case_id)
    lines = [f"{text} (cases: {len(ids)}, first {ids[0]})" for text, ids in found.items()]
    return sorted(lines, key=lambda line: not line.startswith(("FAILED", "WRONG")))


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, align, *body))


def full_report(
    contents: dict[str, Any], rows: Sequence[ProductRow], layers: Sequence[LayerRow]
) -> str:
    """Everything that was measured, as Markdown: perf/results/<gpu>.md."""
    runs = [run for run in contents["runs"].values() if "ceilings" in run]
    parts = [
        "# Measured",
        *(describe(run) for run in runs),
        *describe_host(contents.get("host", {})),
    ]
    parts.append(LEGEND + ".")
    parts += [markdown(*table) for table in tables(rows, layers)]
    missing = reasons(contents["cases"])
    parts += ["Not measured:", "\n".join(f"- {line}" for line in missing)] if missing else []
    return "\n\n".join(parts) + "\n"


def describe(run: dict[str, Any]) -> str:
    """One paragraph on a run: where, when, with what, and the ceilings it saw."""
    versions, c = run["versions"], run["ceilings"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "cuda", "driver", "triton"))
    return (
        f"{versions['gpu']}, {run['date']}, commit {run['commit']}, {named}: `{run['command']}`. "
        f"Ceilings: read {c['read_gbs']:.0f} and copy {c['copy_gbs']:.0f} GB/s; dense fp8 "
        f"{c['fp8_tflops']:.0f}, int8 {c['int8_tflops']:.0f}, bf16 {c['bf16_tflops']:.0f} TFLOP/s; "
        f"an empty kernel reads {c['empty_us']:.1f} us."
    )


def describe_host(host: dict[str, Any]) -> list[str]:
    """A line for each part that `python -m perf host` measured."""
    units = {
        "call": "us, a warm eager call",
        "load": "ms, a kernel from disk",
        "jit": "s, a cache miss",
    }
    return [
        f"{units[part]}: "
        + ", ".join(f"{name} {value}" for name, value in figures.items() if name != "run")
        for part, figures in host.items()
    ]


def readme_table(
    contents: dict[str, Any], rows: Sequence[ProductRow], layers: Sequence[LayerRow]
) -> str:
    """What perf/README.md shows: ours against the best other system, tokens across."""
    shown = ("balanced", "ragged")
    measured = [row for row in rows if row.speedup is not None and row.case.routing in shown]
    if not measured and not layers:
        raise ValueError("no case has both our time and another system's")
    used = sorted({record["run"] for record in contents["cases"].values()})
    parts = [
        "\n".join(f"- {describe(contents['runs'][name])}" for name in used),
        "Microseconds of one grouped product, gather and scales included, and in brackets how many "
        "times as long the best of our own Triton kernel, torch, DeepGEMM and QuACK takes "
        f"({DAGGER}: a published figure, not of the run).",
    ]
    gemms = [r for r in measured if r.case.suite == "gemm" and r.case.tokens in GEMM_TOKENS]
    for dtype in dict.fromkeys(row.case.dtype for row in gemms):
        parts.append(tokens_table(dtype, [row for row in gemms if row.case.dtype == dtype]))
    others = [row for row in measured if row.case.suite != "gemm"]
    if others:
        header = ("shape", "us", "TFLOP/s", "best other", "times ours")
        parts.append(markdown(header, (shape_cells(row) for row in others)))
    for suite, title in (
        ("layer", "Microseconds of a whole layer, quantisation and routing table included"),
        ("chain", f"Microseconds of a layer in a graph of {CHAIN_LAYERS}, expert ids made inside"),
    ):
        found = [row for row in layers if row.case.suite == suite and row.ratio(TRITON, OURS)]
        if found:
            parts.append(
                f"{title}, and in brackets how many times as long our own Triton pipeline takes."
            )
            parts.append(across("tokens", map(layer_cell, found)))
    return "\n\n".join(parts)


def layer_cell(row: LayerRow) -> tuple[str, int, str]:
    text = f"{number(row.us[OURS])} ({row.ratio(TRITON, OURS):.2f})"
    return f"{row.case.model} {row.case.dtype}", row.case.tokens, text


def tokens_table(dtype: str, rows: Sequence[ProductRow]) -> str:
    return across(f"{dtype}, tokens", map(product_cell, rows))


def product_cell(row: ProductRow) -> tuple[str, int, str]:
    text = f"{number(row.us[OURS])} ({row.speedup:.2f}{row.mark(row.best_rival)})"
    return f"{row.case.model} {row.case.gemm}", row.case.tokens, text


def across(title: str, cells: Iterable[tuple[str, int, str]]) -> str:
    """A table of (line, tokens, text): tokens across."""
    lines: dict[str, dict[int, str]] = {}
    for name, count, text in cells:
        lines.setdefault(name, {})[count] = text
    tokens = sorted({count for line in lines.values() for count in line})
    body = ([name, *(line.get(t, "-") for t in tokens)] for name, line in lines.items())
    return markdown((title, *map(str, tokens)), body)


def shape_cells(row: ProductRow) -> list[str]:
    best = row.best_rival or ""
    case = row.case
    shape = f"{case.suite}: {case.dtype}, {case.num_experts} experts, {case.tokens} tokens"
    routing = "" if case.routing == "balanced" else f", {case.routing}"
    return [
        f"{shape}{routing}, N {case.n}, K {case.k}",
        number(row.us[OURS]),
        f"{row.tflops(OURS):.0f}",
        f"{best} {number(row.us[best])}{row.mark(best)}",
        f"{row.speedup:.2f}",
    ]


def insert(text: str, table: str) -> str:
    """`text` with what is between the markers replaced. Raises ValueError without them."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the text must hold the markers {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"
