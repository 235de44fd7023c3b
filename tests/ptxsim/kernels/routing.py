"""The routing kernels on tiny inputs: PTX, arguments by name, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from emitters.spec.image import LaunchRecord
from emitters.spec.layer_steps import Step, StepConfig
from tests.ptxsim.kernels.compiled import ptx_of
from tests.ptxsim.machine import Launch, Machine
from tests.ptxsim.memory import WORKSPACE, GlobalMemory
from tests.ptxsim.ptx import Fault, parse
from tests.ptxsim.schedule import Schedule
from tests.ptxsim.warp import Code

POISON = -77  # what outputs hold before
StepKernel = tuple[LaunchRecord, str, Code]
Arguments = Mapping[str, np.ndarray | int]


@lru_cache(maxsize=4)
def kernel(problem: Step, config: StepConfig) -> StepKernel:
    record, ptx = ptx_of(problem, config)
    return record, ptx, Code(parse(ptx))


def edited(kernel: StepKernel, old: str, new: str) -> StepKernel:
    """The same kernel with other PTX; `old` must be there."""
    record, ptx, _ = kernel
    if old not in ptx:
        raise ValueError(f"no {old!r} in the PTX")
    return record, ptx.replace(old, new), Code(parse(ptx.replace(old, new)))


def run(
    launches: Sequence[tuple[StepKernel, int, Arguments]],
    writers: Mapping[str, int],
    schedule: Schedule,
) -> None:
    """One launch, or a second that depends on the first: kernel, grid, arguments by name.

    writers: of each output the launch that writes each of its words once, or WORKSPACE. Raises
    Fault.
    """
    memory = GlobalMemory()
    address: dict[str, int] = {}
    for name, value in {k: v for _, _, values in launches for k, v in values.items()}.items():
        if not isinstance(value, int):
            data = value.reshape(-1).view(np.uint8)
            address[name] = memory.add(name, data, writers.get(name))
    grids = [_launch(*launch, address) for launch in launches]
    Machine(memory, grids, schedule).run()
    for region in memory.regions:
        written = region.writer in (None, WORKSPACE) or region.writes.all()
        if not written:
            raise Fault(f"{region.name} + {int(region.writes.argmin())} bytes never written")


def _launch(kernel: StepKernel, grid: int, arguments: Arguments, address: dict[str, int]) -> Launch:
    record, _, code = kernel
    values = {**arguments, **address}
    packed = bytearray(code.program.parameter_bytes)
    for param, declared in zip(record.params, code.program.parameters, strict=True):
        value = values[param.name]
        assert isinstance(value, int)
        data = value.to_bytes(param.size, "little", signed=True)
        packed[declared.offset : declared.offset + param.size] = data
    return Launch(code, grid, record.smem_bytes, record.registers, bytes(packed))
