"""The choice of a config for a grouped weight gradient, by estimates made on an H200."""

from __future__ import annotations

from dataclasses import replace

from emitters.spec.dtypes import DType
from emitters.spec.registry import why_illegal
from emitters.spec.weight_grad import Side, WeightGradProblem, WeightGradSm90Config

_WIDE, _TALL = WeightGradSm90Config(128, 256), WeightGradSm90Config(256, 128)
_WIDE_PAIR, _TALL_PAIR = (replace(one, cluster=2, group_m=8) for one in (_WIDE, _TALL))
_IN_TURN = WeightGradSm90Config(128, 192, pingpong=True)
_SMALL_IN_TURN = WeightGradSm90Config(128, 128, pingpong=True)
_FEW_LEFT, _FEW_RIGHT = WeightGradSm90Config(64, 256, pingpong=True), WeightGradSm90Config(256, 64)
# Rows per expert up to which adding to float32 takes longer than the sums, and above which pairs
# of CTAs that share columns are the fastest, by up to 7%.
_FEW_ROWS, _SOME_ROWS = 512, 768


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
    many = rows_per_expert > _SOME_ROWS
    if problem.gathered is Side.RIGHT:
        return _TALL_PAIR if many else _TALL
    if many:
        return _WIDE_PAIR
    return _IN_TURN if problem.n % 192 == 0 else _WIDE


def weight_grad_configs(problem: WeightGradProblem) -> tuple[WeightGradSm90Config, ...]:
    """Every config that `weight_grad_config` may return for this problem."""
    if why_illegal(problem) is not None:
        return ()
    rows = (0, _SOME_ROWS, _SOME_ROWS + 1)
    return tuple(dict.fromkeys(weight_grad_config(problem, count) for count in rows))
