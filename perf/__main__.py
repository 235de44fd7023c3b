"""`python -m perf`: build, prepare, run, merge, report, host."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from cutlass_moe.choose.heuristics_sm90 import GPU
from cutlass_moe.images.cache import default_cache
from cutlass_moe.images.compiler import Request, build_images
from perf import store
from perf.cases import DTYPES, Case, select
from perf.images import images_of
from perf.machine import ceilings, checkout, versions
from perf.measure import Broken, measure_all
from perf.peers.unpacked import make_importable
from perf.prepare import prepare as prepare_cases
from perf.report import describe_host, front_part, full_report, insert, readme_part, summary
from perf.rows import rows_of
from perf.store import RESULTS, ResultFile, path_of
from perf.systems import LAYERS, PRODUCTS
from perf.training_report import training_part

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "perf/README.md"
TRAINING = "training"  # the folder of its results, and the name of its markers
PAGES = {BENCHMARKS: readme_part, ROOT / "README.md": front_part}
ENDED_EARLY = 3  # exit status of a run that a peer broke: run again, it goes on


def case_options(command: Any) -> Any:
    """The options that select cases."""
    for option in (
        click.option("--first", type=int, help="at most so many cases, in their order"),
        click.option("--tokens", default="", help="numbers"),
        click.option("--dtype", default="", help=f"of {', '.join(DTYPES)}"),
        click.option("--part", default="", help="of up, down, layer"),
        click.option("--model", default="", help="names"),
        click.option("--suite", default="", help="of models, seed, tutorial, deepgemm"),
    ):
        command = option(command)
    return command


commit_option = click.option("--commit", default="", help="name it where this is no git checkout")


def selected(suite: str, model: str, part: str, dtype: str, tokens: str) -> list[Case]:
    """The cases of the options, each a list separated by commas; without one, all."""
    try:
        counts = tuple(map(int, split(tokens)))
        return select(split(suite), split(model), split(part), split(dtype), counts)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def split(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def need_gpu() -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("no CUDA device: prepare, run and host need one")
    os.environ["CUTLASS_MOE_STRICT"] = "1"  # a torch fallback must not pass for a kernel
    make_importable()


@click.group()
def main() -> None:
    """Benchmarks of cutlass_moe against other people's kernels. Options that take several values
    separate them with commas."""


@main.command()
@case_options
@click.option("--gpu", default=GPU, show_default=True, help="what to choose configs for")
@click.option("--jobs", type=int, help="compile workers; default: one a core")
def build(gpu: str, jobs: int | None, first: int | None, **choice: Any) -> None:
    """Compile every image that a run of these cases launches. Needs the DSL, no GPU."""
    requests = [Request(*image) for image in images_of(selected(**choice)[:first], gpu)]
    failed = 0
    for number, result in enumerate(build_images(default_cache(), requests, jobs), 1):
        failed += result.error is not None
        image = f"{result.request.problem.words}, {result.request.config.words}"
        click.echo(f"{number}/{len(requests)} {image}: {result.error or 'there'}")
    if failed:
        raise click.ClickException(f"{failed} of {len(requests)} images were not built")


@main.command()
@case_options
@click.option("--processes", default=os.cpu_count(), show_default=True)
@click.option("--budget", default=120.0, help="seconds after which no further case is begun")
@commit_option
@click.option("--out", type=click.Path(path_type=Path), help="results file of the run to come")
def prepare(
    processes: int, budget: float, commit: str, out: Path | None, first: int | None, **choice: Any
) -> None:
    """Compile what the peers compile at their first launch in a run with the same options.

    Many processes do so at a time.
    """
    need_gpu()
    start = time.monotonic()
    results = open_results(out, about("", commit))
    cases = results.left(selected(**choice))[:first]
    done, failures = prepare_cases(cases, processes, budget)
    for line in failures:
        click.echo(line)
    seconds = time.monotonic() - start
    click.echo(f"{done} of {len(cases)} cases prepared in {seconds:.0f} s")


@main.command()
@case_options
@click.option("--system", default="", help=f"of {', '.join(PRODUCTS)}; default: all")
@click.option("--budget", default=290.0, help="seconds after which no further case is begun")
@commit_option
@click.option("--out", type=click.Path(path_type=Path), help="results file")
def run(
    system: str, budget: float, commit: str, out: Path | None, first: int | None, **choice: Any
) -> None:
    """Measure cases with all systems, and merge the results into perf/results/<gpu>.json.

    The cases come in a fixed order that is fair to all wherever the budget ends it; those that the
    file has of this commit are passed over, so that the same command goes on, and those that it
    has of another one come last. Exit status 3: a peer broke the process, and the command should
    be given again.
    """
    need_gpu()
    start = time.monotonic()
    for name in split(system):
        if name not in PRODUCTS | LAYERS:
            raise click.UsageError(f"system must be one of {', '.join(PRODUCTS)}, got {name!r}")
    limits = ceilings()
    options = {**choice, "first": first, "system": system, "budget": budget}
    command = command_line("run", options)
    results = open_results(out, {**about(command, commit), "ceilings": asdict(limits)})
    cases, done = results.left(selected(**choice))[:first], []
    left = budget - (time.monotonic() - start)
    try:
        for case, record in measure_all(cases, split(system), results.contents["broken"], left):
            results.add_case(case.id, record)
            done.append(case.id)
    except Broken as broken:
        results.add_broken(broken.case.id, broken.system, broken.reason)
        click.echo(str(broken), err=True)
        raise SystemExit(ENDED_EARLY) from broken
    finally:
        click.echo(summary(results.contents, done, len(cases)))


def about(command: str, commit: str) -> dict[str, Any]:
    return {"commit": commit or checkout(), "command": command, "versions": versions()}


def open_results(out: Path | None, this: dict[str, Any]) -> ResultFile:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return ResultFile(out or path_of(gpu), gpu, this)


def command_line(name: str, options: dict[str, Any]) -> str:
    given = (f"--{option} {value}" for option, value in options.items() if value)
    return " ".join(["python -m perf", name, *given])


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def merge(files: tuple[Path, ...]) -> None:
    """Merge results files into those of perf/results: the later run's record of each case stays."""
    for path in files:
        try:
            more = store.load(path)
            target = path_of(more["gpu"])
            merged = store.merge(store.load(target), more) if target.exists() else more
        except ValueError as error:
            raise click.ClickException(str(error)) from error
        store.write(target, merged)
        click.echo(f"{target}: {len(merged['cases'])} cases")


@main.command()
@commit_option
@click.option("--out", type=click.Path(path_type=Path), help="results file")
@click.option("--jit", is_flag=True, help="only the seconds of a cache miss; needs no GPU")
def host(commit: str, out: Path | None, jit: bool) -> None:
    """Measure a warm call's host time and a kernel's cold start."""
    if not jit:
        need_gpu()
    from perf import host as measured  # needs cuda.bindings

    results = open_results(out, about("python -m perf host" + " --jit" * jit, commit))
    if jit:
        results.add_host("jit", measured.jit_seconds())
    else:
        results.add_host("load", measured.load_ms())
        results.add_host("call", measured.call_parts())
    click.echo("\n".join(describe_host(results.contents["host"])))


@main.command()
def report() -> None:
    """Write each GPU's full table and plots, and the parts of both READMEs between the markers."""
    from perf.plots import write_plots, write_training_plot  # needs matplotlib

    paths = sorted(RESULTS.glob("*.json"))
    if not paths:
        raise click.ClickException(f"there must be results in {RESULTS}, got none")
    files = [store.load(path) for path in paths]
    for path, contents in zip(paths, files, strict=True):
        table = path.with_suffix(".md")
        table.write_text(full_report(contents))
        for written in (table, *write_plots(rows_of(contents), path)):
            click.echo(f"wrote {written}")
    for page, part in PAGES.items():
        try:
            page.write_text(insert(page.read_text(), part(files)))
        except ValueError as error:
            raise click.ClickException(f"{page}: {error}") from error
        click.echo(f"wrote {page}")
    trained = sorted((RESULTS / TRAINING).glob("*.json"))
    runs = [json.loads(path.read_text()) for path in trained]
    for path, one in zip(trained, runs, strict=True):
        click.echo(f"wrote {write_training_plot(one, path)}")
    if runs:
        BENCHMARKS.write_text(insert(BENCHMARKS.read_text(), training_part(runs), TRAINING))


if __name__ == "__main__":
    main()
