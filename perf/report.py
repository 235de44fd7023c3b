"""Tables and plots from results. Figures come from the JSON alone; none is typed by hand.

A system that could not be measured in the run is shown with its figure of published.json, marked
with a dagger, and counts as a peer like the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.cases import Case, Ceilings, Workload, floor_us, flops, moved_bytes

OURS = "cutlass_moe"
RIVALS = ("triton", "torch", "deepgemm", "quack")  # what a user could call instead
PUBLISHED = Path(__file__).with_name("published.json")
BEGIN, END = "<!-- perf:begin -->", "<!-- perf:end -->"
DAGGER = "†"


@dataclass(frozen=True)
class Row:
    """One case's figures in microseconds. published: systems whose time is not of the run."""

    case: Case
    floor: float
    floor64: float
    moved_bytes: int
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
    """Rows of a results file, in its order. `published` is published.json's "cases"."""
    return [
        row_of(record, contents["runs"][record["run"]], published.get(case_id, {}))
        for case_id, record in contents["cases"].items()
    ]


def row_of(record: dict[str, Any], run: dict[str, Any], published: dict[str, Any]) -> Row:
    case = Case(**record["case"])
    load = Workload(**record["workload"])
    ceilings = Ceilings(**run["ceilings"])
    measured = record["systems"]
    us = {name: figures["us"] for name, figures in measured.items()}
    missing = {name: figures for name, figures in published.items() if name not in us}
    for name, figures in missing.items():
        us[name] = figures["us"] if "us" in figures else flops(case) / figures["tflops"] / 1e6
    graphs = {name: figures["graph_us"] for name, figures in measured.items()}
    ours = measured.get(OURS)
    return Row(
        case=case,
        floor=floor_us(case, load, ceilings),
        floor64=floor_us(case, load, ceilings, round_rows=True),
        moved_bytes=moved_bytes(case, load),
        us=us,
        graph_us={name: value for name, value in graphs.items() if value is not None},
        spread=(max(ours["rounds"]) - min(ours["rounds"])) / ours["us"] if ours else None,
        published=frozenset(missing),
    )


def published_cases() -> dict[str, Any]:
    return json.loads(PUBLISHED.read_text())["cases"]


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
    "floor%",
    "x",
)
LEGEND = (
    "us. ours +-%: largest less smallest round; graph, t.graph: a launch inside a graph, ours and "
    "triton's; no gath: torch without its gather; dg/qk: DeepGEMM (fp8) or QuACK (bf16); floor%: "
    f"floor of ours; x: best of the others over ours; {DAGGER}: published, not of this run"
)


def cells(row: Row) -> list[str]:
    """A row of the full table, under HEADER."""

    def us(system: str) -> str:
        mark = DAGGER if system in row.published else ""
        return number(row.us.get(system)) + mark

    ours = row.us.get(OURS)
    return [
        row.name,
        number(row.floor),
        number(row.floor64),
        us(OURS),
        "-" if row.spread is None else f"{100 * row.spread:.1f}",
        "-" if ours is None else f"{row.moved_bytes / ours / 1e3:.0f}",
        "-" if ours is None else f"{row.tflops(OURS):.0f}",
        number(row.graph_us.get(OURS)),
        us("triton"),
        number(row.graph_us.get("triton")),
        us("torch"),
        us("torch_gemm"),
        us("quack" if row.case.dtype == "bf16" else "deepgemm"),
        "-" if ours is None else f"{100 * row.floor / ours:.0f}",
        "-" if row.speedup is None else f"{row.speedup:.2f}",
    ]


def number(us: float | None) -> str:
    return "-" if us is None else f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def text_table(rows: Sequence[Row]) -> str:
    """Columns as narrow as they can be: hundreds of rows fit what a terminal keeps."""
    table = [list(HEADER), *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEADER))]
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
    table = text_table(rows_of({**contents, "cases": records}, published_cases()))
    return "\n".join(
        [*missing, *(describe(contents["runs"][name]) for name in runs), table, LEGEND, end]
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


def full_report(contents: dict[str, Any], rows: Sequence[Row]) -> str:
    """Everything that was measured, as Markdown: perf/results/<gpu>.md."""
    runs = [run for run in contents["runs"].values() if "ceilings" in run]
    parts = [
        "# Measured",
        *(describe(run) for run in runs),
        *describe_host(contents.get("host", {})),
    ]
    parts.append(LEGEND + ".")
    parts.append(markdown(HEADER, (cells(row) for row in rows)))
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


def readme_table(contents: dict[str, Any], rows: Sequence[Row]) -> str:
    """What the README shows: ours against the best other system, tokens across."""
    measured = [row for row in rows if row.speedup is not None and row.case.routing == "balanced"]
    if not measured:
        raise ValueError("no case has both our time and another system's")
    used = {record["run"] for record in contents["cases"].values()}
    parts = [
        describe(contents["runs"][max(used)]),  # named by their dates
        "Microseconds of one grouped product, gather and scales included, and in brackets how many "
        f"times as long the best of Triton, torch, DeepGEMM and QuACK takes ({DAGGER}: a published "
        "figure, not of the run).",
    ]
    gemms = [row for row in measured if row.case.suite == "gemm"]
    for dtype in dict.fromkeys(row.case.dtype for row in gemms):
        parts.append(tokens_table(dtype, [row for row in gemms if row.case.dtype == dtype]))
    others = [row for row in measured if row.case.suite != "gemm"]
    if others:
        header = ("shape", "us", "TFLOP/s", "best other", "times ours")
        parts.append(markdown(header, (shape_cells(row) for row in others)))
    return "\n\n".join(parts)


def tokens_table(dtype: str, rows: Sequence[Row]) -> str:
    tokens = sorted({row.case.tokens for row in rows})
    lines: dict[str, dict[int, str]] = {}
    for row in rows:
        name = f"{row.case.model} {row.case.gemm}"
        mark = DAGGER if row.best_rival in row.published else ""
        lines.setdefault(name, {})[row.case.tokens] = (
            f"{number(row.us[OURS])} ({row.speedup:.2f}{mark})"
        )
    body = ([name, *(line.get(t, "-") for t in tokens)] for name, line in lines.items())
    return markdown((f"{dtype}, tokens", *map(str, tokens)), body)


def shape_cells(row: Row) -> list[str]:
    best = row.best_rival or ""
    case = row.case
    shape = f"{case.suite}: {case.dtype}, {case.num_experts} experts, {case.tokens} tokens"
    mark = DAGGER if best in row.published else ""
    return [
        f"{shape}, N {case.n}, K {case.k}",
        number(row.us[OURS]),
        f"{row.tflops(OURS):.0f}",
        f"{best} {number(row.us[best])}{mark}",
        f"{row.speedup:.2f}",
    ]


def insert(text: str, table: str) -> str:
    """`text` with what is between the markers replaced. Raises ValueError without them."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected the markers {BEGIN} and {END}")
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"
