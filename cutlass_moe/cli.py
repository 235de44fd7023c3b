"""The shell's side: `cutlass-moe demo | build | list | show-config | clear-cache`."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
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
from cutlass_moe.compiler import (
    CompilerNotInstalled,
    Request,
    Result,
    build_images,
    write_manifest,
)
from cutlass_moe.heuristics import candidates, choose
from cutlass_moe.models import find_shape, read_shapes
from cutlass_moe.shapes import DTYPES, MODELS, MoeShape, problems
from emitters.config import ARCHS, Config, GemmSwapSm90Config, config_from_json, why_illegal
from emitters.image import TOOLCHAINS, LaunchRecord, image_key
from emitters.problem import GemmProblem

TOKENS = (1, 16, 128, 1024, 8192)
Parsed = TypeVar("Parsed")
_Asked = tuple[str, GemmProblem]  # what an error calls a problem, and the problem


class _Model(click.ParamType):
    """A name in MODELS, a config.json, or a directory that holds one."""

    name = "model"

    def convert(
        self, value: str | MoeShape, param: click.Parameter | None, ctx: click.Context | None
    ) -> MoeShape:
        try:
            return value if isinstance(value, MoeShape) else find_shape(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


_model = _Model()
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
    model: MoeShape,
    dtype: str,
    tokens: int | None,
    topk_ids: Path | None,
    seed: int,
    jobs: int | None,
) -> None:
    """Compile a model's kernels for sm_90a, run its projections and check them."""
    from cutlass_moe.demo import run  # imports torch

    if tokens and topk_ids:
        raise click.UsageError("either --tokens or --topk-ids: a saved routing has its own tokens")
    try:
        built = _build(default_cache(), _requests(_problems([model], [dtype])), jobs)
    except CompilerNotInstalled as error:
        _console.print(f"Nothing compiled: {error}", markup=False)
        built = True
    try:
        right = run(model, dtype, _console, tokens=tokens, topk_ids=topk_ids, seed=seed)
    except (ValueError, TypeError, LookupError) as error:
        raise click.ClickException(str(error)) from error
    if not (built and right):
        raise SystemExit(1)


@main.command()
@click.option(
    "--model",
    "models",
    type=_model,
    multiple=True,
    help=f"Repeatable: {', '.join(MODELS)}, a Hugging Face config.json or a directory with one.",
)
@click.option(
    "--shapes",
    "files",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="Repeatable: a .toml or .json list of name, num_experts, top_k, hidden, inter and bias.",
)
@click.option("--dtype", "dtypes", type=_dtype, multiple=True, help="Repeatable [default: fp8].")
@click.option("--tp", type=click.IntRange(1), help="Ranks that share each expert's inter.")
@click.option("--ep", type=click.IntRange(1), help="Ranks that share the experts.")
@click.option("--problem", help="One problem, as JSON.")
@click.option("--config", help="The one config for it, as JSON [default: all it may be given].")
@click.option("--arch", type=click.Choice(ARCHS), default=ARCHS[0], show_default=True)
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
    **layers: Any,
) -> None:
    """Compile kernel images, without a GPU: those of models, or those of one problem.

    What exists is not compiled again: a build that was interrupted goes on when it is repeated.
    """
    of_layers = bool(layers["models"] or layers["files"])
    if of_layers == bool(problem) or (problem and any(layers.values())) or (config and of_layers):
        raise click.UsageError(
            "either --model or --shapes (and --dtype, --tp, --ep), or --problem (and --config)"
        )
    if problem:
        asked = [("--problem", _parse(GemmProblem.from_json, "--problem", problem))]
    else:
        asked = _layers(**layers)
    configs = [_parse(config_from_json, "--config", config)] if config else None
    requests = _requests(asked, configs, arch)
    cache = _destination(output)
    try:
        built = _build(cache, requests, jobs, toolchain)
    except CompilerNotInstalled as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        _console.print(f"Interrupted: the same command goes on in {cache.root}", markup=False)
        raise SystemExit(130) from None
    _console.print(f"Images are in {cache.root}", markup=False)
    if output:
        _finish(cache.root, output, built)
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
def show_config(model: MoeShape, dtype: str, tokens: tuple[int, ...]) -> None:
    """Show which config serves a model's projections, and what follows from it."""
    columns = ("tokens", "config", "stages", "smem", "threads", "registers", "image")
    for name, problem in problems(model, dtype).items():
        table = Table(*columns, title=f"{model.name} {name}: {_problem_words(problem.to_json())}")
        for count in tokens or TOKENS:
            rows = count * model.top_k
            config = choose(problem, count if problem.gather else rows, rows / model.num_experts)
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


def _layers(
    models: Sequence[MoeShape],
    files: Sequence[Path],
    dtypes: Sequence[str],
    tp: int | None,
    ep: int | None,
) -> list[_Asked]:
    try:
        shapes = [*models, *(shape for file in files for shape in read_shapes(file))]
        shapes = [shape.shard(tp or 1, ep or 1) for shape in shapes]
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return _problems(shapes, dtypes or ("fp8",))


def _problems(shapes: Iterable[MoeShape], dtypes: Iterable[str]) -> list[_Asked]:
    return [
        (f"{shape.name} {dtype} {name}", problem)
        for shape, dtype in itertools.product(shapes, dtypes)
        for name, problem in problems(shape, dtype).items()
    ]


def _requests(
    asked: Iterable[_Asked], configs: Sequence[Config] | None = None, arch: str = ARCHS[0]
) -> list[Request]:
    requests: dict[Request, None] = {}
    for name, problem in asked:
        chosen = configs or candidates(problem)
        reason = why_illegal(problem, next(iter(chosen), None), arch)
        if reason or not chosen:
            raise click.ClickException(f"{name}: {reason or 'no config fits'}")
        requests.update(dict.fromkeys(Request(problem, config, arch) for config in chosen))
    return list(requests)


def _destination(output: Path | None) -> Cache:
    """Where to build: the directory of an archive stays beside it, for the next build."""
    cache = default_cache()
    if output:
        archive = output.suffix == ".zip"
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
        _console.print(f"They are listed in {write_manifest(root)}", markup=False)
        if built and output.suffix == ".zip":
            from cutlass_moe.archive import pack

            _console.print(f"{pack(root, output)} images packed into {output}", markup=False)
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
        done = track(building, "Compiling", len(requests), console=_console, transient=True)
        results = {result.request: result for result in done}
    table = Table(*_IMAGE_COLUMNS, "bytes", "seconds")
    size = 0
    for request in requests:
        image, seconds = results[request].image, results[request].seconds
        if image is not None:
            size += len(image.cubin)
            took = "cached" if seconds is None else f"{seconds:.2f}"
            table.add_row(*_image_cells(image.record), str(len(image.cubin)), took)
    compiled = sum(result.seconds is not None for result in results.values())
    _console.print(table)
    _console.print(f"{table.row_count} images, {size / 1e6:.2f} MB; {compiled} compiled now")
    failures = [result for result in results.values() if result.error]
    for failure in failures:
        _show_failure(failure)
    return not failures


def _show_failure(failure: Result) -> None:
    request = failure.request
    what = f"{_problem_words(request.problem.to_json())}, {_config_words(request.config.to_json())}"
    _console.print(f"Failed: {what}\n{failure.error}", style="red", markup=False)
