"""Timing, as arithmetic."""

from __future__ import annotations

import pytest

from perf.timing import (
    GRAPH_LAUNCHES,
    divided,
    launches_captured,
    launches_within,
    spread,
    summarise,
)


def test_summary_of_samples() -> None:
    timing = summarise([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
    assert (timing.us, timing.rounds, timing.samples) == (3.0, (2.0, 4.0), 6)
    assert (timing.p20, timing.p80) == (2.0, 4.0)
    assert spread(timing.us, timing.rounds) == pytest.approx(2 / 3)
    assert divided(timing, 2).us == 1.5
    with pytest.raises(ValueError, match="at least one sample"):
        summarise([[1.0], []])


@pytest.mark.parametrize(
    ("seconds", "us", "launches"), [(0.0, 10.0, 3), (1e-3, 33.0, 9), (9.0, 10.0, 50)]
)
def test_launches_fill_a_budget_within_bounds(seconds: float, us: float, launches: int) -> None:
    assert launches_within(seconds, us) == launches


@pytest.mark.parametrize("distinct", [1, 5, 24, 100])
def test_a_graph_takes_each_launch_as_often(distinct: int) -> None:
    assert launches_captured(distinct) % distinct == 0
    assert launches_captured(distinct) >= GRAPH_LAUNCHES
