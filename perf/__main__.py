"""`python -m perf`: run, host, build, report."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from cutlass_moe.images.cache import default_cache
from cutlass_moe.images.compiler import Request, build_images
from cutlass_moe.models.shapes import DTYPES
from perf import store, suites
from perf.cases import BenchCase
from perf.images import images_of
from perf.machine import ceilings, checkout, versions
from perf.measure import KNOWN_SYSTEMS, measure_all
from perf.product.cases import PREFILL_TOKENS, ROUTINGS, seed_cases
from perf.report import describe_host, full_report, insert, readme_table, rows_of, summary
from perf.store import ResultFile, default_path
from perf.suites import GEMM_MODELS, GEMM_TOKENS, POWERS_OF_TWO, SUITES

TOKENS = {"all": POWERS_OF_TWO, "prefill": PREFILL_TOKENS}
README = Path(__file__).with_name("README.md")


def case_options(command: Any) -> Any:
    """The options that select cases."""
    for option in reversed(
        (
            click.option("--suite", default="all", help=f"all, or of {', '.join(SUITES)}"),
            click.option(
                "--model",
                default=",".join(GEMM_MODELS),
                help="of the suites gemm, decode, schedules and layer",
            ),
            click.option(
                "--dtype", default="", help="of fp8, int8, bf16; default: each suite's own"
            ),
            click.option(
                "--tokens",
                default=",".join(map(str, GEMM_TOKENS)),
                help=f"of the gemm suite: counts, or {' or '.join(TOKENS)}",
            ),
            click.option(
                "--routing",
                default="balanced",
                help=f"of {', '.join(ROUTINGS)}; tutorial and schedules have their own",
            ),
        )
    ):
        command = option(command)
    return command


commit_option = click.option("--commit", default="", help="name it where this is no git checkout")


def selected(suite: str, model: str, dtype: str, tokens: str, routing: str) -> list[BenchCase]:
    """The cases of the options, each a list separated by commas."""
    try:
        counts = TOKENS[tokens] if tokens in TOKENS else tuple(map(int, split(tokens)))
        return suites.select(
            SUITES if suite == "all" else split(suite),
            split(model),
            split(dtype),
            counts,
            split(routing),
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def split(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def need_gpu() -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("no CUDA device: run and host measure on one")
    os.environ["CUTLASS_MOE_STRICT"] = "1"  # a torch fallback must not pass for a kernel


@click.group()
def main() -> None:
    """Benchmarks of cutlass_moe. Options that take several values separate them with commas."""


@main.command()
@case_options
@click.option("--system", default="all", help="each suite's own, or of cutlass_moe, triton ...")
@click.option("--budget", default=290.0, help="seconds after which no further case is begun")
@commit_option
@click.option("--out", type=click.Path(path_type=Path), help="results file")
def run(system: str, budget: float, commit: str, out: Path | None, **choice: str) -> None:
    """Measure cases and their peers, and merge the results into perf/results/<gpu>.json."""
    need_gpu()
    cases = selected(**choice)
    systems = () if system == "all" else split(system)
    for name in systems:
        if name not in KNOWN_SYSTEMS:
            known = ", ".join(KNOWN_SYSTEMS)
            raise click.UsageError(f"system must be one of {known}, got {name!r}")
    limits = ceilings()
    command = command_line("run", {**choice, "system": system, "budget": str(budget)})
    this = {**about(command, commit), "ceilings": asdict(limits)}
    store = ResultFile(out or default_path(this["versions"]["gpu"]), this)
    done = []
    for case, record in measure_all(cases, systems, limits, budget):
        store.add_case(case.id, record)
        done.append(case.id)
        click.echo(f"{len(done)}/{len(cases)} {case.id}", err=True)
    click.echo(summary(store.contents, done, len(cases)))


def about(command: str, commit: str) -> dict[str, Any]:
    return {"commit": commit or checkout(), "command": command, "versions": versions()}


def command_line(name: str, options: dict[str, str]) -> str:
    given = (f"--{option} {value}" for option, value in options.items() if value)
    return " ".join(["python -m perf", name, *given])


@main.command()
@commit_option
@click.option("--out", type=click.Path(path_type=Path), help="results file")
@click.option("--jit", is_flag=True, help="only the seconds of a cache miss; needs no GPU")
def host(commit: str, out: Path | None, jit: bool) -> None:
    """Measure a warm call's host time and a kernel's cold start."""
    if not jit:
        need_gpu()
    from perf import host as measured  # needs cuda.bindings

    this = about("python -m perf host" + " --jit" * jit, commit)
    store = ResultFile(out or default_path(this["versions"]["gpu"]), this)
    if jit:
        store.add_host("jit", measured.jit_seconds(seed_cases(DTYPES, ["balanced"])))
    else:
        store.add_host("load", measured.load_ms())
        store.add_host("call", measured.call_parts())
    click.echo("\n".join(describe_host(store.contents["host"])))


@main.command()
@case_options
@click.option("--jobs", type=int, help="compile workers; default: one a core")
def build(jobs: int | None, **choice: str) -> None:
    """Compile every image that a run of these cases may launch. Needs the DSL, no GPU."""
    requests = [Request(*image) for image in images_of(selected(**choice))]
    failed = 0
    for number, result in enumerate(build_images(default_cache(), requests, jobs), 1):
        failed += result.error is not None
        image = f"{result.request.problem.words}, {result.request.config.words}"
        click.echo(f"{number}/{len(requests)} {image}: {result.error or 'there'}")
    if failed:
        raise click.ClickException(f"{failed} of {len(requests)} images were not built")


@main.command()
@click.option("--results", type=click.Path(path_type=Path, exists=True), help="results file")
@click.option("--readme", type=click.Path(path_type=Path, exists=True), default=README)
def report(results: Path | None, readme: Path) -> None:
    """Write plots, the figure of the project's README, the full table and perf/README.md's tables
    from a results file."""
    from perf.plots import write_door, write_plots  # needs matplotlib

    found = [results] if results else sorted(store.RESULTS.glob("*.json"))
    if len(found) != 1:
        raise click.ClickException(
            f"there must be one results file, got {len(found)}: name it with --results"
        )
    path = found[0]
    contents = store.load(path)
    products, layers = rows_of(contents)
    try:
        text = insert(readme.read_text(), readme_table(contents, products, layers))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    readme.write_text(text)
    table = path.with_suffix(".md")
    table.write_text(full_report(contents, products, layers))
    plots = (*write_plots(products, layers, path), *write_door(layers, path))
    for written in (readme, table, *plots):
        click.echo(f"wrote {written}")


if __name__ == "__main__":
    main()
