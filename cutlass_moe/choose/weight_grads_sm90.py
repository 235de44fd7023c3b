"""The choice of a config for a grouped weight gradient, by estimates made on an H200."""

from __future__ import annotations

from emitters.spec.dtypes import DType
from emitters.spec.registry import why_illegal
from emitters.spec.weight_grad import WeightGradProblem, WeightGradSm90Config

_SHARED = WeightGradSm90Config(128, 256)
_IN_TURN = WeightGradSm90Config(128, 192, pingpong=True)
_SMALL_IN_TURN = WeightGradSm90Config(128, 128, pingpong=True)


def weight_grad_config(problem: WeightGradProblem, rows_per_expert: float) -> WeightGradSm90Config:
    """The config for a call. rows_per_expert: the mean."""
    if problem.accumulate and problem.out is DType.FP32:
        return _SMALL_IN_TURN
    return _IN_TURN if problem.n % 256 and problem.n % 192 == 0 else _SHARED


def weight_grad_configs(problem: WeightGradProblem) -> tuple[WeightGradSm90Config, ...]:
    """Every config that `weight_grad_config` may return for this problem."""
    if why_illegal(problem) is not None:
        return ()
    return tuple(dict.fromkeys(weight_grad_config(problem, rows) for rows in (0.0, 1e9)))
