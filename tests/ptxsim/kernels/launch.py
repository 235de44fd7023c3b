"""Runs a kernel of the SM90 grouped GEMM on CPU tensors and checks all that it wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutlass_moe.operands import clamped_numbers
from cutlass_moe.runtime.parameters import DENSE, Strides, column_stride, gemm_values, gemm_views
from cutlass_moe.runtime.tensor_map import View
from emitters.spec.epilogue import NUMBERS
from emitters.spec.gemm import GemmProblem, Major, WeightStorage
from emitters.spec.image import LaunchRecord, ParamKind
from emitters.spec.registry import GemmConfig
from tests.ptxsim.kernels.compiled import ptx_of
from tests.ptxsim.machine import Launch, Machine
from tests.ptxsim.memory import WORKSPACE, GlobalMemory
from tests.ptxsim.ptx import Fault, parse
from tests.ptxsim.schedule import Schedule
from tests.ptxsim.tensormap import TensorMap
from tests.ptxsim.warp import Code, Trace
from tests.support.numerics import poisoned


@dataclass(frozen=True)
class SimulatedKernel:
    record: LaunchRecord
    ptx: str
    code: Code

    @property
    def problem(self) -> GemmProblem:
        return GemmProblem.from_json(self.record.problem)

    def edited(self, ptx: str) -> SimulatedKernel:
        """The same kernel with other PTX."""
        return SimulatedKernel(self.record, ptx, Code(parse(ptx)))


@lru_cache(maxsize=4)
def kernel(problem: GemmProblem, config: GemmConfig, line_info: bool = False) -> SimulatedKernel:
    """One thread at a time may compile in a process. line_info: as in `ptx_of`."""
    record, ptx = ptx_of(problem, config, line_info)
    return SimulatedKernel(record, ptx, Code(parse(ptx)))


def _bytes(tensor: Tensor) -> np.ndarray:
    """A contiguous tensor's memory."""
    return tensor.view(torch.uint8).reshape(-1).numpy()


_LATE = ("x", "per_token_scale")  # what a GEMM's predecessor may write
_WRITTEN = ("h", "out_scale")  # among the inputs: what is written beside the output


def numbers_of(inputs: dict[str, Any]) -> tuple[float, ...]:
    """The numbers of the activation in arguments of `grouped_matmul`."""
    given = (inputs.get(name) for name in ("activation", *NUMBERS))
    return clamped_numbers(*given) or ()


def encode_map(record: LaunchRecord, param: str, address: int, view: View) -> bytes:
    """The tensor map, for one of a kernel's parameters, of the tensor at an address."""
    box = next(box for box in record.tensor_maps if box.param == param)
    return TensorMap(
        pointer=address,
        element_bytes=view.element_bytes,
        dims=view.extents,
        strides=tuple(stride * view.element_bytes for stride in view.strides),
        box=box.box,
        swizzle=box.swizzle,
    ).encode()


def pack(
    record: LaunchRecord, code: Code, values: Mapping[str, int], views: Mapping[str, View]
) -> bytes:
    """A kernel's parameters. values, views: as `Kernel.launch` takes them."""
    packed = bytearray(code.program.parameter_bytes)
    for param, declared in zip(record.params, code.program.parameters, strict=True):
        if param.size != declared.size:
            raise ValueError(f"{param.name}: {param.size} bytes, the PTX has {declared.size}")
        value = values[param.name]
        if param.kind is ParamKind.TENSOR_MAP:
            data = encode_map(record, param.name, value, views[param.name])
        else:
            data = value.to_bytes(param.size, "little", signed=param.kind is ParamKind.INT32)
        packed[declared.offset : declared.offset + len(data)] = data
    return bytes(packed)


def in_columns(record: LaunchRecord, inputs: dict[str, Any]) -> tuple[dict[str, Any], Strides]:
    """The inputs, with per_token_scale in columns if the kernel loads it by TMA, and strides.

    Between columns are NaNs.
    """
    if all(box.param != "per_token_scale" for box in record.tensor_maps):
        return inputs, DENSE
    scale = inputs["per_token_scale"]
    columns = torch.full((scale.shape[1], column_stride(len(scale))), torch.nan)
    columns[:, : len(scale)] = scale.T
    return {**inputs, "per_token_scale": columns}, Strides(x_scale=(1, columns.shape[1]))


class Arguments:
    """Tensors of `grouped_matmul` in simulated global memory, and the kernel's parameters.

    late: a grid before the kernel's writes x and per_token_scale, and reads out.
    """

    def __init__(
        self, kernel: SimulatedKernel, inputs: dict[str, Any], out: Tensor, late: bool = False
    ):
        self.memory, self.problem = GlobalMemory(), kernel.problem
        inputs, strides = in_columns(kernel.record, inputs)
        self.inputs, self.record, self.out = inputs, kernel.record, out
        self.grid = int(late)  # the kernel's
        self.copies: list[int] = []  # of the grid before: from, to, int32
        interleaved = inputs.get("interleaved", False)
        addresses = {
            name: self._add(name, tensor)
            for name, tensor in inputs.items()
            if isinstance(tensor, Tensor) and name not in ("weight", *_WRITTEN)
        }
        self.written = {"out": out, **{n: inputs[n] for n in _WRITTEN if n in inputs}}
        for name, tensor in self.written.items():
            address = self.memory.add(name, _bytes(tensor), writer=self.grid)
            addresses[name] = addresses[f"{name}_map"] = address
        if late:
            old = self.memory.add("old", np.zeros(out.nbytes, np.uint8), 0)
            self._copy(addresses["out"], old)
        views = gemm_views(
            self.problem,
            inputs["weight"].stride(),
            len(inputs["x"]),
            len(out),
            strides=strides,
            interleaved=interleaved,
        )
        addresses["weight"] = self._weight(inputs["weight"], views.get("weight"))
        self.counters = np.zeros(2, np.int32)  # of a dynamic schedule
        if any(param.name == "counters" for param in kernel.record.params):
            counters = self.counters.view(np.uint8)
            addresses["counters"] = self.memory.add("counters", counters, WORKSPACE)
        values = gemm_values(
            self.problem,
            addresses,
            len(inputs["x"]),
            len(out),
            strides=strides,
            interleaved=interleaved,
            numbers=numbers_of(inputs),
            early=late,
        )
        self.parameters = pack(kernel.record, kernel.code, values, views)

    def _add(self, name: str, tensor: Tensor) -> int:
        if not self.grid or name not in _LATE:
            return self.memory.add(name, _bytes(tensor))
        copied = self.memory.add(name, np.zeros(tensor.nbytes, np.uint8), writer=0)
        return self._copy(self.memory.add(f"{name} before", _bytes(tensor)), copied)

    def _copy(self, source: int, target: int) -> int:
        """Has the grid before copy a region to another; returns the other."""
        self.copies += (source, target, len(self.memory.regions[-1].data) // 4)
        return target

    def _weight(self, weight: Tensor, view: View | None) -> int:
        """The address of all weights, or of a table of tensor maps of each expert's.

        view: None for packed weights.
        """
        p = self.problem
        if view is None:
            return self.memory.add("weight", _bytes(weight))
        dense = weight if p.weight.major is Major.K else weight.mT
        base = self.memory.add("weight", _bytes(dense))
        if p.weight.storage is WeightStorage.STACKED:
            return base
        step = weight.stride(0) * view.element_bytes
        maps = [
            encode_map(self.record, "weight", base + e * step, view) for e in range(p.num_experts)
        ]
        return self.memory.add("tensor maps", np.frombuffer(b"".join(maps), np.uint8))

    def check_writes(self, written: Tensor) -> None:
        """written: bool [rows], which rows of what the kernel writes must have been written, once;
        no other."""
        if self.counters.any():
            raise Fault(f"counters left at {self.counters.tolist()}, not zero")
        for name, tensor in self.written.items():
            region = next(r for r in self.memory.regions if r.name == name)
            rows = region.writes.reshape(len(tensor), -1) if len(tensor) else region.writes
            expected = written.numpy().astype(np.uint8)[:, None]
            wrong = np.argwhere(rows != expected) if len(tensor) else np.zeros((0, 2), int)
            if len(wrong):
                row, byte = (int(i) for i in wrong[0])
                column = byte // tensor.element_size()
                verb = "never written" if written[row] else "written, which belongs to no expert"
                raise Fault(f"{name}[{row}, {column}] {verb} ({len(wrong)} bytes are wrong)")


def simulate(
    kernel: SimulatedKernel, inputs: dict[str, Any], schedule: Schedule, grid: int = 2, *,
    rows: int, trace: Trace | None = None, late: bool = False,
) -> Tensor:  # fmt: skip
    """out [rows, N], from `poisoned`. inputs: as `grouped_matmul` takes them, and int32 `starts`;
    of a problem that stores columns before the activation also h [rows, N], of one that quantises
    its output also out_scale [rows, columns / 128], which are written. late: a dependent launch,
    whose predecessor writes x and per_token_scale.

    Raises Fault for a defect of the kernel; what `out` holds is the caller's to check.
    """
    out = poisoned(rows, kernel.problem.out_columns, inputs["out_dtype"], "cpu")
    arguments = Arguments(kernel, inputs, out, late)
    record = kernel.record
    launch = Launch(
        kernel.code, grid, record.smem_bytes, record.registers, arguments.parameters,
        cluster=int(np.prod(record.cluster)),
    )  # fmt: skip
    before = [_predecessor(arguments.copies)] if late else []
    Machine(arguments.memory, [*before, launch], schedule, trace).run()
    arguments.check_writes(_owned(inputs, rows))
    return out


@lru_cache(maxsize=1)
def _late_copies() -> Code:
    from tests.ptxsim.samples import samples  # imports the DSL

    return Code(parse(samples.emit(samples.Late(), "ppi" * 3)))


def _predecessor(copies: list[int]) -> Launch:
    code = _late_copies()
    packed = bytearray(code.program.parameter_bytes)
    for value, p in zip(copies, code.program.parameters, strict=True):
        packed[p.offset : p.offset + p.size] = value.to_bytes(p.size, "little")
    return Launch(code, 1, 0, 32, bytes(packed))


def _owned(inputs: dict[str, Any], rows: int) -> Tensor:
    """Which rows belong to an expert."""
    ends = inputs["offsets"].clamp(0, rows)
    starts = inputs.get("starts")
    if starts is None:
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    row = torch.arange(rows)[:, None]
    return ((row >= starts) & (row < ends)).any(dim=1)
