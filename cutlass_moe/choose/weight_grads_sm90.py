"""The choice of a config for a grouped weight gradient, by estimates made on an H200."""

from __future__ import annotations

from emitters.spec.dtypes import DType
from emitters.spec.registry import why_illegal
from emitters.spec.weight_grad import Side, WeightGradProblem, WeightGradSm90Config

_WIDE, _TALL = WeightGradSm90Config(128, 256), WeightGradSm90Config(256, 128)
_IN_TURN = WeightGradSm90Config(128, 192, pingpong=True)
_SMALL_IN_TURN = WeightGradSm90Config(128, 128, pingpong=True, group_m=8)
# Up to this many rows per expert, adding to float32 takes longer than the sums.
_FEW_ROWS = 512


def weight_grad_config(problem: WeightGradProblem, rows_per_expert: float) -> WeightGradSm90Config:
    """The config for a call. rows_per_expert: the mean.

    Consumers that take tiles in turn hide one another's stores. Those that share a tile read less
    shared memory; the gathered operand, which costs more to load, then gets the narrow side.
    """
    narrow = problem.n % 192 and problem.n < 768  # columns of 192 would leave much empty
    if problem.accumulate and problem.out is DType.FP32:
        return _SMALL_IN_TURN if narrow or rows_per_expert <= _FEW_ROWS else _IN_TURN
    if problem.gathered is Side.RIGHT:
        return _TALL
    return _IN_TURN if problem.n % 256 and problem.n % 192 == 0 else _WIDE


def weight_grad_configs(problem: WeightGradProblem) -> tuple[WeightGradSm90Config, ...]:
    """Every config that `weight_grad_config` may return for this problem."""
    if why_illegal(problem) is not None:
        return ()
    rows = (0.0, float("inf"))
    return tuple(dict.fromkeys(weight_grad_config(problem, count) for count in rows))
