"""An epilogue node of one's own: the three places that emitters/device/epilogue/nodes.py names."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

os.environ["CUTE_DSL_ARCH"] = "sm_90a"  # read when cutlass is imported
cutlass = pytest.importorskip("cutlass", reason="needs nvidia-cutlass-dsl")

import cutlass.cute as cute  # noqa: E402
from cutlass import Float32, Int32  # noqa: E402

from emitters.device.epilogue import nodes  # noqa: E402
from emitters.device.epilogue.fragment import Fragment  # noqa: E402
from emitters.spec import epilogue as spec  # noqa: E402
from emitters.spec.arch import DEFAULT_ARCH  # noqa: E402
from emitters.spec.dtypes import DType  # noqa: E402
from emitters.spec.epilogue import Bias  # noqa: E402
from emitters.spec.gemm import GemmProblem  # noqa: E402
from emitters.spec.image import image_key  # noqa: E402
from emitters.spec.registry import GemmConfig, problem_from_json  # noqa: E402
from tests.ptxsim.kernels import launch  # noqa: E402
from tests.ptxsim.kernels.runs import BASE, SMALL, SWAP  # noqa: E402
from tests.ptxsim.schedule import Schedule  # noqa: E402
from tests.support.cases import make_inputs, scales_and_nodes  # noqa: E402
from tests.support.numerics import errors, limits  # noqa: E402


@dataclass(frozen=True)
class Factor:
    """Multiplies everything by `times` * factor[0]: float32 [1]."""

    times: float
    kind: ClassVar[str] = "factor"
    operand: ClassVar[str] = "factor"
    element: ClassVar[DType] = DType.FP32


class MultiplyByFactor:
    def __init__(self, node: Factor, fragment: Fragment, factor: cute.Pointer):
        self.node = node
        self.factor = cute.make_tensor(factor, cute.make_layout(1))
        self.value = cute.make_rmem_tensor((1,), Float32)

    def load(self, tokens: cute.Tensor, expert: Int32, first_column: Int32):
        self.value[0] = self.factor[0] * self.node.times

    def apply(self, m: int, part: int, values: cute.Tensor, expert: Int32, first_column: Int32):
        for i in range(cute.size(values)):
            values[i] = values[i] * self.value[0]
        return values


@pytest.fixture
def problem(monkeypatch: pytest.MonkeyPatch) -> GemmProblem:
    monkeypatch.setitem(spec.NODES, Factor.kind, Factor)
    monkeypatch.setitem(nodes.NODES, Factor, MultiplyByFactor)
    with_bias = scales_and_nodes((*BASE.epilogue, Bias(DType.BF16)))
    epilogue = (*with_bias.pop("epilogue"), Factor(3.0))
    return replace(BASE.problem, epilogue=epilogue, **with_bias)


def test_json_and_key(problem: GemmProblem) -> None:
    assert problem.why_illegal() is None
    plain = json.loads(json.dumps(problem.to_json()))
    assert plain["epilogue"][-1] == {"kind": "factor", "times": 3.0}
    assert problem_from_json(plain) == problem
    without = replace(problem, epilogue=problem.epilogue[:-1])
    other = replace(problem, epilogue=(*without.epilogue, Factor(2.0)))
    keys = {image_key(p, SMALL, DEFAULT_ARCH) for p in (problem, without, other)}
    assert len(keys) == 3


@pytest.mark.parametrize("config", [SMALL, SWAP], ids=["rows", "columns"])
def test_numbers(problem: GemmProblem, config: GemmConfig) -> None:
    case = replace(BASE, epilogue=(*BASE.epilogue, Bias(DType.BF16)))
    inputs = make_inputs(case, "cpu")
    plain = launch.kernel(replace(problem, epilogue=problem.epilogue[:-1]), config)
    kernel = launch.kernel(problem, config)
    names = [param.name for param in plain.record.params]
    assert [param.name for param in kernel.record.params] == [*names, "factor"]
    found = launch.simulate(
        kernel, {**inputs, "factor": torch.tensor([0.5])}, Schedule(0), rows=case.rows
    )
    expected = launch.simulate(plain, inputs, Schedule(0), rows=case.rows)
    difference = errors(found[case.owned], expected[case.owned].double() * 1.5)
    allowed = limits(problem, exact=False)
    assert difference.whole <= allowed.whole, (difference, allowed)
