"""Every activation, and N-major weights, in the PTX simulator."""

from __future__ import annotations

import pytest

from cutlass_moe.images.toolchains import default_build
from tests.ptxsim.kernels.runs import ACTIVATED, N_MAJOR, check_run

pytestmark = pytest.mark.skipif(default_build() is None, reason="needs nvidia-cutlass-dsl")
RUNS = ACTIVATED | N_MAJOR


@pytest.mark.parametrize("name", RUNS)
def test_kernels_are_right(name: str) -> None:
    check_run(RUNS, name)
