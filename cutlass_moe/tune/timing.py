"""Measures the GPU's time of a launch, by CUDA events, with operands flushed from L2."""

from __future__ import annotations

from collections.abc import Callable

import torch

FLUSH_BYTES = 256 << 20  # several times the 60 MB of L2
HEAD_START_CYCLES = 2_000_000  # the GPU sleeps about 1 ms while the host enqueues launches


def flush_buffer() -> torch.Tensor:
    """A buffer that pushes everything else out of L2 when it is written."""
    return torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")


def batch_us(
    call: Callable[[], object],
    launches: int,
    flush: torch.Tensor | None,
    head_start: int = HEAD_START_CYCLES,
) -> list[float]:
    """Times a number of calls; returns the microseconds of each. `flush` is written before each.

    head_start: cycles that the GPU sleeps first, enough for the host to stay ahead of it.
    """
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(launches)]
    stops = [torch.cuda.Event(enable_timing=True) for _ in range(launches)]
    torch.cuda._sleep(head_start)
    for start, stop in zip(starts, stops, strict=True):
        if flush is not None:
            flush.zero_()
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(stop) for start, stop in zip(starts, stops, strict=True)]
