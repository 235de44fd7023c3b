"""The benchmark of weight gradients: its cases, and the problems that they pose."""

from __future__ import annotations

from click.testing import CliRunner

from emitters.spec.dtypes import DType
from emitters.spec.registry import why_illegal
from emitters.spec.weight_grad import Side
from perf import weight_grads
from perf.weight_grads import ADD, EVERY_CONFIG, KINDS, OURS, SHAPES, problem_of, select


def test_every_case_once_and_both_products() -> None:
    cases = list(select("", ""))
    assert len({case.id for case in cases}) == len(cases) == 2 * (2 * 4 + 6)
    assert {case.model for case in cases} == set(SHAPES)
    some = list(select("mixtral,sonic-n256", "128,64"))
    assert [(case.model, case.tokens) for case in some[::2]] == [
        ("mixtral", 128), ("mixtral", 64), ("sonic-n256", 128), ("sonic-n256", 64),
    ]  # fmt: skip


def test_problems() -> None:
    up, down = select("qwen3-30b", "4096")
    problem = problem_of(up, OURS)
    assert (problem.m, problem.n, problem.gathered) == (1536, 2048, Side.RIGHT)
    assert (problem.out, problem.accumulate) == (DType.BF16, False)
    problem = problem_of(down, ADD)
    assert (problem.m, problem.n, problem.gathered) == (2048, 768, Side.LEFT)
    assert (problem.out, problem.accumulate) == (DType.FP32, True)
    for kind in KINDS:
        legal = [c for c in EVERY_CONFIG if why_illegal(problem_of(up, kind), c) is None]
        assert legal == list(EVERY_CONFIG)


def test_an_unknown_model_is_told() -> None:
    result = CliRunner().invoke(weight_grads.main, ["build", "--model", "x"])
    assert result.exit_code == 2 and "must be one of qwen3-30b, mixtral" in result.output
