"""The kernels of grouped weight gradients on tiny tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutlass_moe.operands import TORCH_DTYPES
from cutlass_moe.runtime.parameters import weight_grad_values, weight_grad_views
from emitters.spec.image import LaunchRecord
from emitters.spec.weight_grad import WeightGradProblem, WeightGradSm90Config
from tests.ptxsim.kernels.compiled import ptx_of
from tests.ptxsim.kernels.launch import pack
from tests.ptxsim.kernels.mutations import Edit
from tests.ptxsim.machine import Launch, Machine
from tests.ptxsim.memory import GlobalMemory
from tests.ptxsim.ptx import Fault, parse
from tests.ptxsim.schedule import Schedule
from tests.ptxsim.warp import Code
from tests.support.numerics import poisoned

WeightGradKernel = tuple[LaunchRecord, str, Code]


@lru_cache(maxsize=32)
def kernel(problem: WeightGradProblem, config: WeightGradSm90Config) -> WeightGradKernel:
    record, ptx = ptx_of(problem, config)
    return record, ptx, Code(parse(ptx))


def edited(kernel: WeightGradKernel, edit: Edit) -> WeightGradKernel:
    """The same kernel with other PTX."""
    record, ptx, _ = kernel
    return record, edit(ptx), Code(parse(edit(ptx)))


def simulate(
    kernel: WeightGradKernel,
    inputs: dict[str, Any],
    schedule: Schedule,
    before: Tensor | None = None,
    grid: int = 2,
) -> Tensor:
    """out [E, M, N], from `poisoned`, or from a copy of `before` to add to.

    inputs: as `grouped_weight_grad` takes them. Raises Fault for a defect of the kernel; what `out`
    holds is the caller's to check.
    """
    record, _, code = kernel
    problem = WeightGradProblem.from_json(record.problem)
    shape = (problem.num_experts * problem.m, problem.n)
    out = poisoned(*shape, TORCH_DTYPES[problem.out], "cpu")
    if before is not None:
        out.copy_(before.view(shape))
    memory = GlobalMemory()
    addresses = {
        "index" if name.endswith("_index") else name: memory.add(name, _bytes(tensor))
        for name, tensor in inputs.items()
    }
    addresses["out"] = memory.add("out", _bytes(out), writer=0, updated=before is not None)
    left, right = inputs["left"], inputs["right"]
    gathered = right if problem.gathered is None else inputs[problem.gathered]
    index = [tensor for name, tensor in inputs.items() if name.endswith("_index")]
    rows = len(index[0]) if index else len(left)
    values = weight_grad_values(problem, addresses, len(gathered), rows, gathered.shape[1])
    views = weight_grad_views(problem, left.shape[1], right.shape[1])
    launch = Launch(
        code, grid, record.smem_bytes, record.registers, pack(record, code, values, views),
        cluster=record.cluster[0],
    )  # fmt: skip
    Machine(memory, [launch], schedule).run()
    ends = inputs["offsets"].clamp(0, rows)
    starts = inputs.get("starts", torch.cat([ends.new_zeros(1), ends[:-1]]))
    written = (ends > starts) | (before is None)
    writes = memory.regions[-1].writes.reshape(problem.num_experts, -1)
    wrong = np.argwhere(writes != written.numpy()[:, None])
    if len(wrong):
        expert, byte = (int(i) for i in wrong[0])
        verb = "never written" if written[expert] else "written, though it has no rows"
        raise Fault(f"out[{expert}] {verb}, byte {byte} ({len(wrong)} bytes are wrong)")
    return out.view(problem.num_experts, problem.m, problem.n)


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.uint8).reshape(-1).numpy()
