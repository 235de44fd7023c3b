"""`cutlass-moe inspect`: all that is known of one kernel image, its PTX and its SASS."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import click

from cutlass_moe.images.cache import Cache, default_cache, open_root
from cutlass_moe.images.compiler import CompileError, compile_ptx
from cutlass_moe.images.roots import Entry, read_image
from cutlass_moe.images.toolchains import default_build
from emitters.spec.registry import config_from_json, problem_from_json

DISASSEMBLER = "nvdisasm"


@click.command()
@click.argument("key")
@click.option(
    "--root",
    "roots",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Repeatable: a directory or an archive [default: the cache's roots].",
)
@click.option("--ptx", is_flag=True, help="Print the kernel's PTX instead, compiled anew.")
@click.option("--sass", is_flag=True, help="Print the cubin's SASS instead (needs nvdisasm).")
def inspect(key: str, roots: tuple[Path, ...], ptx: bool, sass: bool) -> None:
    """Show an image: what it computes, how, for which GPU, and what it needs to be launched.

    KEY is an image's key or its first digits, as `list`, `show-config` and CUTLASS_MOE_LOG=1 show
    them.
    """
    if ptx and sass:
        raise click.UsageError("expected --ptx or --sass, got both")
    entry = _find(Cache(roots) if roots else default_cache(), key)
    if ptx:
        click.echo(_ptx(entry))
    elif sass:
        click.echo(_sass(entry))
    else:
        click.echo(_describe(entry))


def _find(cache: Cache, key: str) -> Entry:
    """The first root's image whose key begins so. Raises click.ClickException."""
    found: dict[tuple[str, str], Entry] = {}
    for entry in cache.entries():
        if entry.key.startswith(key.lower()):
            found.setdefault((entry.arch, entry.key), entry)
    if not found:
        roots = ", ".join(map(str, cache.roots))
        raise click.ClickException(f"no image's key begins with {key!r} in {roots}")
    if len(found) > 1:
        keys = ", ".join(f"{arch}/{whole[:12]}" for arch, whole in sorted(found))
        raise click.ClickException(f"{key!r} must name one image, but {len(found)} match: {keys}")
    return next(iter(found.values()))


def _describe(entry: Entry) -> str:
    record = entry.record
    problem, config = problem_from_json(record.problem), config_from_json(record.config)
    size = sum(param.size for param in record.params)
    lines = [
        f"image      {entry.arch}/{entry.key}",
        f"root       {entry.root}",
        f"build      {record.build}",
        f"problem    {problem.words}",
        f"           {json.dumps(record.problem)}",
        f"config     {config.words}",
        f"           {json.dumps(record.config)}",
        f"kernel     {record.symbol}, {entry.cubin_bytes} bytes of cubin",
        f"launch     {record.threads} threads, clusters of {record.cluster[0]}, "
        f"{record.smem_bytes} bytes of shared memory",
        f"registers  {record.registers} per thread at launch, {record.spill_bytes} bytes spilled",
        f"parameters {len(record.params)}, {size} bytes:",
    ]
    lines += [f"  {p.offset:5d}  {p.size:4d}  {p.kind:11}  {p.name}" for p in record.params]
    for box in record.tensor_maps:
        lines.append(f"tensor map {box.param}: box {list(box.box)}, swizzle {box.swizzle}")
    return "\n".join(lines)


def _ptx(entry: Entry) -> str:
    record = entry.record
    if record.build != default_build():
        click.echo(f"The image is of {record.build}; this PTX is of {default_build()}.", err=True)
    problem, config = problem_from_json(record.problem), config_from_json(record.config)
    try:
        return compile_ptx(problem, config, record.arch)
    except CompileError as error:
        raise click.ClickException(str(error)) from error


def _sass(entry: Entry) -> str:
    program = _disassembler()
    if program is None:
        raise click.ClickException(
            "--sass needs nvdisasm in PATH, in $CUDA_HOME/bin or beside triton: install a CUDA "
            "toolkit, or `pip install triton`"
        )
    image = read_image(open_root(entry.root), entry.arch, entry.key)
    if image is None:
        raise click.ClickException(f"{entry.arch}/{entry.key} was removed meanwhile")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image.cubin)
        file.flush()
        command = [program, "--print-code", file.name]
        ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise click.ClickException(f"{program} failed: {ended.stderr.strip()}")
    return ended.stdout


def _disassembler() -> str | None:
    """Path of nvdisasm: of the PATH, of a CUDA toolkit, or triton's own."""
    folders = [os.environ.get("PATH", "")]
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    folders.append(os.path.join(toolkit, "bin"))
    triton = find_spec("triton")
    for place in (triton and triton.submodule_search_locations) or ():
        folders.append(os.path.join(place, "backends", "nvidia", "bin"))
    return shutil.which(DISASSEMBLER, path=os.pathsep.join(folders))
