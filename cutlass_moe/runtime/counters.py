"""The counters of dynamic schedules, in device memory."""

from __future__ import annotations

from functools import cache

import torch


class Counters:
    """Pairs of int32 in device memory, for dynamic schedules; every launch leaves them at zero.

    Launches that may run at the same time never share a pair: eager launches have one pair per
    stream, and each captured launch has one of its own for good.
    """

    CHUNK = 65_536

    def __init__(self, device: int) -> None:
        self._device = device
        self._by_stream: dict[int, int] = {}
        self._chunks: list[torch.Tensor] = []
        self._free: list[int] = []
        self._grow()

    def _grow(self) -> None:
        chunk = torch.zeros(self.CHUNK, 2, dtype=torch.int32, device=f"cuda:{self._device}")
        torch.cuda.synchronize(self._device)  # so that every stream sees zeros
        self._chunks.append(chunk)
        self._free += range(chunk.data_ptr(), chunk.data_ptr() + chunk.nbytes, 8)

    def address(self, stream: int) -> int:
        """The address of the pair for a launch on `stream`, this device's current stream.

        Raises RuntimeError if a graph captures more launches than there are pairs.
        """
        if torch.cuda.is_current_stream_capturing():
            if not self._free:
                raise RuntimeError(
                    f"a graph must capture at most {self.CHUNK // 2} launches with schedule "
                    "'dynamic', got more: use 'tile' or 'static'"
                )
            return self._free.pop()
        if len(self._free) < self.CHUNK // 2:
            self._grow()
        if stream not in self._by_stream:
            self._by_stream[stream] = self._free.pop()
        return self._by_stream[stream]


device_counters = cache(Counters)
