"""Kernels on a device: loads a cubin, encodes tensor maps, packs parameters, launches."""

from __future__ import annotations

import ctypes
import struct
import threading
from typing import Any

import torch
from cuda.bindings import driver

from emitters.image import Image, Param, ParamKind
from emitters.problem import GemmProblem, WeightStorage

_SLOT = 8  # bytes kept for a parameter on the host; the driver copies as many as the kernel's own
_MAX_TENSOR_MAPS = 1024  # a kernel's cache of them; a model has one weight a layer
_MAP_DTYPES = {
    1: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    2: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT16,  # only zeros are ever filled in
}
_SWIZZLES = {128: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B}
_PROMOTIONS = {
    128: driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
    256: driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
}


class DriverError(RuntimeError):
    """A call of the CUDA driver failed."""


def _checked(call: str, result: tuple[Any, ...]) -> Any:
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise DriverError(f"{call} failed: {driver.CUresult(result[0]).name}")
    return result[1] if len(result) == 2 else result[1:]


class Kernel:
    """An image on one device, ready to launch. Thread-safe.

    Its parameters live in one buffer that a launch overwrites under a lock: the driver has copied
    them when the launch returns, into the graph where one is captured.
    """

    def __init__(self, image: Image, device: int) -> None:
        self.record = image.record
        self._problem = GemmProblem.from_json(image.record.problem)
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # the device's context exists and is current
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
        self._map_at = next(
            (i for i, p in enumerate(self.record.params) if p.kind is ParamKind.TENSOR_MAP), -1
        )
        self._maps: dict[tuple[int, tuple[int, ...]], tuple[driver.CUtensorMap, int]] = {}
        self._grid = self._stream = 0
        self._lock = threading.Lock()
        self._config = driver.CUlaunchConfig()
        self._config.gridDimY = self._config.gridDimZ = 1
        self._config.blockDimX = self.record.threads
        self._config.blockDimY = self._config.blockDimZ = 1
        self._config.sharedMemBytes = self.record.smem_bytes
        self._config.gridDimX = 0
        if self.record.cluster != (1, 1, 1):
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            dimensions = attribute.value.clusterDim
            dimensions.x, dimensions.y, dimensions.z = self.record.cluster
            self._config.attrs = [attribute]
            self._config.numAttrs = 1

    def _check_params(self, params: tuple[Param, ...]) -> None:
        for i, param in enumerate(params):
            got = _checked("cuFuncGetParamInfo", driver.cuFuncGetParamInfo(self._function, i))
            if int(got[1]) != param.size:
                raise DriverError(
                    f"parameter {param.name}: {param.size} bytes, the kernel has {got[1]}"
                )

    def launch(
        self,
        values: list[int],
        weight: tuple[int, tuple[int, ...]] | None,
        grid: int,
        stream: int,
    ) -> None:
        """Enqueues the kernel on a stream of the current device, which must be this kernel's.

        values: addresses and integers in the order of record.params; what stands for a tensor map
        is ignored. weight: pointer and strides of the [E, N, K] weights that such a map describes.
        """
        with self._lock:
            self._slots.pack_into(self._values, 0, *values)
            if weight is not None:
                self._pointers[self._map_at] = self._tensor_map(weight)
            if self._grid != grid or self._stream != stream:  # setting them is slow
                self._config.gridDimX = self._grid = grid
                self._config.hStream = self._stream = stream
            status = driver.cuLaunchKernelEx(self._config, self._function, self._arguments, 0)[0]
        if status != 0:
            raise DriverError(f"cuLaunchKernelEx failed: {driver.CUresult(status).name}")

    def _tensor_map(self, weight: tuple[int, tuple[int, ...]]) -> int:
        cached = self._maps.get(weight)
        if cached is None:
            if len(self._maps) >= _MAX_TENSOR_MAPS:
                self._maps.pop(next(iter(self._maps)))
            map_ = self.encode_tensor_map(*weight)
            cached = self._maps[weight] = (map_, int(map_.getPtr()))
        return cached[1]

    def encode_tensor_map(self, pointer: int, strides: tuple[int, ...]) -> driver.CUtensorMap:
        """The tensor map through which the kernel reads weights [E, N, K] at `pointer`.

        strides: of E, N and K, in elements; K is dense. A map in a table describes one expert.
        Raises DriverError where pointer or strides are not multiples of 16 bytes.
        """
        problem, box = self._problem, self.record.tensor_maps[0]
        experts = problem.num_experts if problem.weights is WeightStorage.STACKED else 1
        expert_stride, row_stride, _ = strides
        if experts == 1:
            expert_stride = row_stride  # never used, but checked
        size = problem.operand.bytes
        result = driver.cuTensorMapEncodeTiled(
            _MAP_DTYPES[size],
            3,
            pointer,
            [driver.cuuint64_t(extent) for extent in (problem.k, problem.n, experts)],
            [driver.cuuint64_t(stride * size) for stride in (row_stride, expert_stride)],
            [driver.cuuint32_t(extent) for extent in (box.k, box.n, 1)],
            [driver.cuuint32_t(1)] * 3,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            _SWIZZLES[box.swizzle],
            _PROMOTIONS[box.l2_promotion],
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        return _checked("cuTensorMapEncodeTiled", result)
