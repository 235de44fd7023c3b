"""Fixtures of the benchmarks' tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from cutlass_moe.models.shapes import MODELS
from perf.layer import measure as layer_measure
from perf.product import measure as product_measure
from perf.timing import Timing
from tests.perf.samples import SHAPE


@pytest.fixture(autouse=True)
def small_shape(monkeypatch) -> None:
    """A model that a CPU can run."""
    monkeypatch.setitem(MODELS, SHAPE.name, SHAPE)


def capture(launches: Sequence[Callable], number: int) -> Callable[[], None]:
    """A replay that runs again what it should have captured."""

    def replay() -> None:
        for i in range(number):
            launches[i % len(launches)]()

    replay()
    return replay


def timed(calls, *_) -> dict[str, Timing]:
    """A timing of each call; calls it once."""
    for call in calls.values():
        call()
    return {name: Timing(10.0, 9.0, 11.0, (10.0, 10.5), 5) for name in calls}


@pytest.fixture
def no_clocks(monkeypatch) -> None:
    """Graphs and clocks replaced by what a machine without a GPU can do."""
    for module in (layer_measure, product_measure):
        monkeypatch.setattr(module, "capture", capture)
        monkeypatch.setattr(module, "interleaved", timed)
        monkeypatch.setattr(module, "captured", timed)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
