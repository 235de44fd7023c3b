"""The shell's side: `cutlass-moe demo | build | tune | show-config | clear-cache` and more."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from statistics import geometric_mean
from typing import Any, TypeVar

try:
    import click
    from rich.progress import track
    from rich.table import Table
except ModuleNotFoundError as missing:
    raise SystemExit(f"no module {missing.name!r}: pip install 'cutlass-moe[cli]'") from missing

from cutlass_moe.choose import tuned
from cutlass_moe.choose.heuristics_sm90 import choose, estimate, every_config
from cutlass_moe.cli.common import (
    DTYPE_DEFAULT,
    IMAGE_COLUMNS,
    Posed,
    console,
    dtype_choice,
    dtypes_option,
    find_layers,
    image_cells,
    models_option,
    padding,
    posed,
    shard_options,
    training_option,
)
from cutlass_moe.cli.images import COMMANDS
from cutlass_moe.cli.inspect import inspect
from cutlass_moe.images.archive import SUFFIX, pack
from cutlass_moe.images.cache import Cache, default_cache
from cutlass_moe.images.compiler import (
    CompilerNotInstalled,
    Request,
    Result,
    build_images,
    write_manifest,
)
from cutlass_moe.images.roots import UntrustedRoot
from cutlass_moe.models.problems import gemm_problems
from cutlass_moe.tune import measure
from emitters.spec.arch import ARCHS, DEFAULT_ARCH
from emitters.spec.gemm import GemmProblem
from emitters.spec.identity import TOOLCHAINS
from emitters.spec.image import image_key
from emitters.spec.registry import (
    Config,
    Problem,
    as_gemm,
    config_from_json,
    problem_from_json,
    why_illegal,
)

TOKENS = (1, 16, 128, 1024, 8192)
Parsed = TypeVar("Parsed")

_jobs = click.option("--jobs", type=click.IntRange(1), help="Compilers at once [default: cores].")


class _Main(click.Group):
    """Errors of every command that are the operator's to mend are messages, not tracebacks."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (UntrustedRoot, CompilerNotInstalled) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Main)
@click.version_option(package_name="cutlass-moe")
def main() -> None:
    """Mixture-of-experts layers for NVIDIA Hopper: kernel images and a demonstration."""


@main.command()
@click.option("--model", default="qwen3-30b", show_default=True, help="A name or a directory.")
@click.option("--layer", type=click.IntRange(0), help="Whose weights to take from a directory.")
@click.option("--dtype", type=dtype_choice, help=DTYPE_DEFAULT)
@click.option("--tokens", type=click.IntRange(1), help="[default: 4096 on a GPU, 4 without]")
@click.option(
    "--topk-ids",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A saved routing: int32 or int64 [tokens, top_k], by numpy.save.",
)
@click.option("--seed", default=0, show_default=True)
@_jobs
def demo(
    model: str,
    layer: int | None,
    dtype: str | None,
    tokens: int | None,
    topk_ids: Path | None,
    seed: int,
    jobs: int | None,
) -> None:
    """Compile a model's kernels for sm_90a, run its projections and its layer and check them."""
    from cutlass_moe.cli.demo import run  # imports torch

    if tokens and topk_ids:
        raise click.UsageError("either --tokens or --topk-ids: a saved routing has its own tokens")
    layers = find_layers([model])
    dtype = dtype or layers[0].dtype
    try:
        built = _build(default_cache(), _requests(posed(layers, [dtype])), jobs)
    except CompilerNotInstalled as error:
        console.print(f"Nothing compiled: {error}", markup=False)
        built = True
    try:
        right = run(
            layers[0].shape, dtype, console, tokens=tokens, topk_ids=topk_ids, seed=seed,
            model=model, layer=layer,
        )  # fmt: skip
    except (ValueError, TypeError, LookupError, ModuleNotFoundError) as error:
        raise click.ClickException(str(error)) from error
    if not (built and right):
        raise SystemExit(1)


@main.command()
@models_option
@click.option(
    "--shapes",
    "files",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="Repeatable: a .toml or .json list of name, num_experts, top_k, hidden, inter and bias.",
)
@dtypes_option
@shard_options
@training_option
@click.option("--for-tuning", is_flag=True, help="Compile also what `tune` would measure.")
@click.option("--problem", help="One problem, as JSON.")
@click.option("--config", help="The one config for it, as JSON [default: all it may be given].")
@click.option("--arch", type=click.Choice(list(ARCHS)), default=DEFAULT_ARCH, show_default=True)
@click.option(
    "--toolchain",
    type=click.Choice(list(TOOLCHAINS)),
    help="CUDA of the images; cu13 needs an R580 driver [default: the newest of those installed "
    "that a driver here runs].",
)
@_jobs
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Root directory, or archive NAME.zip, packed from NAME.zip.build [default: the cache's].",
)
def build(
    problem: str | None,
    config: str | None,
    arch: str,
    toolchain: str | None,
    jobs: int | None,
    output: Path | None,
    for_tuning: bool,
    training: bool,
    **layers: Any,
) -> None:
    """Compile kernel images, without a GPU: those of models, or those of one problem.

    What exists is not compiled again: a build that was interrupted goes on when it is repeated.
    """
    of_layers = bool(layers["models"] or layers["files"])
    with_layers = for_tuning or training or any(layers.values())
    if of_layers == bool(problem) or (problem and with_layers) or (config and of_layers):
        raise click.UsageError(
            "either --model or --shapes (and --dtype, --tp, --ep, --training, --for-tuning), or "
            "--problem (and --config)"
        )
    if problem:
        parsed = _parse(problem_from_json, "--problem", problem)
        chosen = _parse(config_from_json, "--config", config) if config else None
        configs = [chosen] if chosen else every_config(parsed)
        requests = _requests_of("--problem", parsed, configs, arch)
    else:
        dtypes = layers.pop("dtypes")
        asked = posed(find_layers(**layers), dtypes, training)
        requests = _requests(asked, arch, for_tuning)
    cache = _destination(output)
    try:
        built = _build(cache, requests, jobs, toolchain)
    except KeyboardInterrupt:
        console.print(f"Interrupted: the same command goes on in {cache.root}", markup=False)
        raise SystemExit(130) from None
    console.print(f"Images are in {cache.root}", markup=False)
    if output:
        _finish(cache.root, output, built)
    if not built:
        raise SystemExit(1)


@main.command()
@models_option
@dtypes_option
@shard_options
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default="tuning.json",
    show_default=True,
    help="The table; what it has of other GPUs and problems stays.",
)
def tune(output: Path, dtypes: Sequence[str], **layers: Any) -> None:
    """Measure on the GPU here which configs serve models best, and write a table of them.

    CUTLASS_MOE_TUNING names tables to use, also while `build` runs: it compiles what they choose.
    """
    if not layers["models"]:
        raise click.UsageError("expected --model")
    ratios: list[float] = []
    try:
        for one in posed(find_layers(**layers), dtypes):
            gemm = as_gemm(one.problem)
            if gemm and gemm.activation is None:  # tables take up with and without it for one
                ratios += _tune(str(one), gemm, one.layer.shape.top_k, output)
    except (ValueError, LookupError, OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error
    console.print(f"The table is in {output}", markup=False)
    if ratios:
        console.print(
            f"Without a table, calls take {geometric_mean(ratios):.3f} times as long as the best "
            f"(geometric mean), at worst {max(ratios):.2f} times"
        )


def _tune(name: str, problem: GemmProblem, top_k: int, output: Path) -> list[float]:
    """How many times as long as the best each number of tokens takes without a table."""
    gpu = measure.gpu_name()
    images = measure.find_images(problem, measure.space(problem))
    console.print(
        f"{name}: {len(images.configs)} configs; left out are {images.missing} that may not "
        f"be compiled here and {images.spilling} that spill registers"
    )
    measuring = measure.measure(problem, top_k, images.configs)
    count = len(measure.TOKENS)
    measured = list(track(measuring, "Measuring", count, console=console, transient=True))
    entries = measure.choices(measured)
    tuned.merge(output, {gpu: {tuned.name_of(problem): tuple(entries)}})
    table = Table("tokens", "rows an expert", "config", "us", "without a table")
    ratios = []
    for one, entry in zip(measured, entries, strict=True):
        rows = one.tokens * (1 if problem.gather else top_k)
        us = one.us.get(estimate(problem, rows, one.rows_per_expert, gpu))
        ratios += [] if us is None else [us / min(one.us.values())]
        cells = (f"{one.rows_per_expert:g}", entry.config.words)
        table.add_row(str(one.tokens), *cells, f"{entry.us:.1f}", "" if us is None else f"{us:.1f}")
    console.print(table)
    return ratios


@main.command("show-config")
@click.argument("model")
@click.option("--dtype", type=dtype_choice, help=DTYPE_DEFAULT)
@click.option("--tokens", type=click.IntRange(1), multiple=True, help="Repeatable.")
@shard_options
def show_config(
    model: str, dtype: str | None, tokens: tuple[int, ...], tp: int | None, ep: int | None
) -> None:
    """Show which config serves a model's grouped GEMMs, and what follows from it."""
    columns = ("tokens", "config", "stages", "smem", "threads", "registers", "image")
    (layer,) = find_layers([model], tp, ep)
    shape, dtype = layer.shape, dtype or layer.dtype
    for name, problem in gemm_problems(shape, dtype).items():
        table = Table(*columns, title=f"{shape.name} {name}: {problem.words}")
        for count in tokens or TOKENS:
            rows = count * shape.top_k
            config = choose(problem, count if problem.gather else rows, rows / shape.num_experts)
            cells = (
                count,
                config.words,
                config.pipeline_stages(problem),
                config.smem_bytes(problem),
                config.threads,
                config.thread_registers,
                image_key(problem, config, DEFAULT_ARCH)[:12],
            )
            table.add_row(*map(str, cells))
        console.print(table)
    if layer.words:
        console.print(f"{shape.name}: {layer.words}", markup=False)
    if padded := padding(shape, dtype):
        console.print(padded, markup=False)
    console.print("smem in bytes; registers a thread: producer / consumer, or everyone's")


for _command in (*COMMANDS, inspect):
    main.add_command(_command)


@main.command("env")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def env(as_json: bool) -> None:
    """Show versions, GPUs, driver and roots, and what is missing with the command that mends it."""
    from cutlass_moe.cli.env import show  # imports torch

    show(as_json)


@main.command("clear-cache")
def clear_cache() -> None:
    """Remove the images from the writable root of the cache."""
    cache = default_cache()
    try:
        count = cache.clear()
    except OSError as error:
        raise click.ClickException(f"{cache.root}: {error}") from error
    console.print(f"{count} images removed from {cache.root}", markup=False)


def _requests(
    asked: Iterable[Posed], arch: str = DEFAULT_ARCH, for_tuning: bool = False
) -> list[Request]:
    found: list[Request] = []
    for one in asked:
        configs: Sequence[Config] = every_config(one.problem)
        gemm = as_gemm(one.problem)
        if for_tuning and gemm:
            configs = measure.space(gemm)
        found += _requests_of(str(one), one.problem, configs, arch)
    return list(dict.fromkeys(found))


def _requests_of(
    name: str, problem: Problem, configs: Sequence[Config], arch: str
) -> list[Request]:
    """name: what an error calls the problem."""
    reason = why_illegal(problem, next(iter(configs), None), arch)
    if reason or not configs:
        raise click.ClickException(f"{name}: {reason or 'no config fits'}")
    return [Request(problem, config, arch) for config in configs]


def _destination(output: Path | None) -> Cache:
    """Where to build: the directory of an archive stays beside it, for the next build."""
    cache = default_cache()
    if output:
        archive = output.suffix == SUFFIX
        root = Path(f"{output}.build") if archive else output
        if (archive and output.is_dir()) or (root.exists() and not root.is_dir()):
            raise click.UsageError(f"--output: expected a directory or a .zip file, got {output}")
        cache = Cache([root])
    if not cache.writable:
        raise click.ClickException(f"no permission to write to {cache.root}")
    return cache


def _finish(root: Path, output: Path, built: bool) -> None:
    """The manifest and, where all could be built, the archive."""
    try:
        console.print(f"They are listed in {write_manifest(root)}", markup=False)
        if built and output.suffix == SUFFIX:
            console.print(f"{pack(root, output)} images packed into {output}", markup=False)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def _parse(parse: Callable[[dict[str, Any]], Parsed], option: str, text: str) -> Parsed:
    try:
        return parse(json.loads(text))
    except (ValueError, TypeError) as error:
        raise click.BadParameter(str(error), param_hint=option) from error


def _build(
    cache: Cache, requests: Sequence[Request], jobs: int | None, toolchain: str | None = None
) -> bool:
    """Compiles what the cache lacks and shows all. False where something failed."""
    with closing(build_images(cache, requests, jobs, toolchain)) as building:
        done = track(building, "Compiling", len(requests), console=console, transient=True)
        results = {result.request: result for result in done}
    table = Table(*IMAGE_COLUMNS, "bytes", "seconds")
    size = 0
    for request in requests:
        image, seconds = results[request].image, results[request].seconds
        if image is not None:
            size += len(image.cubin)
            took = "cached" if seconds is None else f"{seconds:.2f}"
            table.add_row(*image_cells(image.record), str(len(image.cubin)), took)
    compiled = sum(result.seconds is not None for result in results.values())
    console.print(table)
    console.print(f"{table.row_count} images, {size / 1e6:.2f} MB; {compiled} compiled now")
    failures = [result for result in results.values() if result.error]
    for failure in failures:
        _show_failure(failure)
    return not failures


def _show_failure(failure: Result) -> None:
    request = failure.request
    what = f"{request.problem.words}, {request.config.words}"
    console.print(f"Failed: {what}\n{failure.error}", style="red", markup=False)
