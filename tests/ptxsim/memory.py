"""Global memory: the arguments' tensors. Every access is checked."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.ptxsim.order import Order, Threads, some
from tests.ptxsim.ordered import OrderedMemory, aligned, places
from tests.ptxsim.ptx import Fault

_REGION_BITS = 40
WORKSPACE = -1  # in place of the number of the grid that writes


class Access(NamedTuple):
    """Who touches global memory. early: a grid that has not yet waited for the one before it."""

    threads: Threads
    grid: int = 0
    early: bool = False


class Region:
    """One argument's memory. writer: the grid that writes each byte once, WORKSPACE, or None.

    updated: that grid also reads it, each byte before it is written.
    """

    def __init__(self, name: str, data: np.ndarray, base: int, writer: int | None, updated: bool):
        self.name, self.data, self.base, self.writer = name, data, base, writer
        self.updated = updated
        self.writes = np.zeros(0 if writer is None else len(data), np.uint8)
        self.ordered: OrderedMemory | None = None
        self.read_by_first = self.written_early = False

    def pieces(self, size: int) -> np.ndarray:
        """The bytes, [n, size]."""
        return self.data[: len(self.data) // size * size].reshape(-1, size)

    def check_read(self, by: Access) -> None:
        if self.writer == by.grid and not self.updated:
            raise Fault(f"read of {self.name}, an output: only a workspace is written and read")
        if by.early and self.writer is not None:
            raise Fault(
                f"read of {self.name}, which the grid before writes, before griddepcontrol.wait"
            )
        self.read_by_first |= by.grid == 0
        self._check_overlap()

    def check_write(self, by: Access) -> None:
        if self.writer != by.grid:
            raise Fault(f"write to {self.name}, which is an input")
        self.written_early |= by.early
        self._check_overlap()

    def _check_overlap(self) -> None:
        if self.read_by_first and self.written_early:
            raise Fault(
                f"write to {self.name}, which the grid before reads, before griddepcontrol.wait"
            )


class GlobalMemory:
    """The arguments' tensors, each alone in its part of the address space."""

    def __init__(self) -> None:
        self.regions: list[Region] = []

    def add(
        self, name: str, data: np.ndarray, writer: int | None = None, updated: bool = False
    ) -> int:
        """data: uint8 [bytes], shared with the caller. Returns its address, 256-byte aligned."""
        base = (len(self.regions) + 1) << _REGION_BITS
        self.regions.append(Region(name, data, base, writer, updated))
        return base

    @property
    def workspaces(self) -> list[Region]:
        return [region for region in self.regions if region.writer == WORKSPACE]

    def attach(self, order: Order) -> None:
        """The order of all CTAs that touch the workspaces; what these hold happened before."""
        for region in self.workspaces:
            region.ordered = OrderedMemory(region.name, region.data, 0, order, written=True)

    def _region(self, addresses: np.ndarray, size: int) -> tuple[Region, np.ndarray]:
        """-> the region, offsets in it. addresses: int64 [n], not empty, all inside one region."""
        first = (int(addresses[0]) >> _REGION_BITS) - 1
        if not 0 <= first < len(self.regions):
            raise Fault(f"global access at {int(addresses[0]):#x}, outside every argument")
        region = self.regions[first]
        offsets = addresses - region.base
        outside = (offsets < 0) | (offsets > len(region.data) - size)
        if some(outside):
            raise Fault(
                f"global access of {size} bytes at {region.name} + {int(offsets[outside][0])}, "
                f"which has {len(region.data)} bytes"
            )
        return region, offsets

    def workspace(self, address: int) -> tuple[OrderedMemory, int]:
        """What an atomic access of 4 bytes touches, and where in it."""
        where = np.array([address])
        aligned(where, 4, "atomic access")
        region, offsets = self._region(where, 4)
        if region.ordered is None:
            raise Fault(f"atomic access of {region.name}, which is no workspace")
        return region.ordered, int(offsets[0])

    def read(self, by: Access, addresses: np.ndarray, size: int) -> np.ndarray:
        """uint8 [n, size], a thread each."""
        aligned(addresses, size, "global read")
        region, offsets = self._region(addresses, size)
        if region.ordered is not None:
            return region.ordered.read(by.threads, places(offsets, size))
        region.check_read(by)
        return region.pieces(size)[offsets // size]

    def read_bytes(self, by: Access, addresses: np.ndarray, size: int) -> np.ndarray:
        """The same of any size and alignment, as copies read."""
        region, offsets = self._region(addresses, size)
        if region.ordered is not None:
            raise Fault(f"asynchronous copy from {region.name}: not modelled for workspaces")
        region.check_read(by)
        index = offsets[:, None] + np.arange(size)
        if region.updated and region.writes[index].any():
            raise Fault(f"read of {region.name} after it was written")
        return region.data[index]

    def write(self, by: Access, addresses: np.ndarray, values: np.ndarray) -> None:
        """values: uint8 [n, size], a thread each."""
        size = values.shape[1]
        aligned(addresses, size, "global write")
        region, offsets = self._region(addresses, size)
        if region.ordered is not None:
            region.ordered.write(by.threads, places(offsets, size), values)
        else:
            self.write_bytes(by, addresses, values)

    def write_bytes(self, by: Access, addresses: np.ndarray, values: np.ndarray) -> None:
        """The same of any size and alignment, as copies write."""
        region, offsets = self._region(addresses, values.shape[1])
        if region.ordered is not None:
            raise Fault(f"asynchronous copy to {region.name}: not modelled for workspaces")
        region.check_write(by)
        index = offsets[:, None] + np.arange(values.shape[1])
        np.add.at(region.writes, index.ravel(), 1)
        twice = region.writes[index] > 1
        if some(twice):
            raise Fault(f"{region.name} + {int(index[twice][0])} bytes written twice")
        region.data[index] = values
