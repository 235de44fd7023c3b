"""`python -m tests.build_images DIR` compiles all images that the GPU tests run.

A machine without the DSL, or with few cores, takes them from elsewhere:
run the tests there with CUTLASS_MOE_CACHE_DIR=DIR and CUTLASS_MOE_JIT=0.
"""

from __future__ import annotations

import argparse
import sys

from cutlass_moe.images.cache import Cache
from cutlass_moe.images.compiler import Request, build_images
from tests.layer import test_nn_gpu
from tests.ops import (
    test_index_group_matmul_gpu,
    test_plan_gpu,
    test_route_gpu,
    test_router_gpu,
    test_rows_gpu,
)
from tests.runtime import test_warmup_gpu
from tests.support import cases, layer_cases

SOURCES = (
    cases,
    layer_cases,
    test_index_group_matmul_gpu,
    test_nn_gpu,
    test_plan_gpu,
    test_route_gpu,
    test_rows_gpu,
    test_router_gpu,
    test_warmup_gpu,
)


def main() -> int:
    """Returns the number of images that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", help="root of the cache to build into")
    parser.add_argument("--jobs", type=int, help="compile workers (default: one a core)")
    arguments = parser.parse_args()
    images = [image for source in SOURCES for image in source.images()]
    requests = [Request(problem, config) for problem, config in dict.fromkeys(images)]
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
