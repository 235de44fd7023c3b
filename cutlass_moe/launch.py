"""Kernels on a device: loads a cubin, encodes tensor maps, packs parameters, launches."""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from cuda.bindings import driver

from emitters.image import Image, Param, driver_cuda
from emitters.problem import GemmProblem

_SLOT = 8  # bytes kept for a parameter on the host; the driver copies as many as the kernel's own
_MAX_TENSOR_MAPS = 1024  # a kernel's cache of them; a model has one weight a layer
_MAP_DTYPES = {
    1: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    2: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT16,  # only zeros are ever filled in
    4: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT32,
}
_SWIZZLES = {128: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B}
_PROMOTIONS = {
    128: driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
    256: driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
}


_DRIVERS = {12: "R525", 13: "R580"}  # the first that runs cubins of a CUDA toolkit's major version


class DriverError(RuntimeError):
    """A call of the CUDA driver failed, or would fail."""


def why_unloadable(build: str, cuda: int | None) -> str | None:
    """None where a driver of this CUDA version loads images of a build, else the reason in words.

    build: a build identity, whose word cu12 or cu13 names the toolkit. A driver loads cubins of its
    own major version and of older ones; of an unknown one (None) nothing is said.
    """
    toolkit = re.search(r"\bcu(\d+)\b", build)
    if toolkit is None or cuda is None or int(toolkit[1]) <= cuda // 1000:
        return None
    needed, (major, minor) = int(toolkit[1]), divmod(cuda, 1000)
    instead = f", or build with the cu{major} toolchain" if major in _DRIVERS else ""
    return (
        f"it was compiled by CUDA {needed}, whose cubins need driver "
        f"{_DRIVERS.get(needed, 'of a later branch')} or newer (CUDA {needed}.0), but this driver "
        f"supports CUDA {major}.{minor // 10}: update it{instead}"
    )


def _checked(call: str, result: tuple[Any, ...]) -> Any:
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise DriverError(f"{call} failed: {driver.CUresult(result[0]).name}")
    return result[1] if len(result) == 2 else result[1:]


class Counters:
    """Device memory of dynamic schedules: pairs of int32 that every launch leaves at zero.

    Launches that may run at once never share a pair: eager ones have one a stream, captured ones
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
                raise RuntimeError(f"a graph captured more than {self.CHUNK // 2} dynamic launches")
            return self._free.pop()
        if len(self._free) < self.CHUNK // 2:
            self._grow()
        if stream not in self._of_stream:
            self._of_stream[stream] = self._free.pop()
        return self._of_stream[stream]


_counters = cache(Counters)


class Launch:
    """A launch that can be repeated: a kernel's parameters, in memory of its own, and its grid.

    What differs from the launch before is set in between: `values` are the parameters, addresses
    and integers in the order of record.params; what stands for a tensor map is ignored. Not
    thread-safe. The driver has copied all of it when a call returns, into the graph where one is
    captured.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._function = kernel.function
        record = kernel.record
        count = len(record.params)
        self._slots = struct.Struct(f"<{count}q")
        self.values = (ctypes.c_int64 * count)()
        first = ctypes.addressof(self.values)
        self._pointers = (ctypes.c_void_p * count)(*(first + i * _SLOT for i in range(count)))
        self._arguments = ctypes.addressof(self._pointers)
        self._maps: dict[int, driver.CUtensorMap] = {}  # kept alive
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
        """How the launches to come are made. grid: CTAs. overlap: as in `Kernel.launch`."""
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
        """Sets all of `values`."""
        self._slots.pack_into(self.values, 0, *values)

    def set_map(self, at: int, tensor_map: driver.CUtensorMap) -> None:
        """Sets parameter number `at`, a tensor map."""
        if self._maps.get(at) is not tensor_map:
            self._maps[at] = tensor_map
            self._pointers[at] = int(tensor_map.getPtr())

    def __call__(self, stream: int) -> None:
        """Enqueues the kernel on a stream of the current device, which must be the kernel's."""
        if stream != self._stream:
            self._config.hStream = self._stream = stream
        status = driver.cuLaunchKernelEx(self._config, self._function, self._arguments, 0)[0]
        if status != 0:
            raise DriverError(f"cuLaunchKernelEx failed: {driver.CUresult(status).name}")


class Kernel:
    """An image on one device, ready to launch. Thread-safe."""

    def __init__(self, image: Image, device: int) -> None:
        self.record = image.record
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # the device's context exists and is current
            reason = why_unloadable(self.record.build, driver_cuda())
            if reason:
                raise DriverError(f"the image of {self.record.problem} can't be loaded: {reason}")
            module = _checked("cuModuleLoadData", driver.cuModuleLoadData(image.cubin))
            symbol = self.record.symbol.encode()
            self.function = _checked(
                "cuModuleGetFunction", driver.cuModuleGetFunction(module, symbol)
            )
        self._check_params(self.record.params)
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(
            "cuFuncSetAttribute",
            driver.cuFuncSetAttribute(self.function, attribute, self.record.smem_bytes),
        )
        self._lock = threading.Lock()
        self._launch = Launch(self)

    def _check_params(self, params: tuple[Param, ...]) -> None:
        for i, param in enumerate(params):
            got = _checked("cuFuncGetParamInfo", driver.cuFuncGetParamInfo(self.function, i))
            if int(got[1]) != param.size:
                raise DriverError(
                    f"parameter {param.name}: {param.size} bytes, the kernel has {got[1]}"
                )

    def prepare(self, values: Sequence[int], grid: int, overlap: bool = False) -> Launch:
        """A launch of the caller's own, to repeat; arguments as of `launch`."""
        launch = Launch(self)
        launch.fill(values)
        launch.shape(grid, overlap)
        return launch

    def launch(self, values: Sequence[int], grid: int, stream: int, overlap: bool = False) -> None:
        """Enqueues the kernel on a stream of the current device, which must be this kernel's.

        values: addresses and integers in the order of record.params. overlap: programmatic
        dependent launch: the kernel may start before its predecessor on the stream ends, and waits
        for it where it reads what that writes.
        """
        with self._lock:
            self._launch.fill(values)
            self._launch.shape(grid, overlap)
            self._launch(stream)


class WeightView(NamedTuple):
    """Weights [E, N, K] as a tensor map describes them.

    strides: of E, N and K, in elements. interleaved: whether the rows of a gated problem's weights
    are gate, up, gate, up, ...; else the first half of them is gate.
    """

    pointer: int
    strides: tuple[int, ...]
    interleaved: bool = False


class GemmKernel(Kernel):
    """A grouped GEMM: encodes the tensor maps of its weights and its output, and keeps them."""

    def __init__(self, image: Image, device: int) -> None:
        super().__init__(image, device)
        self.problem = GemmProblem.from_json(image.record.problem)
        self.at = {param.name: i for i, param in enumerate(self.record.params)}
        self._boxes = {box.param: box for box in self.record.tensor_maps}
        self._counters = _counters(device) if "counters" in self.at else None
        self._maps: dict[tuple[Any, ...], driver.CUtensorMap] = {}
        self._maps_lock = threading.Lock()

    def prepare_gemm(
        self,
        values: Sequence[int],
        weight: WeightView | None,
        out: tuple[int, int],
        grid: int,
        overlap: bool = False,
    ) -> Launch:
        """A launch of the caller's own, to repeat after `set_counters`; else as `launch_gemm`."""
        launch = Launch(self)
        self._fill(launch, values, weight, out, grid, overlap)
        return launch

    def launch_gemm(
        self,
        values: Sequence[int],
        weight: WeightView | None,
        out: tuple[int, int],
        grid: int,
        stream: int,
        overlap: bool = False,
    ) -> None:
        """As `launch`.

        values: without the counters of a dynamic schedule; what stands for a tensor map is
        ignored. weight: what such a map describes; out: pointer and rows of the output. A dynamic
        schedule never overlaps: its counters are those of the launch before.
        """
        with self._lock:
            self._fill(self._launch, values, weight, out, grid, overlap)
            self.set_counters(self._launch, stream)
            self._launch(stream)

    def _fill(
        self,
        launch: Launch,
        values: Sequence[int],
        weight: WeightView | None,
        out: tuple[int, int],
        grid: int,
        overlap: bool,
    ) -> None:
        launch.fill(values if self._counters is None else [*values, 0])
        launch.shape(grid, overlap and self._counters is None)
        if weight is not None:
            self.set_weight(launch, weight)
        self.set_out(launch, *out)

    def set_weight(self, launch: Launch, weight: WeightView) -> None:
        """Where the weights of a launch of this kernel are; raises as `encode_weight`."""
        launch.set_map(self.at["weight"], self._tensor_map(weight, self.encode_weight))

    def set_out(self, launch: Launch, pointer: int, rows: int) -> None:
        """Where the output of a launch of this kernel is."""
        launch.values[self.at["out"]] = pointer
        launch.set_map(self.at["out_map"], self._tensor_map((pointer, rows), self._encode_out))

    def set_counters(self, launch: Launch, stream: int) -> None:
        """For a call on `stream`, the current one of this device."""
        if self._counters is not None:
            launch.values[self.at["counters"]] = self._counters.address(stream)

    def _tensor_map(
        self, key: tuple[Any, ...], encode: Callable[..., driver.CUtensorMap]
    ) -> driver.CUtensorMap:
        found = self._maps.get(key)
        if found is None:
            found = encode(*key)
            with self._maps_lock:
                if len(self._maps) >= _MAX_TENSOR_MAPS:
                    self._maps.pop(next(iter(self._maps)))
                self._maps[key] = found
        return found

    def encode_weight(
        self, pointer: int, strides: tuple[int, ...], interleaved: bool = False
    ) -> driver.CUtensorMap:
        """The tensor map through which the kernel reads weights [E, N, K] at `pointer`.

        strides: of E, N and K, in elements; K or N is dense. A map in a table describes one expert.
        Raises DriverError where pointer or strides are not multiples of 16 bytes.
        """
        view = self.problem.weight_view(strides, interleaved)
        return self._encode("weight", self.problem.operand.bytes, pointer, *view)

    def _encode_out(self, pointer: int, rows: int) -> driver.CUtensorMap:
        columns, size = self.problem.out_columns, self.problem.out.bytes
        return self._encode("out_map", size, pointer, (columns, rows), (columns,))

    def _encode(
        self,
        param: str,
        size: int,
        pointer: int,
        extents: tuple[int, ...],
        strides: tuple[int, ...],
    ) -> driver.CUtensorMap:
        """extents: innermost first; strides: of all but the innermost. In elements of `size`."""
        box = self._boxes[param]
        rank = len(extents)
        result = driver.cuTensorMapEncodeTiled(
            _MAP_DTYPES[size],
            rank,
            pointer,
            [driver.cuuint64_t(extent) for extent in extents],
            [driver.cuuint64_t(stride * size) for stride in strides],
            [driver.cuuint32_t(extent) for extent in box.box],
            [driver.cuuint32_t(1)] * rank,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            _SWIZZLES[box.swizzle],
            _PROMOTIONS[box.l2_promotion],
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        return _checked("cuTensorMapEncodeTiled", result)
