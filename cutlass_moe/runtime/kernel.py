"""Kernels on a device: loads a cubin, encodes tensor maps, packs parameters, launches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cuda.bindings import driver

from cutlass_moe.images.toolchains import driver_cuda, why_unloadable
from cutlass_moe.runtime.counters import _counters
from cutlass_moe.runtime.launch import DriverError, Launch
from cutlass_moe.runtime.tensor_map import WeightView
from emitters.spec.gemm import GemmProblem
from emitters.spec.image import Image, Param

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


def _checked(call: str, result: tuple[Any, ...]) -> Any:
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise DriverError(f"{call} failed: {driver.CUresult(result[0]).name}")
    return result[1] if len(result) == 2 else result[1:]


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
        self._launch = Launch(self.function, self.record)

    def _check_params(self, params: tuple[Param, ...]) -> None:
        for i, param in enumerate(params):
            got = _checked("cuFuncGetParamInfo", driver.cuFuncGetParamInfo(self.function, i))
            if int(got[1]) != param.size:
                raise DriverError(
                    f"parameter {param.name}: {param.size} bytes, the kernel has {got[1]}"
                )

    def prepare(self, values: Sequence[int], grid: int, overlap: bool = False) -> Launch:
        """A launch of the caller's own, to repeat; arguments as of `launch`."""
        launch = Launch(self.function, self.record)
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
        launch = Launch(self.function, self.record)
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
