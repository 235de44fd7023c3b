"""Images of mere bytes, for tests of where images lie. No compiler, no GPU."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from emitters.spec.image import (
    IMAGE_ABI,
    Image,
    LaunchRecord,
    Param,
    ParamKind,
    TensorMapBox,
    image_key,
)
from emitters.spec.registry import Config, Problem

ARCH, KEY, OTHER = "sm_90a", "5eed" * 16, "0dd5" * 16
FORK = multiprocessing.get_context("fork")


def make_image(build: str = "today", cubin: bytes = b"\x7fELF" * 100) -> Image:
    record = LaunchRecord(
        symbol="kernel",
        params=(Param("x", ParamKind.POINTER, 128, 8),),
        tensor_maps=(TensorMapBox("weight", (128, 256, 1), 128, 128),),
        smem_bytes=1024,
        threads=384,
        cluster=(1, 1, 1),
        arch=ARCH,
        abi=IMAGE_ABI,
        registers=168,
        spill_bytes=0,
        build=build,
        problem={"n": 2048},
        config={"tile_m": 128},
        cubin_sha256=hashlib.sha256(cubin).hexdigest(),
    )
    return Image(cubin, record)


def image_for(problem: Problem, config: Config, build: str = "today") -> tuple[str, Image]:
    """The key of an image, and one that has it."""
    image = make_image(build, f"{problem} {config}".encode())
    asked = {"problem": problem.to_json(), "config": config.to_json()}
    record = dataclasses.replace(image.record, **json.loads(json.dumps(asked)))
    return image_key(problem, config, ARCH), Image(image.cubin, record)


def never() -> Image:
    raise AssertionError("built although it was there")


def files_below(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def counting_build(log: Path, build: str = "today") -> Image:
    """A compile, and a line in a log."""
    with log.open("a") as file:
        file.write(f"{build}\n")
    return make_image(build)


def load_or_build_at(root: Path, log: Path, build: str = "today") -> Image:
    from cutlass_moe.images.cache import Cache  # it loads torch, which fake_worker.py does without

    return Cache([root]).load_or_build(ARCH, KEY, lambda: counting_build(log, build), build)


def lock_that_tells(tell: Callable[[], object]) -> type[FileLock]:
    """A lock that calls tell() where another holds it, and then waits for it."""

    class Lock(FileLock):
        def acquire(self, *arguments: Any, **options: Any) -> Any:
            try:
                return super().acquire(timeout=0)
            except Timeout:
                tell()
                return super().acquire(*arguments, **options)

    return Lock
