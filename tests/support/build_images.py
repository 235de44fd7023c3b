"""`python -m tests.support.build_images DIR` compiles all images that the GPU tests run.

A machine without the DSL, or with few cores, takes them from elsewhere:
run the tests there with CUTLASS_MOE_CACHE_DIR=DIR and CUTLASS_MOE_JIT=0.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from cutlass_moe.images.cache import Cache
from cutlass_moe.images.compiler import Request, build_images
from emitters.spec.registry import Config, Problem
from tests.support import cases, layer_cases

TESTS = Path(__file__).parents[1]


def images() -> set[tuple[Problem, Config]]:
    """What all GPU tests run: each of their modules, or its cases', says so in `images()`."""
    paths = sorted(TESTS.rglob("test_*_gpu.py"))
    names = [".".join(path.relative_to(TESTS.parent).with_suffix("").parts) for path in paths]
    modules = [cases, layer_cases, *map(importlib.import_module, names)]
    return {image for module in modules if hasattr(module, "images") for image in module.images()}


def main() -> int:
    """Returns the number of images that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", help="root of the cache to build into")
    parser.add_argument("--jobs", type=int, help="compile workers (default: one a core)")
    arguments = parser.parse_args()
    requests = [Request(problem, config) for problem, config in images()]
    failed = 0
    for done, result in enumerate(
        build_images(Cache([arguments.directory]), requests, arguments.jobs), 1
    ):
        if result.error is not None:
            failed += 1
            print(f"{result.request}\n{result.error}", file=sys.stderr)
        took = "found" if result.seconds is None else f"{result.seconds:.1f} s"
        print(f"[{done}/{len(requests)}] {result.request.key[:12]} {took}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
