"""The choice of a config for a grouped weight gradient, by estimates made on an H200."""

from __future__ import annotations

from emitters.spec.dtypes import DType
from emitters.spec.registry import why_illegal
from emitters.spec.weight_grad import Side, WeightGradProblem, WeightGradSm90Config

_WIDE, _TALL = WeightGradSm90Config(128, 256), WeightGradSm90Config(256, 128)
_IN_TURN = WeightGradSm90Config(128, 192, pingpong=True)
_SMALL_IN_TURN = WeightGradSm90Config(128, 128, pingpong=True)
_FEW_LEFT, _FEW_RIGHT = WeightGradSm90Config(64, 256, pingpong=True), WeightGradSm90Config(256, 64)
# Rows per expert up to which adding to float32 takes longer than the sums, and up to which hidden
# stores are worth more than shared columns.
_FEW_ROWS, _SOME_ROWS = 512, 2048


def weight_grad_config(problem: WeightGradProblem, rows_per_expert: float) -> WeightGradSm90Config:
    """The config for a call. rows_per_expert: the mean.

    Consumers that take tiles in turn hide one another's stores. Those that share a tile read less
    shared memory; the gathered operand, which costs more to load, then gets the narrow side.
    """
    if problem.m <= 64:
        return _FEW_LEFT
    if problem.n <= 64:
        return _FEW_RIGHT
    if problem.accumulate and problem.out is DType.FP32:
        fits = problem.n >= 768 or problem.n % 192 == 0  # else much of the last tile is empty
        return _IN_TURN if fits and rows_per_expert > _FEW_ROWS else _SMALL_IN_TURN
    if problem.gathered is Side.RIGHT:
        return _TALL
    in_turn = problem.n % 192 == 0 and rows_per_expert <= _SOME_ROWS
    return _IN_TURN if in_turn else _WIDE


def weight_grad_configs(problem: WeightGradProblem) -> tuple[WeightGradSm90Config, ...]:
    """Every config that `weight_grad_config` may return for this problem."""
    if why_illegal(problem) is not None:
        return ()
    rows = (0, _SOME_ROWS, _SOME_ROWS + 1)
    return tuple(dict.fromkeys(weight_grad_config(problem, count) for count in rows))
