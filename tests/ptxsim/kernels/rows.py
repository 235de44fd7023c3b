"""The kernels that work on rows (quantise, combine, activate) on tiny tensors, alone or two in a
chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from emitters.spec.layer_steps import QuantizeGroupsProblem, QuantizeProblem
from tests.ptxsim.kernels.routing import StepKernel
from tests.ptxsim.machine import Launch, Machine
from tests.ptxsim.memory import GlobalMemory
from tests.ptxsim.ptx import Fault
from tests.ptxsim.schedule import Schedule

OUTPUTS = ("q", "scale", "out", "active", "grad_h", "grad_weights")


@dataclass(frozen=True)
class Stage:
    """A launch. arguments: by parameter; a tensor that two stages name is the same memory. written:
    rows of its outputs that it must write, the first ones, and no other; or by output."""

    kernel: StepKernel
    arguments: Mapping[str, Tensor | int]
    grid: int
    written: int | Mapping[str, int]


def run(stages: Sequence[Stage], schedule: Schedule) -> None:
    """Fills the stages' outputs; each starts once the one before lets it. Raises Fault."""
    memory = GlobalMemory()
    address: dict[int, int] = {}
    for number, stage in enumerate(stages):
        for name in OUTPUTS:
            if name in stage.arguments:
                _add(memory, address, name, stage.arguments[name], number)
    for stage in stages:
        for name, value in stage.arguments.items():
            _add(memory, address, name, value)
    Machine(memory, [_launch(stage, address) for stage in stages], schedule).run()
    for stage in stages:
        for name in OUTPUTS:
            if isinstance(stage.arguments.get(name), Tensor):
                written = stage.written
                written = written if isinstance(written, int) else written[name]
                _check(memory, name, stage.arguments[name], address, written)


def _add(
    memory: GlobalMemory,
    address: dict[int, int],
    name: str,
    value: Tensor | int,
    writer: int | None = None,
) -> None:
    if isinstance(value, Tensor) and id(value) not in address:
        data = value.view(torch.uint8).reshape(-1).numpy()
        address[id(value)] = memory.add(name, data, writer)


def _launch(stage: Stage, address: dict[int, int]) -> Launch:
    record, _, code = stage.kernel
    packed = bytearray(code.program.parameter_bytes)
    for param, declared in zip(record.params, code.program.parameters, strict=True):
        value = stage.arguments[param.name]
        number = address[id(value)] if isinstance(value, Tensor) else value
        data = number.to_bytes(param.size, "little", signed=True)
        packed[declared.offset : declared.offset + param.size] = data
    return Launch(
        code,
        stage.grid,
        record.smem_bytes,
        record.registers,
        bytes(packed),
        triggers_at_once=record.problem["op"] in (QuantizeProblem.op, QuantizeGroupsProblem.op),
    )


def _check(
    memory: GlobalMemory, name: str, tensor: Tensor | int, address: dict[int, int], written: int
) -> None:
    assert isinstance(tensor, Tensor)
    region = next(r for r in memory.regions if r.base == address[id(tensor)])
    writes = region.writes.reshape(len(tensor), -1)
    expected = (np.arange(len(tensor)) < written)[:, None]
    wrong = np.argwhere(writes != expected)
    if len(wrong):
        row, byte = (int(i) for i in wrong[0])
        verb = "never written" if expected[row] else "written, which does not count"
        raise Fault(f"{name}[{row}] {verb}, byte {byte}")
