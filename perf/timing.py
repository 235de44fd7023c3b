"""The timing method: CUDA events around each launch, L2 flushed before it, systems in turn.

Two readings of a system's time:
- `interleaved`: what one launch takes on the GPU with nothing of its operands in L2. Every system
  of a case gets several rounds, each in another order, so that they share the clocks' drift.
- `captured`: launches in a row inside a CUDA graph, over distinct weights, divided by their
  number. For work so short that starting a kernel is a good part of it.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from cutlass_moe.tune.timing import FLUSH_BYTES, batch_us

ROUNDS = 5
WARM_UP = 3
MAX_BATCH = 50  # timed launches in a row: events and kernels of one batch fit the launch queue
GRAPH_LAUNCHES = 24  # in a graph, at least

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Microseconds: median and the 20th and 80th percentile of all samples, each round's median."""

    us: float
    p20: float
    p80: float
    rounds: tuple[float, ...]
    samples: int


def spread(us: float, rounds: Sequence[float]) -> float:
    """Largest less smallest of the rounds' medians, relative to the median of all samples."""
    return (max(rounds) - min(rounds)) / us


def summarise(rounds: Sequence[Sequence[float]]) -> Timing:
    """Timing of the samples of each round, in microseconds. Raises ValueError on an empty round."""
    if not rounds or not all(rounds):
        raise ValueError("each round must have at least one sample")
    samples = sorted(us for samples in rounds for us in samples)

    def quantile(q: float) -> float:
        return round(samples[round(q * (len(samples) - 1))], 3)

    medians = tuple(round(statistics.median(samples), 3) for samples in rounds)
    return Timing(
        us=round(statistics.median(samples), 3),
        p20=quantile(0.2),
        p80=quantile(0.8),
        rounds=medians,
        samples=len(samples),
    )


def quick_us(call: Call, flush: torch.Tensor, seconds: float = 0.01) -> float:
    """Median of a few launches: enough to choose among variants of one kernel."""
    call()
    estimate = statistics.median(batch_us(call, WARM_UP, flush))
    return statistics.median(batch_us(call, launches_within(seconds, estimate), flush))


def launches_within(seconds: float, us: float) -> int:
    """How many launches of `us` microseconds, each after a flush, fit: 3 to MAX_BATCH."""
    flush_us = FLUSH_BYTES / 4e6  # at 4 TB/s
    return max(3, min(MAX_BATCH, int(seconds * 1e6 / (us + flush_us))))


def interleaved(
    calls: Mapping[str, Call], seconds: float, flush: torch.Tensor | None
) -> dict[str, Timing]:
    """Timing of each call, measured in turns within about `seconds` altogether."""
    share = seconds / (ROUNDS * max(1, len(calls)))
    launches = {}
    for name, call in calls.items():
        for _ in range(WARM_UP):
            call()
        launches[name] = launches_within(share, statistics.median(batch_us(call, 3, flush)))
    rounds: dict[str, list[list[float]]] = {name: [] for name in calls}
    order = random.Random(0)
    for _ in range(ROUNDS):
        for name in order.sample(list(calls), len(calls)):
            rounds[name].append(batch_us(calls[name], launches[name], flush))
    return {name: summarise(samples) for name, samples in rounds.items()}


def capture(launches: Sequence[Call], number: int) -> Call:
    """Replays a graph of `number` launches, taken in turn. Each of them runs once before."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(number):
            launches[i % len(launches)]()
    return graph.replay


def launches_captured(distinct: int) -> int:
    """Launches in a graph of `distinct` ones: each as often as the others."""
    return distinct * max(1, -(-GRAPH_LAUNCHES // distinct))


def captured(replays: Mapping[str, Call], launches: int, seconds: float) -> dict[str, Timing]:
    """Timing of one of the `launches` inside each graph, graphs replayed in turns."""
    timings = interleaved(replays, seconds, None)
    return {name: divided(timing, launches) for name, timing in timings.items()}


def divided(timing: Timing, parts: int) -> Timing:
    """The timing of one of `parts` equal parts."""
    return Timing(
        us=round(timing.us / parts, 3),
        p20=round(timing.p20 / parts, 3),
        p80=round(timing.p80 / parts, 3),
        rounds=tuple(round(us / parts, 3) for us in timing.rounds),
        samples=timing.samples,
    )
