"""Tables from results. Figures come from the JSON alone; none is typed by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from perf.cases import DTYPES
from perf.rows import Claim, Row, claims_of, number, rows_of
from perf.systems import OURS, named

LOSSES = 20  # that a README lists
Contents = dict[str, Any]


def full_report(contents: Contents) -> str:
    """Everything that was measured on one GPU, as Markdown: perf/results/<gpu>.md."""
    rows = rows_of(contents)
    parts = [
        f"# Measured on one {contents['gpu']}",
        *describe_runs(contents),
        *describe_host(contents["host"]),
        "Microseconds, the median of all samples; the best of the others and its time over ours. "
        "`+-%`: largest less smallest of our rounds. `floor`: bytes at the read rate or arithmetic "
        "at the dense rate, whichever is longer. `run`: the number of the run above.",
        claims_table(claims_of(rows)),
    ]
    numbers = {run: str(i) for i, run in enumerate(contents["runs"], 1)}
    for dtype in DTYPES:
        for kind, is_layer in (("products", False), ("layers", True)):
            mine = [r for r in rows if (r.case.dtype, r.case.is_layer) == (dtype, is_layer)]
            if mine:
                names = [name for name in named(row.case for row in mine) if name != OURS]
                header = ("case", "tokens", "run", "floor", "ours", "+-%", *names, "best", "/ ours")
                lines = [cells(row, numbers[row.run], names) for row in mine]
                parts += [f"## {dtype}, {kind}", markdown(header, lines)]
    missing = reasons(contents["cases"])
    parts += ["## Not measured", "\n".join(f"- {line}" for line in missing)] if missing else []
    return "\n\n".join(parts) + "\n"


def cells(row: Row, run: str, names: Sequence[str]) -> list[str]:
    return [
        row.case.name,
        str(row.case.tokens),
        run,
        number(row.floor),
        number(row.us.get(OURS)),
        "-" if row.spread is None else f"{100 * row.spread:.1f}",
        *(number(row.us.get(name)) for name in names),
        row.best or "-",
        ratio_cell(row),
    ]


def ratio_cell(row: Row) -> str:
    return "-" if row.ratio is None else f"{row.ratio:.2f}"


def claims_table(claims: Iterable[Claim]) -> str:
    header = ("time of the best of the others / ours", "cases", "mean", "worst", "slower", "best")
    return markdown(
        header,
        (
            [
                one.name,
                str(len(one.rows)),
                f"{one.mean:.3f}",
                f"{one.worst:.2f}",
                str(one.slower),
                ", ".join(f"{name} {count}" for name, count in one.leaders),
            ]
            for one in claims
        ),
    )


def readme_part(files: Sequence[Contents]) -> str:
    """What perf/README.md shows: a column of each GPU, and where others are faster."""
    parts = ["\n".join(f"- {line}" for each in files for line in describe_runs(each))]
    parts.append(
        "Time of the best of the others over ours: geometric mean, the worst case in brackets, and "
        "in how many of the cases another is faster."
    )
    parts.append(columns(files))
    for contents in files:
        rows = rows_of(contents)
        found = [row for row in rows if row.ratio is not None and row.ratio < 1]
        losses = sorted(found, key=lambda row: row.ratio or 0)
        if losses:
            title = f"Where others are faster on an {contents['gpu']}: {len(losses)} cases"
            more = len(losses) > LOSSES
            parts.append(f"{title}{f', the first {LOSSES}' if more else ''}.")
            header = ("case", "dtype", "tokens", "us", "best of the others", "its us", "/ ours")
            parts.append(markdown(header, map(loss_cells, losses[:LOSSES])))
    return "\n\n".join(parts)


def columns(files: Sequence[Contents], details: bool = True) -> str:
    """Claims by name, a column of each GPU. details: those of spans of tokens as well."""
    found = {each["gpu"]: {c.name: c for c in claims_of(rows_of(each))} for each in files}
    names = dict.fromkeys(name for claims in found.values() for name in claims)
    lines = [
        [name, *(claim_cell(claims.get(name)) for claims in found.values())]
        for name in names
        if details or "tokens" not in name
    ]
    return markdown(("best of the others / ours", *found), lines)


def claim_cell(claim: Claim | None) -> str:
    if claim is None:
        return "-"
    return f"{claim.mean:.2f} ({claim.worst:.2f}; {claim.slower} of {len(claim.rows)})"


def front_part(files: Sequence[Contents]) -> str:
    """What the project's README shows."""
    names = named(row.case for each in files for row in rows_of(each))
    best = ", ".join(name for name in names if name != OURS)
    return (
        f"Time of the best of the others ({best}) over ours, measured in the same process: "
        "geometric mean, in brackets the worst case and in how many of the cases another is "
        "faster.\n\n"
        f"{columns(files, details=False)}"
    )


def loss_cells(row: Row) -> list[str]:
    ours, best = number(row.us[OURS]), number(row.us[row.best])
    return [
        row.case.name, row.case.dtype, str(row.case.tokens), ours, row.best, best, ratio_cell(row),
    ]  # fmt: skip


def summary(contents: Contents, case_ids: Sequence[str], asked: int) -> str:
    """What a run says at its end: reasons first, so that the end of a long output has the table."""
    records = {case_id: contents["cases"][case_id] for case_id in case_ids}
    missing = reasons(records)
    rows = rows_of({**contents, "cases": records})
    names = named(row.case for row in rows)
    lines = [
        [
            f"{row.case.name} {row.case.dtype}",
            str(row.case.tokens),
            *(number(row.us.get(name)) for name in names),
            ratio_cell(row),
        ]
        for row in rows
    ]
    end = f"{len(records)} of {asked} cases"
    return "\n".join(
        [
            *missing,
            text_table(("case", "tokens", *names, "/ ours"), lines),
            *(f"{c.name}: {c.mean:.3f}, worst {c.worst:.2f}" for c in claims_of(rows)),
            end,
        ]
    )


def reasons(records: Contents) -> list[str]:
    """Why systems are missing, each reason once with the number of its cases, failures first."""
    found: dict[str, list[str]] = {}
    for case_id, record in records.items():
        for name, reason in record["absent"].items():
            found.setdefault(f"{name}: {' '.join(reason.split())}", []).append(case_id)
    lines = [f"{text} (cases: {len(ids)}, first {ids[0]})" for text, ids in found.items()]
    return sorted(lines, key=lambda line: not any(w in line for w in ("FAILED", "WRONG")))


def describe_runs(contents: Contents) -> list[str]:
    """A paragraph on each run: when, with what, how many cases it gave, and its ceilings."""
    used = [record["run"] for record in contents["cases"].values()]
    lines = []
    for number_, (name, run) in enumerate(contents["runs"].items(), 1):
        if name not in used:
            continue
        versions, c = run["versions"], run["ceilings"]
        named = ", ".join(f"{key} {value}" for key, value in versions.items() if key != "images")
        lines.append(
            f"Run {number_}, {contents['gpu']}, {run['date']}, commit {run['commit']}, {named}: "
            f"`{run['command']}`, {used.count(name)} cases. Ceilings: read {c['read_gbs']:.0f} and "
            f"copy {c['copy_gbs']:.0f} GB/s; dense fp8 {c['fp8_tflops']:.0f}, int8 "
            f"{c['int8_tflops']:.0f}, bf16 {c['bf16_tflops']:.0f} TFLOP/s; an empty kernel reads "
            f"{c['empty_us']:.1f} us."
        )
    return lines


def describe_host(host: Contents) -> list[str]:
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


def markdown(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, align, *body))


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


def insert(text: str, part: str, name: str = "perf") -> str:
    """`text` with what is between a name's markers replaced. Raises ValueError without them."""
    first, last = (f"<!-- {name}:{place} -->" for place in ("begin", "end"))
    head, begin, rest = text.partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"the text must hold the markers {first} and {last}")
    return f"{head}{first}\n{part}\n{last}{tail}"
