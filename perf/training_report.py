"""Tables of what `python -m perf.training run` measured. None is typed by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from perf.report import markdown
from perf.systems import OURS

TORCH = "torch"
Report = dict[str, Any]


def full_table(report: Report) -> str:
    """Every system of every case, as Markdown."""
    header = (
        "case", "tokens", "system", "forward us (TFLOP/s)", "backward us (TFLOP/s)", "torch / it",
        "kept GiB", "peak GiB", "largest error",
    )  # fmt: skip
    lines = (line for one in report["cases"] for line in lines_of(one))
    return f"{report['gpu']}\n\n{markdown(header, lines)}"


def lines_of(one: Report) -> Iterator[list[str]]:
    case = one["case"]["name"], f"{one['case']['tokens']:,}"
    for name, found in one["systems"].items():
        ratio = times(one, name)
        yield [
            *case,
            name,
            speed(found, "forward"),
            speed(found, "backward"),
            "-" if ratio is None else f"{ratio:.2f}",
            f"{found['kept']:.2f}",
            f"{found['peak_backward']:.2f}",
            f"{max(found['errors'].values()):.1e}",
        ]
    if one["case"]["published"]:
        forward, backward = one["case"]["published"]
        cells = f"({forward})", f"({backward})"
        yield [*case, "SonicMoE on an H100, published", *cells, *["-"] * 4]
    for name, reason in one["absent"].items():
        yield [*case, name, reason, *["-"] * 5]


def times(one: Report, name: str = OURS) -> float | None:
    """How many times as long as a system torch takes, forward and backward."""
    systems = one["systems"]
    if not {name, TORCH} <= set(systems):
        return None
    return systems[TORCH]["both_us"] / systems[name]["both_us"]


def speed(found: Report, way: str) -> str:
    return f"{found[f'{way}_us']:,.0f} ({found[f'{way}_tflops']:.0f})"


def training_part(reports: list[Report]) -> str:
    """What perf/README.md shows of every GPU."""
    parts = []
    for report in reports:
        runs: dict[str, list[str]] = {}
        for one in report["cases"]:
            run, case = one["run"], one["case"]
            source = f"{run['date']}, commit {run['commit']}, torch {run['torch']}"
            runs.setdefault(source, []).append(f"{case['name']} at {case['tokens']:,}")
        parts += [
            f"{report['gpu']}, `python -m perf.training run`. Torch's time is that of its "
            "`_grouped_mm` under autograd, as transformers uses it.",
            "\n".join(f"- {source}: {', '.join(cases)}." for source, cases in runs.items()),
            full_table(report).partition("\n\n")[2],
        ]
    return "\n\n".join(parts)
