"""A kernel's PTX, compiled by one process of a test run for all of its tests and processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

from filelock import FileLock

from emitters.compile.emit import emit_ptx
from emitters.spec.arch import DEFAULT_ARCH
from emitters.spec.image import LaunchRecord, image_key
from emitters.spec.registry import Config, Problem

folder: Path | None = None  # of this run: conftest.py; elsewhere each kernel is compiled anew


def ptx_of(problem: Problem, config: Config, line_info: bool = False) -> tuple[LaunchRecord, str]:
    """line_info: so that faults name lines of the Python source, too."""
    if folder is None:
        return emit_ptx(problem, config, line_info=line_info)
    file = folder / f"{image_key(problem, config, DEFAULT_ARCH)}{'-lines' * line_info}.json"
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            record, ptx = emit_ptx(problem, config, line_info=line_info)
            file.with_suffix(".part").write_text(json.dumps([record.to_json(), ptx]))
            os.replace(file.with_suffix(".part"), file)
    text, ptx = json.loads(file.read_text())
    return LaunchRecord.from_json(text), ptx
