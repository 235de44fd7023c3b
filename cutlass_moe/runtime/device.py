"""The device guard: what is enqueued, on torch's current stream of which device."""

from __future__ import annotations

from collections.abc import Callable

import torch


def on_device(device: int, enqueue: Callable[[int], None]) -> None:
    """Calls `enqueue` with torch's current stream of CUDA device `device`, while that is current.

    A context manager would cost a warm call a microsecond where the device is current anyway.
    """
    if torch._C._cuda_getDevice() == device:
        enqueue(torch._C._cuda_getCurrentRawStream(device))
        return
    with torch.cuda.device(device):
        enqueue(torch._C._cuda_getCurrentRawStream(device))
