"""The GPU's time of a launch: CUDA events around it, nothing of its operands in L2."""

from __future__ import annotations

from collections.abc import Callable

import torch

FLUSH_BYTES = 256 << 20  # several times the 60 MB of L2
HEAD_START_CYCLES = 2_000_000  # about 1 ms, in which the host gets ahead of the GPU


def flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")


def batch_us(call: Callable[[], object], launches: int, flush: torch.Tensor | None) -> list[float]:
    """Microseconds of each of `launches` calls; `flush` is written before each."""
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(launches)]
    stops = [torch.cuda.Event(enable_timing=True) for _ in range(launches)]
    torch.cuda._sleep(HEAD_START_CYCLES)
    for start, stop in zip(starts, stops, strict=True):
        if flush is not None:
            flush.zero_()
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(stop) for start, stop in zip(starts, stops, strict=True)]
