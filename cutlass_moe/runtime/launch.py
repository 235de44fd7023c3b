"""Launches of a kernel that can be repeated."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

from cuda.bindings import driver

from cutlass_moe.runtime.counters import Counters
from cutlass_moe.runtime.driver import DriverError
from emitters.spec.image import LaunchRecord

_SLOT = 8  # bytes per parameter on the host; the driver copies only as many as the kernel takes


class Launch:
    """A launch that can be repeated: a kernel's parameters, in its own memory, and its grid.

    Between calls, whatever differs from the last one is set. `values` holds the parameters,
    addresses and integers, in the order of record.params; the values of tensor maps and counters
    are ignored there. When a call returns, the driver has copied everything (into the graph if one
    is captured). Not thread-safe.
    """

    def __init__(
        self, function: driver.CUfunction, record: LaunchRecord, counters: Counters | None = None
    ) -> None:
        """Makes a launch of a loaded function. counters: if the kernel has such a parameter."""
        self._function, self._counters = function, counters
        if counters is not None:
            self._counters_at = [param.name for param in record.params].index("counters")
        count = len(record.params)
        self._slots = struct.Struct(f"<{count}q")
        self.values = (ctypes.c_int64 * count)()
        first = ctypes.addressof(self.values)
        self._pointers = (ctypes.c_void_p * count)(*(first + i * _SLOT for i in range(count)))
        self._arguments = ctypes.addressof(self._pointers)
        self._maps: dict[int, driver.CUtensorMap] = {}  # keeps them alive
        self._cluster = record.cluster
        self._config = driver.CUlaunchConfig()
        self._config.gridDimY = self._config.gridDimZ = 1
        self._config.blockDimX = record.threads
        self._config.blockDimY = self._config.blockDimZ = 1
        self._config.sharedMemBytes = record.smem_bytes
        self._grid = self._stream = 0
        self._overlap: bool | None = None
        self.shape(0, overlap=False)

    def shape(self, grid: int, overlap: bool) -> None:
        """Sets the grid, in CTAs, and the overlap (see `Kernel.launch`) of the next calls."""
        if grid != self._grid:
            self._config.gridDimX = self._grid = grid
        if overlap is self._overlap:
            return
        ids, attributes = driver.CUlaunchAttributeID, []
        if self._cluster != (1, 1, 1):
            attribute = driver.CUlaunchAttribute()
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            dimensions = attribute.value.clusterDim
            dimensions.x, dimensions.y, dimensions.z = self._cluster
            attributes.append(attribute)
        if overlap:
            attribute = driver.CUlaunchAttribute()
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        self._config.attrs = attributes
        self._config.numAttrs = len(attributes)
        self._overlap = overlap

    def fill(self, values: Sequence[int]) -> None:
        """Sets all `values`, in the order of record.params."""
        self._slots.pack_into(self.values, 0, *values)

    def set_map(self, at: int, tensor_map: driver.CUtensorMap) -> None:
        """Sets parameter number `at`, a tensor map."""
        if self._maps.get(at) is not tensor_map:
            self._maps[at] = tensor_map
            self._pointers[at] = int(tensor_map.getPtr())

    def __call__(self, stream: int) -> None:
        """Enqueues the kernel on a stream of the current device, which must be the kernel's."""
        if self._counters is not None:
            self.values[self._counters_at] = self._counters.address(stream)
        if stream != self._stream:
            self._config.hStream = self._stream = stream
        status = driver.cuLaunchKernelEx(self._config, self._function, self._arguments, 0)[0]
        if status != 0:
            raise DriverError(f"cuLaunchKernelEx failed: {driver.CUresult(status).name}")
