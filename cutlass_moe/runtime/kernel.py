"""Kernels on a device: an image loaded, its parameters bound by name, launched."""

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
    """An image on one device, ready to launch. Thread-safe.

    Parameters are bound by the names that the launch record gives them. A pointer's value is an
    address, and so is a tensor map's: that of the tensor it describes, which a view says the shape
    of. A tensor's map bears the tensor's name or, beside a pointer, that and "_map". The value of
    `counters` is the kernel's own.
    """

    def __init__(self, image: Image, device: int) -> None:
        self.record = image.record
        params = self.record.params
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # the device's context exists and is current
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
                    f"parameter {param.name} must have {param.size} bytes, the kernel has {got[1]}"
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

        values: by parameter; others are ignored. grid: CTAs. overlap: programmatic dependent
        launch: the kernel may start before its predecessor on the stream ends, and waits for it
        where it reads what that writes. A dynamic schedule never overlaps: its counters are those
        of the launch before. views: of the tensors behind tensor maps, by parameter.
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
        """A launch of the caller's own, to repeat; arguments as in `launch`."""
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
        """Has a prepared launch find a tensor at another address."""
        values = launch.values
        for at, map_name in self._of_tensor[tensor]:
            if values[at] != address:
                if map_name is not None:
                    launch.set_map(at, self.maps.find(map_name, address, views[map_name]))
                values[at] = address


def _is_map(param: Param) -> bool:
    return param.kind is ParamKind.TENSOR_MAP
