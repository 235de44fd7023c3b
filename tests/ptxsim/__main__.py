"""`python -m tests.ptxsim IMAGE` runs the kernel of an image and says what is wrong with it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from emitters.spec.gemm import GemmProblem
from emitters.spec.image import LaunchRecord
from emitters.spec.registry import config_from_json
from tests.ptxsim.kernels import launch
from tests.ptxsim.ptx import Fault
from tests.ptxsim.schedule import MODES, Schedule
from tests.support.cases import Case, make_inputs
from tests.support.numerics import check


def main() -> int:
    """Returns 0 where every schedule gives the right result, else 1."""
    options = _options()
    record = LaunchRecord.from_json((options.image / "launch.json").read_text())
    problem = GemmProblem.from_json(record.problem)
    kernel = launch.kernel(problem, config_from_json(record.config), line_info=True)
    if options.ptx:
        options.ptx.write_text(kernel.ptx)
    if options.run:
        kernel = kernel.edited(options.run.read_text())
    rows = options.rows or [70, 0, 33]
    counts = tuple((rows * problem.num_experts)[: problem.num_experts])
    scales = filter(None, (problem.x_scale, problem.weight_scale))
    case = Case(
        tokens=options.tokens, counts=counts, n=problem.n, k=problem.k, operand=problem.x,
        out=problem.out, accumulation=problem.accumulation, epilogue=(*scales, *problem.epilogue),
        gather=problem.gather, reads="outside" if problem.gather else "any",
        weight_major=problem.weight.major,
    )  # fmt: skip
    modes = [options.mode] if options.mode else list(MODES)
    wrong = [mode for mode in modes if not _run(kernel, case, mode, options)]
    return 1 if wrong else 0


def _run(
    kernel: launch.SimulatedKernel, case: Case, mode: str, options: argparse.Namespace
) -> bool:
    inputs = make_inputs(case, "cpu", exact=True)
    try:
        out = launch.simulate(
            kernel, inputs, Schedule(options.seed, mode), options.grid, rows=case.rows,
            trace=print if options.trace else None,
        )  # fmt: skip
        check(out, case, inputs, exact=True)
    except (Fault, AssertionError) as error:
        print(f"{mode}: {error}")
        return False
    print(f"{mode}: right")
    return True


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.ptxsim", description=__doc__)
    parser.add_argument("image", type=Path, help="an image's directory in a cache: launch.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=MODES, help="default: all of them")
    parser.add_argument("--grid", type=int, default=2, help="CTAs, whole clusters")
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--rows", type=int, nargs="+", help="of the experts, repeated")
    parser.add_argument("--trace", action="store_true", help="print every instruction")
    parser.add_argument("--ptx", type=Path, help="write the PTX there")
    parser.add_argument("--run", type=Path, help="simulate this PTX in its place")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
