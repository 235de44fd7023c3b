"""Which config serves a problem: a pure function, no measuring and no host sync."""

from __future__ import annotations

from functools import lru_cache

from emitters.config import Config, GemmSm90Config, why_illegal
from emitters.problem import GemmProblem

# Measured on an H200 (perf/NOTES.md).
_SMS = 132
_FEW_ROWS = 32  # an expert: 64-row tiles, two CTAs an SM: the weights' bytes are the cost
_SOME_ROWS = 128  # an expert: one 128-row tile holds it, and more CTAs than wide tiles would give


def _first_legal(problem: GemmProblem, *configs: GemmSm90Config) -> Config | None:
    return next((c for c in configs if why_illegal(problem, c) is None), None)


@lru_cache(maxsize=1024)
def _families(problem: GemmProblem) -> tuple[Config, ...]:
    """For less than a tile an SM, few, some and many rows an expert; () where nothing is legal."""
    found = (
        _first_legal(problem, *(GemmSm90Config(64, n) for n in (128, 64))),
        _first_legal(problem, *(GemmSm90Config(64, n, ctas_per_sm=2) for n in (128, 64))),
        _first_legal(problem, *(GemmSm90Config(128, n) for n in (128, 64))),
        _first_legal(problem, *(GemmSm90Config(128, n) for n in (256, 128, 64))),
    )
    legal = [config for config in found if config is not None]
    return tuple(config or legal[-1] for config in found) if legal else ()


def candidates(problem: GemmProblem) -> tuple[Config, ...]:
    """Every config that `choose` may return for this problem: what a build compiles."""
    return tuple(dict.fromkeys(_families(problem)))


def choose(problem: GemmProblem, num_tokens: int, rows_per_expert: float) -> Config:
    """The config for a call. num_tokens: rows of x. rows_per_expert: mean, or the caller's hint.

    Raises ValueError, with the reason, where the problem has no legal config.
    """
    families = _families(problem)
    if not families:
        raise ValueError(why_illegal(problem) or f"no config of the SM90 template fits {problem}")
    lone, few, some, many = families
    if rows_per_expert > _FEW_ROWS:
        return some if rows_per_expert <= _SOME_ROWS else many
    experts = min(problem.num_experts, rows_per_expert * problem.num_experts)
    return lone if experts * lone.n_tiles(problem) <= _SMS else few
