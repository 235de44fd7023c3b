"""Tensor maps: the driver encodes them, and a kernel keeps those of the tensors it has seen."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import NamedTuple

from cuda.bindings import driver

from cutlass_moe.runtime.driver import checked
from emitters.spec.image import TensorMapBox

_LIMIT = 1024  # maps that a kernel keeps; a model needs one per layer
_DTYPES = {
    1: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    2: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT16,  # the fill is 0 in every dtype
    4: driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT32,
}
SWIZZLES = {
    0: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
    64: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_64B,
    128: driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
}
_PROMOTIONS = {
    128: driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
    256: driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
}


class View(NamedTuple):
    """The shape and strides of a tensor as a tensor map lists them: innermost dimension first."""

    extents: tuple[int, ...]  # elements along each dimension
    strides: tuple[int, ...]  # in elements, of all dimensions but the innermost
    element_bytes: int


class TensorMaps:
    """The tensor maps of a kernel, encoded once per tensor. Thread-safe."""

    def __init__(self, boxes: Iterable[TensorMapBox]) -> None:
        self._boxes = {box.param: box for box in boxes}
        self._kept: dict[tuple[str, int, View], driver.CUtensorMap] = {}
        self._lock = threading.Lock()

    def find(self, param: str, address: int, view: View) -> driver.CUtensorMap:
        """The tensor map, for parameter `param`, of the tensor at `address`.

        Raises DriverError unless address and strides are multiples of 16 bytes.
        """
        key = param, address, view
        tensor_map = self._kept.get(key)
        if tensor_map is None:
            tensor_map = self.encode(param, address, view)
            with self._lock:
                if len(self._kept) >= _LIMIT:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[key] = tensor_map
        return tensor_map

    def encode(self, param: str, address: int, view: View) -> driver.CUtensorMap:
        """Encodes a tensor map without keeping it; arguments as in `find`."""
        box = self._boxes[param]
        extents, strides, element_bytes = view
        rank = len(extents)
        result = driver.cuTensorMapEncodeTiled(
            _DTYPES[element_bytes],
            rank,
            address,
            [driver.cuuint64_t(extent) for extent in extents],
            [driver.cuuint64_t(stride * element_bytes) for stride in strides],
            [driver.cuuint32_t(extent) for extent in box.box],
            [driver.cuuint32_t(1)] * rank,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            SWIZZLES[box.swizzle],
            _PROMOTIONS[box.l2_promotion],
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        return checked("cuTensorMapEncodeTiled", result)
