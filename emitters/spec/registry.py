"""The table of all kernels: their problems, configs, architectures and templates.

Code that must tell one kind of problem or config from another asks here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from emitters.spec.arch import DEFAULT_ARCH, SM90
from emitters.spec.config_packed_sm90 import GemmPackedSm90Config
from emitters.spec.config_sm90 import GemmSm90Config
from emitters.spec.config_swap_sm90 import GemmSwapSm90Config
from emitters.spec.gemm import GemmProblem
from emitters.spec.layer_steps import (
    ActivateBackwardProblem,
    ActivateProblem,
    CombineProblem,
    GatherSumProblem,
    QuantizeGroupsProblem,
    QuantizeProblem,
    RouteLogitsProblem,
    RouteProblem,
    Step,
    StepConfig,
    TopkProblem,
)
from emitters.spec.plain import from_plain
from emitters.spec.weight_grad import WeightGradProblem, WeightGradSm90Config

Problem = GemmProblem | Step
GemmConfig = GemmSm90Config | GemmSwapSm90Config | GemmPackedSm90Config
Config = GemmConfig | WeightGradSm90Config | StepConfig


@dataclass(frozen=True)
class Template:
    """One kind of kernel: the class that writes it, and what that class takes."""

    name: str  # part of the kernels' symbols
    problem: type[Problem]
    config: type[Config]
    archs: tuple[str, ...]
    source: str  # "module:class" in emitters/templates


_SM90 = (SM90.name,)
TEMPLATES = (
    Template("gemm_sm90", GemmProblem, GemmSm90Config, _SM90, "gemm_sm90:GemmSm90"),
    Template(
        "gemm_swap_sm90", GemmProblem, GemmSwapSm90Config, _SM90, "gemm_swap_sm90:GemmSwapSm90"
    ),
    Template(
        "gemm_packed_sm90", GemmProblem, GemmPackedSm90Config, _SM90, "gemm_swap_sm90:GemmSwapSm90"
    ),
    Template("route", RouteProblem, StepConfig, _SM90, "route:Route"),
    Template("route_logits", RouteLogitsProblem, StepConfig, _SM90, "route:RouteLogits"),
    Template("topk_router", TopkProblem, StepConfig, _SM90, "router:TopkRouter"),
    Template("quantize", QuantizeProblem, StepConfig, _SM90, "quantize:Quantize"),
    Template(
        "quantize_groups",
        QuantizeGroupsProblem,
        StepConfig,
        _SM90,
        "quantize_groups:QuantizeGroups",
    ),
    Template("combine", CombineProblem, StepConfig, _SM90, "combine:Combine"),
    Template(
        "weight_grad_sm90",
        WeightGradProblem,
        WeightGradSm90Config,
        _SM90,
        "weight_grad_sm90:WeightGradSm90",
    ),
    Template("gather_sum", GatherSumProblem, StepConfig, _SM90, "gather_sum:GatherSum"),
    Template("activate", ActivateProblem, StepConfig, _SM90, "activate:Activate"),
    Template(
        "activate_backward",
        ActivateBackwardProblem,
        StepConfig,
        _SM90,
        "activate:ActivateBackward",
    ),
)
_PROBLEMS = {template.problem.op: template.problem for template in TEMPLATES}
_CONFIGS = {template.config.template: template.config for template in TEMPLATES}


def find_template(problem: Problem, config: Config) -> Template | None:
    """The template for these kinds of problem and config, or None."""
    for template in TEMPLATES:
        if template.problem is type(problem) and template.config is type(config):
            return template
    return None


def why_illegal(
    problem: Problem, config: Config | None = None, arch: str = DEFAULT_ARCH
) -> str | None:
    """Why a kernel can't be built, in words, or None if it can.

    Without a config: why no config could be legal. Heuristics, emitter, ops and tests all ask here;
    the reasons are in the problem's and the config's own `why_illegal`.
    """
    archs = {a for t in TEMPLATES if t.problem is type(problem) for a in t.archs}
    if arch not in archs:
        return f"arch must be {', '.join(sorted(archs))} for {problem.op}, got {arch}"
    reason = problem.why_illegal()
    if reason or config is None:
        return reason
    if find_template(problem, config) is None:
        names = [t.config.template for t in TEMPLATES if t.problem is type(problem)]
        return f"config must be of {' or '.join(names)} for {problem.op}, got {config.template}"
    why: str | None = config.why_illegal(problem)  # type: ignore[arg-type]  # they fit together
    return why


def as_gemm(problem: Problem) -> GemmProblem | None:
    """The problem, typed, if it is a grouped GEMM's; else None."""
    return problem if isinstance(problem, GemmProblem) else None


def problem_from_json(plain: dict[str, Any]) -> Problem:
    """The inverse of a problem's `to_json`; raises ValueError for an unknown op, field or value."""
    op = dict(plain).get("op")
    if op not in _PROBLEMS:
        raise ValueError(f"a problem's op must be one of {sorted(_PROBLEMS)}, got {op!r}")
    return _PROBLEMS[op].from_json(plain)


def config_from_json(plain: dict[str, Any]) -> Config:
    """The inverse of a config's `to_json`.

    Raises ValueError for an unknown template, field or value.
    """
    rest = dict(plain)
    template = rest.pop("template", None)
    if template not in _CONFIGS:
        raise ValueError(f"a config's template must be one of {sorted(_CONFIGS)}, got {template!r}")
    return from_plain(_CONFIGS[template], rest, f"{template} config")


def gemm_config_from_json(plain: dict[str, Any]) -> GemmConfig:
    """`config_from_json` for a grouped GEMM's config; raises ValueError for other configs too."""
    config = config_from_json(plain)
    if not isinstance(config, GemmConfig):
        names = " or ".join(t.config.template for t in TEMPLATES if t.problem is GemmProblem)
        raise ValueError(f"a grouped GEMM's config must be of {names}, got {config.template}")
    return config
