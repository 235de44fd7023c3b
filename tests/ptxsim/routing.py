"""The routing kernels on tiny inputs: PTX, arguments by name, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from emitters.emit import emit_ptx
from emitters.image import LaunchRecord
from emitters.steps import Step, StepConfig
from tests.ptxsim.machine import Launch, Machine
from tests.ptxsim.memory import WORKSPACE, GlobalMemory
from tests.ptxsim.ptx import Fault, parse
from tests.ptxsim.schedule import Schedule
from tests.ptxsim.warp import Code

POISON = -77  # what outputs hold before
Kernel = tuple[LaunchRecord, str, Code]


@lru_cache(maxsize=8)
def kernel(problem: Step, config: StepConfig) -> Kernel:
    record, ptx = emit_ptx(problem, config)
    return record, ptx, Code(parse(ptx))


def edited(kernel: Kernel, old: str, new: str) -> Kernel:
    """The same kernel with other PTX; `old` must be there."""
    record, ptx, _ = kernel
    if old not in ptx:
        raise ValueError(f"no {old!r} in the PTX")
    return record, ptx.replace(old, new), Code(parse(ptx.replace(old, new)))


def run(
    kernel: Kernel,
    arguments: Mapping[str, np.ndarray | int],
    outputs: Mapping[str, np.ndarray],
    kept: tuple[str, ...],
    schedule: Schedule,
    grid: int = 1,
) -> None:
    """Fills `outputs`; every word of them must be written once.

    kept: outputs that the kernel also reads again. Raises Fault.
    """
    record, _, code = kernel
    memory = GlobalMemory()
    values: dict[str, int] = {}
    for name, value in {**arguments, **outputs}.items():
        if isinstance(value, int):
            values[name] = value
        else:
            writer = None if name not in outputs else WORKSPACE if name in kept else 0
            values[name] = memory.add(name, value.reshape(-1).view(np.uint8), writer)
    packed = bytearray(code.program.parameter_bytes)
    for param, declared in zip(record.params, code.program.parameters, strict=True):
        data = values[param.name].to_bytes(param.size, "little", signed=True)
        packed[declared.offset : declared.offset + param.size] = data
    launch = Launch(
        code, grid, record.smem_bytes, record.registers, bytes(packed), record.cluster[0]
    )
    Machine(memory, [launch], schedule).run()
    for region in memory.regions:
        if region.writer == 0 and not (region.writes == 1).all():
            raise Fault(f"{region.name} + {int(region.writes.argmin())} bytes never written")
