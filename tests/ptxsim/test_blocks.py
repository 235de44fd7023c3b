"""Kernels whose scales vary along K in the PTX simulator."""

from __future__ import annotations

import pytest
import torch

import cutlass_moe as cm
from cutlass_moe.images.toolchains import default_build
from cutlass_moe.operands import TORCH_DTYPES
from emitters.spec.dtypes import DType
from emitters.spec.layer_steps import QuantizeGroupsProblem, StepConfig
from tests.ptxsim.kernels.routing import kernel
from tests.ptxsim.kernels.rows import Stage, run
from tests.ptxsim.kernels.runs import BLOCKS, check_run
from tests.ptxsim.schedule import Schedule
from tests.support.numerics import poisoned, same_bits

pytestmark = pytest.mark.skipif(default_build() is None, reason="needs nvidia-cutlass-dsl")


@pytest.mark.parametrize("name", BLOCKS)
def test_kernels_are_right(name: str) -> None:
    check_run(BLOCKS, name)


@pytest.mark.parametrize(
    ("source", "target", "k", "end", "column_major", "power_of_two"),
    [
        (DType.BF16, DType.E4M3, 272, None, False, False),
        (DType.FP16, DType.INT8, 512, 4, False, False),
        (DType.FP32, DType.E4M3, 72, None, True, True),
        (DType.BF16, DType.E5M2, 128, 0, False, True),
    ],
)
def test_groups_are_quantised(
    source: DType, target: DType, k: int, end: int | None, column_major: bool, power_of_two: bool
) -> None:
    rows, problem = 7, QuantizeGroupsProblem(source, target, k, padded=k % 16 != 0)
    columns = k + 8 * problem.padded
    generator = torch.Generator().manual_seed(k)
    factors = torch.tensor([1.0, 300.0, 0.0, 1e-3, 1.0, 1.0, 0.0])[:, None]
    x = (torch.randn(rows, k, generator=generator) * factors).to(TORCH_DTYPES[source])
    written = rows if end is None else end
    shape = (problem.groups, rows) if column_major else (rows, problem.groups)
    scale = poisoned(*shape, torch.float32, "cpu")
    q = torch.full((rows, columns), 0x55, dtype=torch.uint8)
    arguments = {
        "source": x,
        "end": 0 if end is None else torch.tensor([end], dtype=torch.int32),
        "q": q,
        "scale": scale,
        "num_rows": rows,
        "source_stride": k * x.element_size(),
        "scale_stride": 1 if column_major else problem.groups,
        "scale_k_stride": rows if column_major else 1,
        "power_of_two": int(power_of_two),
        "early": int(end is None),
    }
    built = kernel(problem, StepConfig(64))
    run([Stage(built, arguments, problem.ctas(rows, 64), written)], Schedule(k))
    want, want_scale = cm.quantize_per_token_group_reference(
        x, TORCH_DTYPES[target], power_of_two=power_of_two
    )
    scale = scale.T if column_major else scale
    assert same_bits(q[:written, :k], want[:written].view(torch.uint8))
    assert not q[:written, k:].any()
    assert torch.equal(scale[:written], want_scale[:written])
