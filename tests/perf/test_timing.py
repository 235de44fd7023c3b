"""Timing, as arithmetic."""

from __future__ import annotations

import pytest

from perf import timing
from perf.timing import MAX_BATCH, ROUNDS, interleaved, launches_within, spread, summarise


def test_summary_of_samples() -> None:
    summary = summarise([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
    assert (summary.us, summary.rounds, summary.samples) == (3.0, (2.0, 4.0), 6)
    assert (summary.p20, summary.p80) == (2.0, 4.0)
    assert spread(summary.us, summary.rounds) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least one sample"):
        summarise([[1.0], []])


@pytest.mark.parametrize(
    ("seconds", "us", "launches"), [(0.0, 10.0, 3), (1e-3, 33.0, 9), (9.0, 10.0, MAX_BATCH)]
)
def test_launches_fill_a_budget_within_bounds(seconds: float, us: float, launches: int) -> None:
    assert launches_within(seconds, us) == launches


def test_systems_take_turns_in_changing_order(monkeypatch) -> None:
    turns: list[str] = []

    def batch(call, launches, flush, head_start=0):
        turns.append(call())
        return [{"a": 1.0, "b": 2.0, "c": 3.0}[call()]] * launches

    monkeypatch.setattr(timing, "batch_us", batch)
    found = interleaved({name: lambda name=name: name for name in "abc"}, 0.1, None)
    assert {name: one.us for name, one in found.items()} == {"a": 1.0, "b": 2.0, "c": 3.0}
    rounds = [turns[i : i + 3] for i in range(3, len(turns), 3)]
    assert len(rounds) == ROUNDS
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
