"""Every operand, accumulation, output and epilogue in the PTX simulator: right in every mode."""

from __future__ import annotations

import pytest

from emitters.image import build_identity
from tests.ptxsim.runs import NUMBERS, check_modes
from tests.ptxsim.schedule import MODES

pytestmark = pytest.mark.skipif(build_identity() is None, reason="needs nvidia-cutlass-dsl")


@pytest.mark.parametrize("name", NUMBERS)
def test_kernels_are_right(name: str) -> None:
    """A schedule for each mode, the last with values that need rounding."""
    seed = len(MODES) * list(NUMBERS).index(name)
    check_modes(NUMBERS[name], seed)
