"""Fixtures of the benchmarks' tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from perf import measure
from perf.timing import Timing


def timed(calls, *_) -> dict[str, Timing]:
    """A timing of each call; calls it once."""
    for call in calls.values():
        call()
    return {name: Timing(10.0, 9.0, 11.0, (10.0, 10.5), 5) for name in calls}


def replay_of(launch: Callable) -> Callable:
    """In place of a graph."""
    return launch


@pytest.fixture
def no_clocks(monkeypatch) -> None:
    """Graphs, clocks and the GPU's memory replaced by what a machine without a GPU can do."""
    monkeypatch.setattr(measure, "interleaved", timed)
    monkeypatch.setattr(measure, "capture", replay_of)
    monkeypatch.setattr(measure, "quick_us", lambda call, flush: call() and 1.0)
    monkeypatch.setattr(measure, "flush_buffer", lambda: torch.empty(0))
    monkeypatch.setattr(measure, "alive", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
