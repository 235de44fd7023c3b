"""A CUDA driver that remembers launches, for kernels that are loaded and launched without a GPU."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.bindings import driver

from cutlass_moe.runtime import kernel as kernel_module
from cutlass_moe.runtime.kernel import Kernel
from emitters.spec.image import Image, Param, ParamKind, TensorMapBox
from tests.support.fake_images import make_image

SIZES = {ParamKind.TENSOR_MAP: 128, ParamKind.POINTER: 8, ParamKind.INT32: 4}
COUNTERS = 0xC0 << 8  # the address that every kernel's counters have
SUCCESS = driver.CUresult.CUDA_SUCCESS


@dataclass(frozen=True)
class Seen:
    """A launch. values: by parameter; a tensor map's is what it was encoded from."""

    values: dict[str, Any]
    grid: int
    stream: int
    overlap: bool


@dataclass
class FakeDriver:
    launches: list[Seen] = field(default_factory=list)
    encoded: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    _maps: dict[int, tuple[Any, Any]] = field(default_factory=dict)  # by address

    def kernel(self, params: Iterable[tuple[str, ParamKind]], threads: int = 256) -> Kernel:
        """One with these parameters. Its function is its record, for this driver to read."""
        found = tuple(Param(name, kind, 0, SIZES[kind]) for name, kind in params)
        boxes = tuple(
            TensorMapBox(param.name, (64, 8), 128, 128)
            for param in found
            if param.kind is ParamKind.TENSOR_MAP
        )
        image = make_image()
        record = replace(image.record, params=found, tensor_maps=boxes, threads=threads)
        self._record = record
        return Kernel(Image(image.cubin, record), 0)

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ok = (SUCCESS,)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
        monkeypatch.setattr(kernel_module, "driver_cuda", lambda: None)
        counters = SimpleNamespace(address=lambda stream: COUNTERS + stream)
        monkeypatch.setattr(kernel_module, "device_counters", lambda device: counters)
        for name, answer in (
            ("cuModuleLoadData", lambda cubin: (SUCCESS, None)),
            ("cuModuleGetFunction", lambda module, symbol: (SUCCESS, self._record)),
            (
                "cuFuncGetParamInfo",
                lambda function, i: (SUCCESS, 0, function.params[i].size),
            ),
            ("cuFuncSetAttribute", lambda *_: ok),
            ("cuTensorMapEncodeTiled", self._encode),
            ("cuLaunchKernelEx", self._launch),
        ):
            monkeypatch.setattr(driver, name, answer)

    def _encode(
        self, dtype: Any, rank: int, address: int, extents: Any, strides: Any, *rest: Any
    ) -> tuple[Any, Any]:
        made = driver.CUtensorMap()
        seen = address, tuple(map(int, extents)), tuple(map(int, strides))
        self.encoded.append(seen)
        self._maps[int(made.getPtr())] = made, seen
        return SUCCESS, made

    def _launch(self, config: Any, record: Any, arguments: int, extra: int) -> tuple[Any]:
        slots = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))
        values: dict[str, Any] = {}
        for i, param in enumerate(record.params):
            if param.kind is ParamKind.TENSOR_MAP:
                values[param.name] = self._maps[slots[i]][1]
            else:
                values[param.name] = ctypes.c_int64.from_address(slots[i]).value
        ids = [attribute.id for attribute in config.attrs[: config.numAttrs]]
        serialize = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        self.launches.append(Seen(values, config.gridDimX, int(config.hStream), serialize in ids))
        return (SUCCESS,)


@pytest.fixture
def fake_driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    made = FakeDriver()
    made.patch(monkeypatch)
    return made
