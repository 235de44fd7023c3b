"""The compile worker with mere bytes in place of what the compiler writes.

For tests of what happens around workers. It loads no DSL, which takes 2 s of each real one.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from emitters import __main__ as worker
from emitters.spec.identity import build_identity
from emitters.spec.image import IMAGE_ABI, Image, LaunchRecord, image_key
from emitters.spec.registry import Config, Problem, why_illegal

PERMITS = "FAKE_WORKER_PERMITS"  # a FIFO: each image takes a byte of it; without it none is needed


def executable(folder: Path) -> str:
    """A program in place of `sys.executable`: whatever it is asked to run, it is this worker."""
    program = folder / "fake_worker"
    code = "from tests.support.fake_worker import main\n\nmain()\n"
    program.write_text(f"#!{sys.executable}\n{code}")
    program.chmod(0o755)
    return str(program)


def main() -> None:
    worker.emit = emit
    worker.main()


def emit(problem: Problem, config: Config, arch: str, toolchain: str | None) -> Image:
    reason = why_illegal(problem, config, arch)
    if reason:
        raise ValueError(reason)
    if PERMITS in os.environ:
        with open(os.environ[PERMITS], "rb", buffering=0) as permits:
            assert permits.read(1)
    cubin = b"\x7fELF" + image_key(problem, config, arch).encode()
    return Image(
        cubin,
        LaunchRecord(
            symbol="kernel",
            params=(),
            tensor_maps=(),
            smem_bytes=1024,
            threads=config.threads,
            cluster=(1, 1, 1),
            arch=arch,
            abi=IMAGE_ABI,
            registers=168,
            spill_bytes=0,
            build=build_identity(toolchain) or "",
            problem=problem.to_json(),
            config=config.to_json(),
            cubin_sha256=hashlib.sha256(cubin).hexdigest(),
        ),
    )
