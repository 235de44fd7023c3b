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
from emitters.spec.gemm import GemmProblem, WeightStorage
from emitters.spec.image import Image, Param, ParamKind, TensorMapBox
from emitters.spec.layer_steps import ActivateProblem
from emitters.spec.registry import Config, Problem
from emitters.spec.staged_sm90 import Schedule
from emitters.spec.weight_grad import Side, WeightGradProblem
from tests.support.fake_images import make_image

MAP, POINTER, INT = ParamKind.TENSOR_MAP, ParamKind.POINTER, ParamKind.INT32
INTEGERS = (
    "num_ids pairs choices capacity max_rows phase num_tokens k topk_groups renormalize num_rows "
    "early source_stride weight_stride num_pairs num_groups limit alpha beta scale_stride "
    "scale_k_stride power_of_two"
)
ROUTER = "logits correction_bias weights ids num_tokens k topk_groups renormalize scale threshold"
TABLE = "index offsets inverse"
LIMITS = "capacity max_rows overflow"
PARAMETERS = {
    "route": f"ids expert_map num_ids pairs choices {LIMITS} {TABLE} histograms phase",
    "topk_router": ROUTER,
    "route_logits": f"{ROUTER} {LIMITS} {TABLE}",
    "quantize": "source end q scale static_scale num_rows source_stride early",
    "quantize_groups": (
        "source end q scale scale_stride scale_k_stride num_rows source_stride power_of_two early"
    ),
    "combine": "rows weights inverse residual out num_rows num_tokens weight_stride",
    "gather_sum": "rows order bounds out num_groups",
    "activate": "h inverse active num_rows num_pairs",
    "activate_backward": (
        "h grad_active weights inverse grad_h active grad_weights num_rows num_pairs"
    ),
}
_OF_GRADIENT = (
    *((name, POINTER) for name in ("grad_h", "topk_weights", "inverse", "shares")),
    ("grad_h_map", MAP),
    ("choices", INT),
)
SIZES = {ParamKind.TENSOR_MAP: 128, ParamKind.POINTER: 8, ParamKind.INT32: 4}
COUNTERS = 0xC0 << 8  # the address that every kernel's counters have
SUCCESS = driver.CUresult.CUDA_SUCCESS


def parameters_of(problem: Problem, config: Config) -> list[tuple[str, ParamKind]]:
    """Names and kinds of a kernel's parameters, as the emitters know them, in some order."""
    if isinstance(problem, WeightGradProblem):
        return _of_weight_grad(problem)
    if not isinstance(problem, GemmProblem):
        integers = f"{INTEGERS} scale threshold" if "rout" in problem.op else INTEGERS
        names = PARAMETERS[problem.op].split()
        if isinstance(problem, ActivateProblem):
            names += problem.numbers
        return [(name, INT if name in integers.split() else POINTER) for name in names]
    stacked = problem.weight.storage is WeightStorage.STACKED
    operands = (node.operand for node in problem.epilogue if node.operand)
    tma_x = getattr(config, "tma_x", False)
    boxed = tma_x and problem.block_rows
    found = [
        ("weight", MAP if stacked else POINTER),
        ("x", MAP if tma_x else POINTER),
        ("index", POINTER if problem.gather else None),
        ("starts", POINTER),
        ("offsets", POINTER),
        ("out", POINTER),
        ("out_map", MAP),
        ("num_tokens", INT),
        ("x_stride", None if tma_x else INT),
        ("num_rows", INT),
        ("early", INT),
        ("column_stride", INT if problem.gated else None),
        ("gate_stride", INT if problem.gated else None),
        *((name, INT) for name in problem.numbers),
        ("h", POINTER if problem.stored else None),
        ("h_map", MAP if problem.stored or problem.gradient else None),
        *((name, kind) for name, kind in _OF_GRADIENT if problem.gradient),
        ("per_token_scale", (MAP if boxed else POINTER) if problem.x_scale else None),
        *(
            (f"per_token_scale{stride}", INT if problem.block_rows and not tma_x else None)
            for stride in ("_stride", "_k_stride")
        ),
        ("scale", POINTER if problem.weight_scale else None),
        ("out_scale", POINTER if problem.quantized_out else None),
        ("out_scale_stride", INT if problem.quantized_out else None),
        ("out_scale_k_stride", INT if problem.quantized_out else None),
        *((operand, POINTER) for operand in operands),
        ("counters", POINTER if getattr(config, "schedule", "") == Schedule.DYNAMIC else None),
    ]
    return [(name, kind) for name, kind in found if kind is not None]


def _of_weight_grad(problem: WeightGradProblem) -> list[tuple[str, ParamKind]]:
    gathers = problem.gathered is not None
    found = [
        *((side.value, POINTER if side is problem.gathered else MAP) for side in Side),
        ("index", POINTER if gathers else None),
        ("num_tokens", INT if gathers else None),
        ("gathered_stride", INT if gathers else None),
        ("starts", POINTER),
        ("offsets", POINTER),
        ("num_rows", INT),
        ("out", MAP),
    ]
    return [(name, kind) for name, kind in found if kind is not None]


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

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
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
        return self

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
