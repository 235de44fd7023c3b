"""Products that quantise their output, as up projections of layers do, on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import cutlass_moe as cm
from cutlass_moe.operands import Operands, Options
from cutlass_moe.ops.dispatch import choose_launch, enqueue, strides_of
from cutlass_moe.runtime.parameters import column_stride
from emitters.spec.dtypes import DType
from emitters.spec.epilogue import Activation, ActivationFunction, Bias
from emitters.spec.gemm import GemmProblem, Granularity
from emitters.spec.registry import GemmConfig
from tests.support.cases import BLOCK_SCALES, RAGGED, TWO_LEVEL, Case, even, make_inputs, skewed
from tests.support.numerics import check_quantized, poisoned, same_bits

pytestmark = pytest.mark.gpu
_SWIGLU = Activation(ActivationFunction.SWIGLU)
_PLAIN = replace(TWO_LEVEL, out=DType.E4M3, epilogue=BLOCK_SCALES, n=768, k=1024)
_GATED = replace(_PLAIN, epilogue=(*BLOCK_SCALES, _SWIGLU))
CASES = {
    "plain": _PLAIN,
    "gated": _GATED,
    "ragged": replace(_GATED, counts=RAGGED, k=512),
    "outside": replace(_GATED, reads="outside", counts=skewed(8, 3000), tokens=700),
    "cut_group": replace(_GATED, n=2 * 720, k=384),  # 22.5 blocks, as gpt-oss has
    "narrow": replace(_GATED, n=64, k=272),
    "bias": replace(_GATED, epilogue=(*BLOCK_SCALES, Bias(DType.BF16), _SWIGLU)),
    "blocks_64": replace(
        _GATED, n=2 * 192, epilogue=(Granularity.TOKEN_BLOCK, Granularity.BLOCK_64, _SWIGLU)
    ),
    "ungathered": replace(_GATED, gather=False, counts=even(8, 1024)),
    "relu2": replace(
        _PLAIN, epilogue=(*BLOCK_SCALES, Activation(ActivationFunction.RELU2)), n=1984
    ),
    "qwen3-30b": replace(_GATED, n=1536, k=2048, counts=skewed(128, 8192), tokens=1024),
}


def images() -> set[tuple[GemmProblem, GemmConfig]]:
    outs = (DType.E4M3, DType.FP32)
    asked = [replace(case, out=out) for case in CASES.values() for out in outs]
    return {(case.problem, case.config) for case in asked}


def launch(case: Case, inputs: dict[str, Any], in_columns: bool) -> tuple[Any, Any]:
    """The output over poison, and its scales, which lie column by column or row by row."""
    names = set(Operands._fields)
    operands = Operands(**{name: tensor for name, tensor in inputs.items() if name in names})
    problem, device = case.problem, operands.x.get_device()
    groups = problem.out_groups
    if in_columns:
        scale = poisoned(groups, column_stride(case.rows), torch.float32, "cuda").T[: case.rows]
    else:
        scale = poisoned(case.rows, groups, torch.float32, "cuda")
    activation = {name: inputs.get(name) for name in ("activation", "limit", "alpha", "beta")}
    choice = choose_launch(
        problem,
        device,
        len(operands.x),
        case.rows,
        operands.weight.stride(),
        Options(**activation),
        strides_of(operands, problem)._replace(out_scale=scale.stride()),
    )
    q = poisoned(case.rows, problem.out_columns, torch.float8_e4m3fn, "cuda")
    enqueue(choice, q, operands, {"out_scale": scale.data_ptr()})
    return q, scale


@pytest.mark.parametrize("exact", [False, True], ids=["random", "exact"])
@pytest.mark.parametrize("name", CASES)
def test_outputs(name: str, exact: bool) -> None:
    case = CASES[name]
    inputs = make_inputs(case, "cuda", exact=exact)
    q, scale = launch(case, inputs, in_columns=False)
    check_quantized(q, scale, case, inputs, exact=exact)
    others = launch(case, inputs, in_columns=True)
    assert same_bits(q, others[0]) and torch.equal(scale[case.owned], others[1][case.owned])


@pytest.mark.parametrize("name", CASES)
def test_as_quantised_afterwards(name: str) -> None:
    """But for values between two of 8 bits: the kernel multiplies where the step divides."""
    case = CASES[name]
    inputs = make_inputs(case, "cuda", seed=1)
    q, scale = launch(case, inputs, in_columns=False)
    wide = cm.grouped_matmul(**{**inputs, "out_dtype": torch.float32})
    want, want_scale = cm.quantize_per_token_group(wide[case.owned])
    assert torch.equal(scale[case.owned], want_scale)
    other = q[case.owned].view(torch.uint8) != want.view(torch.uint8)
    assert other.float().mean() < 1e-4
