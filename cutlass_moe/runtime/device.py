"""The device guard: makes a device current while something is enqueued on its stream."""

from __future__ import annotations

from collections.abc import Callable

import torch


def on_device(device: int, enqueue: Callable[[int], None]) -> None:
    """Calls `enqueue` with torch's current stream of a CUDA device, while that device is current.

    If it is current already, no context manager is entered: that saves a microsecond per call.
    """
    if torch._C._cuda_getDevice() == device:
        enqueue(torch._C._cuda_getCurrentRawStream(device))
        return
    with torch.cuda.device(device):
        enqueue(torch._C._cuda_getCurrentRawStream(device))
