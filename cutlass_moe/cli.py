"""The shell's side: `cutlass-moe demo | build | list | show-config | clear-cache`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

try:
    import click
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
except ModuleNotFoundError as missing:
    raise SystemExit(f"no module {missing.name!r}: pip install 'cutlass-moe[cli]'") from missing

from cutlass_moe.cache import Cache, default_cache
from cutlass_moe.compiler import CompilerNotInstalled, Request, Result, build_images
from cutlass_moe.heuristics import candidates, choose
from cutlass_moe.shapes import DTYPES, MODELS, problems
from emitters.config import ARCHS, Config, GemmSwapSm90Config, config_from_json, why_illegal
from emitters.image import LaunchRecord, image_key
from emitters.problem import GemmProblem

TOKENS = (1, 16, 128, 1024, 8192)
Parsed = TypeVar("Parsed")

_model = click.Choice(list(MODELS))
_dtype = click.Choice(list(DTYPES))
_jobs = click.option("--jobs", type=click.IntRange(1), help="Compilers at once [default: cores].")
_console = Console(width=None if sys.stdout.isatty() else 120)


@click.group()
@click.version_option(package_name="cutlass-moe")
def main() -> None:
    """Mixture-of-experts grouped GEMM for NVIDIA Hopper: kernel images and a demonstration."""


@main.command()
@click.option("--model", type=_model, default="qwen3-30b", show_default=True)
@click.option("--dtype", type=_dtype, default="fp8", show_default=True)
@click.option("--tokens", type=click.IntRange(1), help="[default: 4096 on a GPU, 4 without]")
@click.option(
    "--topk-ids",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A saved routing: int32 or int64 [tokens, top_k], by numpy.save.",
)
@click.option("--seed", default=0, show_default=True)
@_jobs
def demo(
    model: str, dtype: str, tokens: int | None, topk_ids: Path | None, seed: int, jobs: int | None
) -> None:
    """Compile a model's kernels for sm_90a, run its projections and check them."""
    from cutlass_moe.demo import run  # imports torch

    if tokens and topk_ids:
        raise click.UsageError("either --tokens or --topk-ids: a saved routing has its own tokens")
    shape = MODELS[model]
    try:
        built = _build(default_cache(), _requests(problems(shape, dtype).values()), jobs)
    except CompilerNotInstalled as error:
        _console.print(f"Nothing compiled: {error}", markup=False)
        built = True
    try:
        right = run(shape, dtype, _console, tokens=tokens, topk_ids=topk_ids, seed=seed)
    except (ValueError, TypeError, LookupError) as error:
        raise click.ClickException(str(error)) from error
    if not (built and right):
        raise SystemExit(1)


@main.command()
@click.option("--model", "models", type=_model, multiple=True, help="Repeatable.")
@click.option("--dtype", "dtypes", type=_dtype, multiple=True, help="Repeatable [default: fp8].")
@click.option("--problem", help="One problem, as JSON.")
@click.option("--config", help="The one config for it, as JSON [default: all it may be given].")
@click.option("--arch", type=click.Choice(ARCHS), default=ARCHS[0], show_default=True)
@_jobs
@click.option(
    "--output", type=click.Path(file_okay=False), help="Root directory [default: the cache's]."
)
def build(
    models: tuple[str, ...],
    dtypes: tuple[str, ...],
    problem: str | None,
    config: str | None,
    arch: str,
    jobs: int | None,
    output: str | None,
) -> None:
    """Compile kernel images, without a GPU: those of models, or those of one problem."""
    if bool(models) == bool(problem) or (problem and dtypes) or (models and config):
        raise click.UsageError("either --model (and --dtype), or --problem (and --config)")
    if problem:
        asked = [_parse(GemmProblem.from_json, "--problem", problem)]
    else:
        pairs = [(MODELS[model], dtype) for model in models for dtype in dtypes or ("fp8",)]
        asked = [problem for pair in pairs for problem in problems(*pair).values()]
    configs = [_parse(config_from_json, "--config", config)] if config else None
    cache = Cache([output]) if output else default_cache()
    if not cache.writable:
        raise click.ClickException(f"no permission to write to {cache.root}")
    try:
        built = _build(cache, _requests(asked, configs, arch), jobs)
    except CompilerNotInstalled as error:
        raise click.ClickException(str(error)) from error
    _console.print(f"Images are in {cache.root}", markup=False)
    if not built:
        raise SystemExit(1)


@main.command("list")
@click.argument("roots", nargs=-1, type=click.Path(exists=True, file_okay=False))
def list_images(roots: tuple[str, ...]) -> None:
    """List the images in ROOTS [default: the cache's]."""
    cache = Cache(roots) if roots else default_cache()
    for root in cache.roots:
        table = Table("key", *_IMAGE_COLUMNS, "build", title=str(root))
        for entry in Cache([root]).entries():
            record = entry.record
            table.add_row(
                entry.key[:12],
                *_image_cells(record),
                record.build.removeprefix("nvidia-cutlass-dsl "),
            )
        _console.print(table if table.row_count else f"{root}: no images")


@main.command("show-config")
@click.argument("model", type=_model)
@click.option("--dtype", type=_dtype, default="fp8", show_default=True)
@click.option("--tokens", type=click.IntRange(1), multiple=True, help="Repeatable.")
def show_config(model: str, dtype: str, tokens: tuple[int, ...]) -> None:
    """Show which config serves a model's projections, and what follows from it."""
    columns = ("tokens", "config", "stages", "smem", "threads", "registers", "image")
    shape = MODELS[model]
    for name, problem in problems(shape, dtype).items():
        table = Table(*columns, title=f"{model} {name}: {_problem_words(problem.to_json())}")
        for count in tokens or TOKENS:
            rows = count * shape.top_k
            config = choose(problem, count if problem.gather else rows, rows / shape.num_experts)
            cells = (
                count,
                _config_words(config.to_json()),
                config.pipeline_stages(problem),
                config.smem_bytes(problem),
                config.threads,
                _registers(config),
                image_key(problem, config, ARCHS[0])[:12],
            )
            table.add_row(*map(str, cells))
        _console.print(table)
    _console.print("smem in bytes; registers a thread: producer / consumer, or everyone's")


@main.command("clear-cache")
def clear_cache() -> None:
    """Remove the images from the writable root of the cache."""
    cache = default_cache()
    try:
        count = cache.clear()
    except OSError as error:
        raise click.ClickException(f"{cache.root}: {error}") from error
    _console.print(f"{count} images removed from {cache.root}", markup=False)


_IMAGE_COLUMNS = ("problem", "config", "registers", "spills", "smem")


def _image_cells(record: LaunchRecord) -> list[str]:
    numbers = (record.registers, record.spill_bytes, record.smem_bytes)
    return [_problem_words(record.problem), _config_words(record.config), *map(str, numbers)]


def _problem_words(problem: dict[str, Any]) -> str:
    size = f"E {problem['num_experts']} N {problem['n']} K {problem['k']}"
    nodes = [node["kind"] for node in problem["epilogue"]]
    gather = ["gather"] if problem["gather"] else []
    return " ".join([f"{problem['operand']} > {problem['out']}", size, *gather, *nodes])


def _registers(config: Config) -> str:
    if isinstance(config, GemmSwapSm90Config):
        return str(config.registers)
    return f"{config.producer_registers} / {config.consumer_registers}"


def _config_words(config: dict[str, Any]) -> str:
    tile = f"{config['tile_m']}x{config['tile_n']}"
    if config["template"] == GemmSwapSm90Config.template:
        return f"swap {tile} K/{config['split_k']} {config['ctas_per_sm']}/SM"
    return f"{tile} group {config['group_m']} {config['ctas_per_sm']}/SM"


def _requests(
    asked: Iterable[GemmProblem], configs: Sequence[Config] | None = None, arch: str = ARCHS[0]
) -> list[Request]:
    requests: dict[Request, None] = {}
    for problem in asked:
        chosen = configs or candidates(problem)
        reason = why_illegal(problem, next(iter(chosen), None), arch)
        if reason:
            raise click.ClickException(reason)
        requests.update(dict.fromkeys(Request(problem, config, arch) for config in chosen))
    return list(requests)


def _parse(parse: Callable[[dict[str, Any]], Parsed], option: str, text: str) -> Parsed:
    try:
        return parse(json.loads(text))
    except (ValueError, TypeError) as error:
        raise click.BadParameter(str(error), param_hint=option) from error


def _build(cache: Cache, requests: Sequence[Request], jobs: int | None) -> bool:
    """Compiles what the cache lacks and shows all. False where something failed."""
    results = list(
        track(
            build_images(cache, requests, jobs),
            "Compiling",
            total=len(requests),
            console=_console,
            transient=True,
        )
    )
    table = Table(*_IMAGE_COLUMNS, "seconds")
    for result in results:
        if result.image is not None:
            seconds = "cached" if result.seconds is None else f"{result.seconds:.2f}"
            table.add_row(*_image_cells(result.image.record), seconds)
    _console.print(table)
    failures = [result for result in results if result.error]
    for failure in failures:
        _show_failure(failure)
    return not failures


def _show_failure(failure: Result) -> None:
    request = failure.request
    what = f"{_problem_words(request.problem.to_json())}, {_config_words(request.config.to_json())}"
    _console.print(f"Failed: {what}\n{failure.error}", style="red", markup=False)
