"""Kernels on a device: loads a cubin, encodes tensor maps, packs parameters, launches."""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from cuda.bindings import driver

from emitters.image import Image, Param, ParamKind, driver_cuda
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


class Kernel:
    """An image on one device, ready to launch. Thread-safe.

    Its parameters live in one buffer that a launch overwrites under a lock: the driver has copied
    them when the launch returns, into the graph where one is captured.
    """

    def __init__(self, image: Image, device: int) -> None:
        self.record = image.record
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # the device's context exists and is current
            reason = why_unloadable(self.record.build, driver_cuda())
            if reason:
                raise DriverError(f"the image of {self.record.problem} can't be loaded: {reason}")
            module = _checked("cuModuleLoadData", driver.cuModuleLoadData(image.cubin))
            symbol = self.record.symbol.encode()
            self._function = _checked(
                "cuModuleGetFunction", driver.cuModuleGetFunction(module, symbol)
            )
        self._check_params(self.record.params)
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(
            "cuFuncSetAttribute",
            driver.cuFuncSetAttribute(self._function, attribute, self.record.smem_bytes),
        )
        count = len(self.record.params)
        self._slots = struct.Struct(f"<{count}q")
        self._values = ctypes.create_string_buffer(count * _SLOT)
        first = ctypes.addressof(self._values)
        self._pointers = (ctypes.c_void_p * count)(*(first + i * _SLOT for i in range(count)))
        self._arguments = ctypes.addressof(self._pointers)
        self._grid = self._stream = 0
        self._overlap = False
        self._lock = threading.Lock()
        self._config = driver.CUlaunchConfig()
        self._config.gridDimY = self._config.gridDimZ = 1
        self._config.blockDimX = self.record.threads
        self._config.blockDimY = self._config.blockDimZ = 1
        self._config.sharedMemBytes = self.record.smem_bytes
        self._config.gridDimX = 0
        self._set_attributes(overlap=False)

    def _check_params(self, params: tuple[Param, ...]) -> None:
        for i, param in enumerate(params):
            got = _checked("cuFuncGetParamInfo", driver.cuFuncGetParamInfo(self._function, i))
            if int(got[1]) != param.size:
                raise DriverError(
                    f"parameter {param.name}: {param.size} bytes, the kernel has {got[1]}"
                )

    def _set_attributes(self, overlap: bool) -> None:
        attributes = []
        if self.record.cluster != (1, 1, 1):
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            dimensions = attribute.value.clusterDim
            dimensions.x, dimensions.y, dimensions.z = self.record.cluster
            attributes.append(attribute)
        if overlap:
            attribute = driver.CUlaunchAttribute()
            ids = driver.CUlaunchAttributeID
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        self._config.attrs = attributes
        self._config.numAttrs = len(attributes)
        self._overlap = overlap

    def launch(self, values: list[int], grid: int, stream: int, overlap: bool = False) -> None:
        """Enqueues the kernel on a stream of the current device, which must be this kernel's.

        values: addresses and integers in the order of record.params. overlap: programmatic
        dependent launch: the kernel may start before its predecessor on the stream ends, and waits
        for it where it reads what that writes.
        """
        with self._lock:
            self._slots.pack_into(self._values, 0, *values)
            self._enqueue(grid, stream, overlap)

    def _enqueue(self, grid: int, stream: int, overlap: bool) -> None:
        if overlap is not self._overlap:
            self._set_attributes(overlap)
        if self._grid != grid or self._stream != stream:  # setting them is slow
            self._config.gridDimX = self._grid = grid
            self._config.hStream = self._stream = stream
        status = driver.cuLaunchKernelEx(self._config, self._function, self._arguments, 0)[0]
        if status != 0:
            raise DriverError(f"cuLaunchKernelEx failed: {driver.CUresult(status).name}")


class GemmKernel(Kernel):
    """A grouped GEMM: encodes the tensor maps of its weights and its output, and keeps them."""

    def __init__(self, image: Image, device: int) -> None:
        super().__init__(image, device)
        self.problem = GemmProblem.from_json(image.record.problem)
        dynamic = any(param.name == "counters" for param in self.record.params)
        self._counters = _counters(device) if dynamic else None
        self._at = {
            p.name: i for i, p in enumerate(self.record.params) if p.kind is ParamKind.TENSOR_MAP
        }
        self._boxes = {box.param: box for box in self.record.tensor_maps}
        self._maps: dict[tuple[Any, ...], tuple[driver.CUtensorMap, int]] = {}

    def launch_gemm(
        self,
        values: list[int],
        weight: tuple[int, tuple[int, ...], bool] | None,
        out: tuple[int, int],
        grid: int,
        stream: int,
        overlap: bool = False,
    ) -> None:
        """As `launch`.

        values: without the counters of a dynamic schedule; what stands for a tensor map is
        ignored. weight: pointer and strides of the [E, N, K] weights that such a map describes, and
        whether gate and up are interleaved; out: pointer and rows of the output.
        """
        with self._lock:
            if self._counters is not None:
                values = [*values, self._counters.address(stream)]
            self._slots.pack_into(self._values, 0, *values)
            if weight is not None:
                self._pointers[self._at["weight"]] = self._tensor_map(weight, self.encode_weight)
            self._pointers[self._at["out_map"]] = self._tensor_map(out, self._encode_out)
            self._enqueue(grid, stream, overlap)

    def _tensor_map(self, key: tuple[Any, ...], encode: Callable[..., driver.CUtensorMap]) -> int:
        cached = self._maps.get(key)
        if cached is None:
            if len(self._maps) >= _MAX_TENSOR_MAPS:
                self._maps.pop(next(iter(self._maps)))
            map_ = encode(*key)
            cached = self._maps[key] = (map_, int(map_.getPtr()))
        return cached[1]

    def encode_weight(
        self, pointer: int, strides: tuple[int, ...], interleaved: bool = False
    ) -> driver.CUtensorMap:
        """The tensor map through which the kernel reads weights [E, N, K] at `pointer`.

        strides: of E, N and K, in elements; K is dense. A map in a table describes one expert.
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
