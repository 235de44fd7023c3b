"""The compile worker: reads JSON requests from stdin, one per line; answers on stdout.

  request   {"problem": ..., "config": ..., "arch": ..., "toolchain": "cu12", "cu13" or null,
             "output": DIRECTORY, "ptx": true or absent}
  answer    {"ok": true, "seconds": ...} once DIRECTORY has kernel.cubin and launch.json, or
             kernel.ptx if that was asked for; else {"ok": false, "error": ...}

It ends at the end of its input.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from emitters.compile.emit import emit, emit_ptx
from emitters.spec.registry import config_from_json, problem_from_json


def main() -> None:
    # The compiler prints to stdout: answers get a descriptor of their own, prints go to stderr.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            answers.write(json.dumps(_answer(line)) + "\n")
            answers.flush()


def _answer(line: str) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        request = json.loads(line)
        _write(request)
    except Exception as error:  # whatever the compiler raised, the next request may be fine
        traceback.print_exc()
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}
    return {"ok": True, "seconds": time.perf_counter() - start}


def _write(request: dict[str, Any]) -> None:
    problem = problem_from_json(request["problem"])
    config = config_from_json(request["config"])
    arch, toolchain, directory = request["arch"], request["toolchain"], Path(request["output"])
    if request.get("ptx"):
        (directory / "kernel.ptx").write_text(emit_ptx(problem, config, arch, True, toolchain)[1])
        return
    image = emit(problem, config, arch, toolchain)
    (directory / "kernel.cubin").write_bytes(image.cubin)
    (directory / "launch.json").write_text(image.record.to_json())


if __name__ == "__main__":
    main()
