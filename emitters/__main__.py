"""The compile worker: a JSON request a line on stdin, a JSON answer a line on stdout.

Request: {"problem": ..., "config": ..., "arch": ..., "toolchain": "cu12", "cu13" or null, "output":
DIRECTORY}. Answer: {"ok": true, "seconds": ...} once the directory holds kernel.cubin and
launch.json, or {"ok": false, "error": ...}. Ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from emitters.compile.emit import emit
from emitters.spec.image import Image
from emitters.spec.registry import config_from_json, problem_from_json


def main() -> None:
    # The compiler prints to stdout: answers keep a descriptor of their own, prints go to stderr.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            answers.write(json.dumps(_answer(line)) + "\n")
            answers.flush()


def _answer(line: str) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        request = json.loads(line)
        image = _emit(request)
        _write(Path(request["output"]), image)
    except Exception as error:  # whatever the compiler raised, the next request may be fine
        traceback.print_exc()
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}
    return {"ok": True, "seconds": time.perf_counter() - start}


def _emit(request: dict[str, Any]) -> Image:
    problem = problem_from_json(request["problem"])
    config = config_from_json(request["config"])
    return emit(problem, config, request["arch"], request["toolchain"])


def _write(directory: Path, image: Image) -> None:
    (directory / "kernel.cubin").write_bytes(image.cubin)
    (directory / "launch.json").write_text(image.record.to_json())


if __name__ == "__main__":
    main()
