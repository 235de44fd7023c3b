"""Every operand, accumulation, output and epilogue in the PTX simulator."""

from __future__ import annotations

import pytest

from cutlass_moe.images.toolchains import default_build
from tests.ptxsim.kernels.runs import NUMBERS, check_run

pytestmark = pytest.mark.skipif(default_build() is None, reason="needs nvidia-cutlass-dsl")


@pytest.mark.parametrize("name", NUMBERS)
def test_kernels_are_right(name: str) -> None:
    check_run(NUMBERS, name)
