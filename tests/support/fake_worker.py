"""The compile worker with mere bytes in place of what the compiler writes.

For tests of what happens around workers. It loads no DSL, which takes 2 s of each real one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from emitters import __main__ as worker
from emitters.spec.identity import build_identity
from emitters.spec.image import Image
from emitters.spec.registry import Config, Problem, why_illegal
from tests.support.fake_images import image_for

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
    return image_for(problem, config, build_identity(toolchain) or "")[1]
