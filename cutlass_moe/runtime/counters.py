"""Device memory of dynamic schedules."""

from __future__ import annotations

from functools import cache

import torch


class Counters:
    """Device memory of dynamic schedules: pairs of int32 that every launch leaves at zero.

    Launches that may run at once never share a pair: eager ones have one per stream, captured ones
    one each, for good.
    """

    CHUNK = 65_536

    def __init__(self, device: int) -> None:
        self._device = device
        self._of_stream: dict[int, int] = {}
        self._chunks: list[torch.Tensor] = []
        self._free: list[int] = []
        self._grow()

    def _grow(self) -> None:
        chunk = torch.zeros(self.CHUNK, 2, dtype=torch.int32, device=f"cuda:{self._device}")
        torch.cuda.synchronize(self._device)  # zero for every stream
        self._chunks.append(chunk)
        self._free += range(chunk.data_ptr(), chunk.data_ptr() + chunk.nbytes, 8)

    def address(self, stream: int) -> int:
        """Of the pair for a launch on `stream`, the current one of this device."""
        if torch.cuda.is_current_stream_capturing():
            if not self._free:
                raise RuntimeError(
                    f"a graph must capture at most {self.CHUNK // 2} dynamic launches"
                )
            return self._free.pop()
        if len(self._free) < self.CHUNK // 2:
            self._grow()
        if stream not in self._of_stream:
            self._of_stream[stream] = self._free.pop()
        return self._of_stream[stream]


device_counters = cache(Counters)
