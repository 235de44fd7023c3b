"""Every activation, and N-major weights, in the PTX simulator."""

from __future__ import annotations

import pytest

from cutlass_moe.images.toolchains import default_build
from tests.ptxsim.kernels.runs import ACTIVATED, N_MAJOR, check_schedules

pytestmark = pytest.mark.skipif(default_build() is None, reason="needs nvidia-cutlass-dsl")
RUNS = ACTIVATED | N_MAJOR
SCHEDULES = 3  # of each: unlike others in arithmetic and addresses, hardly in their waits


@pytest.mark.parametrize("name", RUNS)
def test_kernels_are_right(name: str) -> None:
    check_schedules(RUNS[name], SCHEDULES * list(RUNS).index(name), SCHEDULES)
