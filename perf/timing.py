"""The timing method: CUDA events around each launch, L2 flushed before it, systems in turn."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from cutlass_moe.tune.timing import FLUSH_BYTES, batch_us

ROUNDS = 5
WARM_UP = 3
MAX_BATCH = 20  # timed launches in a row
HEAD_START = 8_000_000  # cycles, some 4 ms: slower hosts' launches than ours stay ahead as well
QUICK = 4  # launches to choose among variants of one kernel

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
        return round(samples[round(q * (len(samples) - 1))], 2)

    medians = tuple(round(statistics.median(samples), 2) for samples in rounds)
    return Timing(
        us=round(statistics.median(samples), 2),
        p20=quantile(0.2),
        p80=quantile(0.8),
        rounds=medians,
        samples=len(samples),
    )


def quick_us(call: Call, flush: torch.Tensor | None) -> float:
    """Median of a few launches: enough to choose among variants of one kernel."""
    call()
    return statistics.median(batch_us(call, QUICK, flush))


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
        us = statistics.median(batch_us(call, WARM_UP, flush))
        launches[name] = launches_within(share, us)
    rounds: dict[str, list[list[float]]] = {name: [] for name in calls}
    order = random.Random(0)
    for _ in range(ROUNDS):
        for name in order.sample(list(calls), len(calls)):
            rounds[name].append(batch_us(calls[name], launches[name], flush, HEAD_START))
    return {name: summarise(samples) for name, samples in rounds.items()}


def capture(launch: Call) -> Call:
    """Replays a graph of one launch, which has run once before."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay
