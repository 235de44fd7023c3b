"""What is known of a GPU by its name: from data sheets, else from the device itself."""

from __future__ import annotations

from functools import lru_cache

import torch

from emitters.spec.arch import GPUS, H200, Gpu

_MIG = " MIG "  # between the name of a GPU and of a slice of it, "1g.18gb"


@lru_cache
def gpu_of(name: str) -> Gpu:
    """The figures of the GPU that the driver calls so.

    Those of data sheets where the name is known. Else SMs, L2 and bandwidth are asked of a device
    here that has the name, and its tensor cores are taken to be an H200's. A MIG slice counts as
    the share of its GPU that its SMs are. Without such a device, an H200 is assumed.
    """
    known = GPUS.get(name)
    if known is not None:
        return known
    base = GPUS.get(name.partition(_MIG)[0], H200)
    for device in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(device)
        if found.name == name:
            share = base.share(name, found.multi_processor_count)
            return share if _MIG in name else _asked(found, share)
    return base


def _asked(found: torch.cuda._CudaDeviceProperties, share: Gpu) -> Gpu:
    """What a device's properties say, and of `share` what they do not: older torch has no clock."""
    hertz = 1e3 * getattr(found, "memory_clock_rate", 0)  # two transfers per cycle
    bandwidth = 2 * hertz * getattr(found, "memory_bus_width", 0) / 8
    return Gpu(
        found.name,
        found.multi_processor_count,
        bandwidth or share.bandwidth,
        found.L2_cache_size or share.l2,
        share.flops,
    )
