"""Kernels on a device: loads an image, binds its parameters by name, launches it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from operator import itemgetter

import torch
from cuda.bindings import driver

from cutlass_moe.images.toolchains import driver_cuda, why_unloadable
from cutlass_moe.runtime.counters import device_counters
from cutlass_moe.runtime.driver import DriverError, checked
from cutlass_moe.runtime.launch import Launch
from cutlass_moe.runtime.tensor_map import TensorMaps, View
from emitters.spec.image import Image, Param, ParamKind

Views = Mapping[str, View]
_NO_VIEWS: Views = {}


class Kernel:
    """An image loaded on one device, ready to launch. Thread-safe.

    Parameters get their values by the names in the launch record:

      pointer      the tensor's address
      tensor map   the address of the tensor, whose shape and strides a view says; its name is the
                   tensor's, or that and "_map" if the tensor also has a pointer
      int32        the number
      counters     set by the kernel itself
    """

    def __init__(self, image: Image, device: int) -> None:
        self.record = image.record
        params = self.record.params
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # makes the device's context exist and current
            reason = why_unloadable(self.record.build, driver_cuda())
            if reason:
                raise DriverError(f"the image of {self.record.problem} can't be loaded: {reason}")
            module = checked("cuModuleLoadData", driver.cuModuleLoadData(image.cubin))
            symbol = self.record.symbol.encode()
            self.function = checked(
                "cuModuleGetFunction", driver.cuModuleGetFunction(module, symbol)
            )
        self._check_params(params)
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(
            "cuFuncSetAttribute",
            driver.cuFuncSetAttribute(self.function, attribute, self.record.smem_bytes),
        )
        self.maps = TensorMaps(self.record.tensor_maps)
        names = [param.name for param in params]
        self._bind = itemgetter(*names)
        self._map_params = [(at, param.name) for at, param in enumerate(params) if _is_map(param)]
        self._of_tensor: dict[str, list[tuple[int, str | None]]] = {}
        for at, param in enumerate(params):
            tensor = param.name.removesuffix("_map") if _is_map(param) else param.name
            map_name = param.name if _is_map(param) else None
            self._of_tensor.setdefault(tensor, []).append((at, map_name))
        self._counters = device_counters(device) if "counters" in names else None
        self._lock = threading.Lock()
        self._launch = Launch(self.function, self.record, self._counters)

    def _check_params(self, params: tuple[Param, ...]) -> None:
        for i, param in enumerate(params):
            got = checked("cuFuncGetParamInfo", driver.cuFuncGetParamInfo(self.function, i))
            if int(got[1]) != param.size:
                raise DriverError(
                    f"kernel parameter {param.name} must have {param.size} bytes, got {got[1]}"
                )

    def launch(
        self,
        values: Mapping[str, int],
        grid: int,
        stream: int,
        overlap: bool = False,
        views: Views = _NO_VIEWS,
    ) -> None:
        """Enqueues the kernel on a stream of the current device, which must be this kernel's.

        values: by parameter; names that are no parameter are ignored. grid: CTAs. overlap:
        programmatic dependent launch: the kernel may start before its predecessor on the stream
        ends, and waits for it before it reads what that writes. A dynamic schedule never overlaps,
        because launches on a stream share its counters. views: by parameter, of the tensors behind
        tensor maps.
        """
        with self._lock:
            self._fill(self._launch, values, grid, overlap, views)
            self._launch(stream)

    def prepare(
        self,
        values: Mapping[str, int],
        grid: int,
        overlap: bool = False,
        views: Views = _NO_VIEWS,
    ) -> Launch:
        """Makes a launch that the caller can repeat; takes the same arguments as `launch`."""
        launch = Launch(self.function, self.record, self._counters)
        self._fill(launch, values, grid, overlap, views)
        return launch

    def _fill(
        self,
        launch: Launch,
        values: Mapping[str, int],
        grid: int,
        overlap: bool,
        views: Views,
    ) -> None:
        launch.fill(self._bind(values))
        launch.shape(grid, overlap and self._counters is None)
        for at, name in self._map_params:
            launch.set_map(at, self.maps.find(name, values[name], views[name]))

    def move(self, launch: Launch, tensor: str, address: int, views: Views) -> None:
        """Changes the address of a tensor in a prepared launch."""
        values = launch.values
        for at, map_name in self._of_tensor[tensor]:
            if values[at] != address:
                if map_name is not None:
                    launch.set_map(at, self.maps.find(map_name, address, views[map_name]))
                values[at] = address


def _is_map(param: Param) -> bool:
    return param.kind is ParamKind.TENSOR_MAP
