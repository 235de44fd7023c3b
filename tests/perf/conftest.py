"""Fixtures of the benchmarks' tests."""

from __future__ import annotations

import pytest

from cutlass_moe.models.shapes import MODELS
from tests.perf.samples import SHAPE


@pytest.fixture(autouse=True)
def small_shape(monkeypatch) -> None:
    """A model that a CPU can run."""
    monkeypatch.setitem(MODELS, SHAPE.name, SHAPE)
