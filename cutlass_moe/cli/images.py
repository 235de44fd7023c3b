"""The shell's side of the cache: `cutlass-moe list | verify | pack | merge | prune`."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.cli.common import (
    IMAGE_COLUMNS,
    Posed,
    console,
    dtypes_option,
    find_layers,
    image_cells,
    models_option,
    posed,
    shard_options,
    training_option,
)
from cutlass_moe.images.archive import Archive, write
from cutlass_moe.images.archive import pack as pack_directory
from cutlass_moe.images.cache import Cache, default_cache, open_root
from cutlass_moe.images.roots import (
    RECORD,
    DamagedImage,
    Entry,
    Root,
    UntrustedRoot,
    read_current,
    read_image,
)
from cutlass_moe.images.toolchains import default_build, driver_cuda, why_unloadable
from cutlass_moe.models.shapes import DTYPES
from emitters.spec.arch import ARCHS
from emitters.spec.image import Image, image_key
from emitters.spec.registry import config_from_json, problem_from_json

INSTALLED = "installed"

_roots = click.argument("roots", nargs=-1, type=click.Path(exists=True, path_type=Path))
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@dataclass(frozen=True)
class Fault:
    """What is wrong with an image of a root, or with the whole root, where image is empty."""

    root: str
    image: str  # ARCH/KEY
    reason: str


@dataclass(frozen=True)
class Need:
    """An image that a model may ask for."""

    model: str
    dtype: str
    name: str
    arch: str
    key: str
    config: dict[str, Any]


@click.command("list")
@_roots
@_json
def list_images(roots: tuple[Path, ...], as_json: bool) -> None:
    """List the images in ROOTS, directories and archives [default: the cache's]."""
    cache = Cache(roots) if roots else default_cache()
    entries = list(cache.entries())
    if as_json:
        click.echo(json.dumps([_plain(entry) for entry in entries], indent=1))
        return
    for root in cache.roots:
        table = Table("key", *IMAGE_COLUMNS, "build", title=str(root))
        for entry in (entry for entry in entries if entry.root == root):
            build = entry.record.build.removeprefix("nvidia-cutlass-dsl ")
            table.add_row(entry.key[:12], *image_cells(entry.record), build)
        console.print(table if table.row_count else f"{root}: no images")


@click.command()
@_roots
@models_option
@dtypes_option
@shard_options
@training_option
@click.option(
    "--cuda",
    metavar="MAJOR.MINOR",
    help="CUDA of the driver to serve on, as nvidia-smi shows it [default: this machine's].",
)
@_json
def verify(
    roots: tuple[Path, ...],
    models: tuple[str, ...],
    dtypes: tuple[str, ...],
    tp: int | None,
    ep: int | None,
    training: bool,
    cuda: str | None,
    as_json: bool,
) -> None:
    """Check the images in ROOTS [default: the cache's], and whether models would miss any.

    Every file is hashed again, every key is derived again from problem and config, and arch and
    driver must be able to run the image. With --tp and --ep, what one rank of the models asks for
    must be there. Exit code: 0 where all is well; 1 where a root or an image is faulty, an image
    that a model needs is missing, or there are no images at all.
    """
    if (dtypes or tp or ep or training) and not models:
        raise click.UsageError("--dtype, --tp, --ep and --training are those of a --model")
    asked = posed(find_layers(models, tp, ep), dtypes, training)
    version = driver_cuda() if cuda is None else _cuda_version(cuda)
    sound: set[str] = set()
    faults: list[Fault] = []
    for root in map(open_root, roots or default_cache().roots):
        for place, reason in _check_root(root, version):
            if reason is None:
                sound.add(place)
            else:
                faults.append(Fault(str(root.path), place, reason))
    missing = [need for need in _needed(asked) if f"{need.arch}/{need.key}" not in sound]
    well = bool(sound) and not faults and not missing
    if as_json:
        plain = {
            "ok": well,
            "sound": len(sound),
            "driver_cuda": None if version is None else f"{version // 1000}.{version % 1000 // 10}",
            "faults": [dataclasses.asdict(fault) for fault in faults],
            "missing": [dataclasses.asdict(need) for need in missing],
        }
        click.echo(json.dumps(plain, indent=1))
    else:
        _show(len(sound), faults, missing, version)
        for model, dtype in dict.fromkeys((need.model, need.dtype) for need in missing):
            words = {"model": model, "dtype": dtype, "tp": tp, "ep": ep}
            given = [f"--{name}={value}" for name, value in words.items() if value]
            given += ["--training"] if training else []
            click.echo(f"build with: {shlex.join(['cutlass-moe', 'build', *given])}")
    if not well:
        raise SystemExit(1)


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("output", metavar="ARCHIVE", type=click.Path(dir_okay=False, path_type=Path))
def pack(directory: Path, output: Path) -> None:
    """Write all images of DIRECTORY into ARCHIVE, one file that is used as it is.

    Equal images make equal archives.
    """
    try:
        count = pack_directory(directory, output)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{count} images, {output.stat().st_size} bytes in {output}")


@click.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
def merge(sources: tuple[Path, ...], output: Path) -> None:
    """Bring the images of SOURCES, directories and archives, together in OUTPUT.

    OUTPUT is a directory, or an archive where its name ends in .zip; the images it holds stay. Of
    several images with one key the first source's is taken, and OUTPUT's own last.
    """
    target = open_root(output)
    try:
        before = set(target.names()) if output.exists() else set()
        images: dict[tuple[str, str], Root] = dict.fromkeys(before, target)
        for root in map(open_root, reversed(sources)):
            images.update(dict.fromkeys(root.names(), root))
        if not images:
            raise ValueError("expected images to merge, but the sources hold none")
        if isinstance(target, Archive):
            write(output, _read_all(dict(sorted(images.items()))))
        else:
            cache = Cache([output])
            new = {name: root for name, root in images.items() if root is not target}
            for arch, key, image in _read_all(new):
                if cache.load(arch, key) != image:
                    cache.store(arch, key, image)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{len(images)} images in {output}, {len(images) - len(before)} of them new")


@click.command()
@click.argument("root", required=False, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--keep-build",
    "builds",
    metavar="TEXT",
    multiple=True,
    help="Repeatable: keep builds whose identity contains TEXT; `installed`: the compiler's here.",
)
@click.option("--keep-model", "models", metavar="MODEL", multiple=True, help="Repeatable.")
@shard_options
@click.option("--older-than", "days", type=click.FloatRange(0), metavar="DAYS")
@click.option("--dry-run", is_flag=True, help="Only tell.")
def prune(
    root: Path | None,
    builds: tuple[str, ...],
    models: tuple[str, ...],
    tp: int | None,
    ep: int | None,
    days: float | None,
    dry_run: bool,
) -> None:
    """Remove images from the directory ROOT [default: the writable one of the cache].

    Those go that no option keeps: of other builds than --keep-build, of use to none of --keep-model
    (with any dtype, for training too), and written --older-than DAYS ago. What processes that were
    killed left behind goes too, after a day.
    """
    if not (builds or models or days is not None):
        raise click.UsageError("expected --keep-build, --keep-model or --older-than")
    cache = Cache([root]) if root else default_cache()
    if not cache.writable:
        raise click.ClickException(f"{cache.root} can't be written to (archives never can)")
    identities = [_installed() if text == INSTALLED else text for text in builds]
    layers = find_layers(models, tp, ep)
    kept = posed(layers, tuple(DTYPES)) + posed(layers, ("bf16",), training=True)
    used = {need.key for need in _needed(kept)}
    now = time.time()

    def unwanted(entry: Entry) -> bool:
        age = now - (entry.root / entry.arch / entry.key / RECORD).stat().st_mtime
        return not (
            any(identity in entry.record.build for identity in identities)
            or entry.key in used
            or (days is not None and age < days * 86_400)
        )

    try:
        removed = cache.prune(unwanted, dry_run)
    except OSError as error:
        raise click.ClickException(str(error)) from error
    for entry in removed:
        click.echo(f"{entry.arch}/{entry.key} {entry.record.build}")
    done = "would be removed" if dry_run else "removed"
    size = sum(entry.cubin_bytes for entry in removed)
    click.echo(f"{len(removed)} images, {size} bytes {done} from {cache.root}")


COMMANDS = (list_images, verify, pack, merge, prune)


def _plain(entry: Entry) -> dict[str, Any]:
    record = entry.record
    return {
        "root": str(entry.root),
        "arch": entry.arch,
        "key": entry.key,
        "build": record.build,
        "cubin_bytes": entry.cubin_bytes,
        "registers": record.registers,
        "spill_bytes": record.spill_bytes,
        "smem_bytes": record.smem_bytes,
        "problem": record.problem,
        "config": record.config,
    }


def _check_root(root: Root, cuda: int | None) -> Iterator[tuple[str, str | None]]:
    """(place, None or what is wrong with it) of each image, or of the root as a whole."""
    try:
        names = root.names()
    except (DamagedImage, UntrustedRoot) as error:
        yield "", str(error)
        return
    for arch, key in names:
        yield f"{arch}/{key}", _why_faulty(root, arch, key, cuda)


def _why_faulty(root: Root, arch: str, key: str, cuda: int | None) -> str | None:
    try:
        image = read_image(root, arch, key)
        if image is None:
            return "it was removed meanwhile"
        record = image.record
        problem = problem_from_json(record.problem)
        derived = image_key(problem, config_from_json(record.config), record.arch)
    except (ValueError, UntrustedRoot) as error:
        return str(error).removeprefix(f"{root.path}: {arch}/{key}: ")
    if (record.arch, derived) != (arch, key):
        return f"its problem and config belong at {record.arch}/{derived}"
    if arch not in ARCHS:
        return f"arch {arch}: supported are {', '.join(ARCHS)}"
    return why_unloadable(record.build, cuda)


def _needed(asked: Iterable[Posed]) -> Iterator[Need]:
    for layer, dtype, name, problem in asked:
        for config in every_config(problem):
            for arch in ARCHS:
                key = image_key(problem, config, arch)
                yield Need(layer.model, dtype, name, arch, key, config.to_json())


def _read_all(images: dict[tuple[str, str], Root]) -> Iterator[tuple[str, str, Image]]:
    for name, root in images.items():
        yield from read_current(root, [name])


def _show(sound: int, faults: Sequence[Fault], missing: Sequence[Need], cuda: int | None) -> None:
    for fault in faults:
        click.echo(f"{fault.root} {fault.image}: {fault.reason}" if fault.image else fault.reason)
    for need in missing:
        words = f"{need.model} {need.dtype} {need.name}, {config_from_json(need.config).words}"
        click.echo(f"missing: {need.arch}/{need.key} for {words}")
    if cuda is None:
        click.echo("no CUDA driver here: not checked whether it can load them (--cuda says which)")
    click.echo(f"{sound} images are sound, {len(faults)} faulty, {len(missing)} missing")


def _cuda_version(text: str) -> int:
    """12040 for 12.4. Raises BadParameter."""
    match = re.fullmatch(r"(\d+)\.(\d)", text)
    if match is None:
        raise click.BadParameter(f"expected a version like 12.4, got {text!r}", param_hint="--cuda")
    return int(match[1]) * 1000 + int(match[2]) * 10


def _installed() -> str:
    identity = default_build()
    if identity is None:
        raise click.UsageError("--keep-build installed: nvidia-cutlass-dsl is not installed here")
    return identity
