"""Which configs of which problems can be built: the one place that says no, and why."""

from __future__ import annotations

from typing import Any

from emitters.spec.arch import ARCHS
from emitters.spec.config_sm90 import (
    MAX_EXPERTS,
    SLICE_BYTES,
    GemmSm90Config,
    GemmSwapSm90Config,
    Schedule,
)
from emitters.spec.dtypes import ACCUMULATIONS, OUTPUTS, DType
from emitters.spec.gemm import (
    GATE_BLOCK,
    N_MAJOR_BLOCK,
    Activation,
    GemmProblem,
    Major,
    WeightStorage,
)
from emitters.spec.layer_steps import (
    CombineProblem,
    QuantizeProblem,
    RouteLogitsProblem,
    RouteProblem,
    Step,
    StepConfig,
    TopkProblem,
)


def why_illegal(
    problem: Problem, config: AnyConfig | None = None, arch: str = "sm_90a"
) -> str | None:
    """None where a kernel can be built, else the reason in words.

    Without a config: whether any config could be legal. Heuristics, emitter, ops and tests all ask
    here.
    """
    if arch not in ARCHS:
        return f"no template for {arch}: supported are {', '.join(ARCHS)}"
    if isinstance(problem, Step) or isinstance(config, StepConfig):
        return _step_reason(problem, config)
    if config is None or _problem_reason(problem):
        return _problem_reason(problem)
    if isinstance(config, GemmSwapSm90Config):
        return _swap_reason(problem, config) or _memory_reason(problem, config)
    return _config_reason(problem, config)


def _step_reason(problem: Problem, config: AnyConfig | None) -> str | None:
    if not isinstance(problem, Step) or not isinstance(config, StepConfig | None):
        return f"{problem.op} has no template {config and config.template}"
    if config and (config.threads % 32 or not 32 <= config.threads <= 1024):
        return f"{config.threads} threads: a multiple of 32 up to 1024"
    experts = problem.num_experts if isinstance(problem, RouteProblem | RouteLogitsProblem) else 1
    if config and config.threads < experts:
        return f"{config.threads} threads: one for each of {experts} experts"
    return problem.why_illegal()


def _problem_reason(p: GemmProblem) -> str | None:
    if p.operand not in ACCUMULATIONS:
        return f"operands of {p.operand}: supported are {', '.join(ACCUMULATIONS)}"
    if p.accumulation not in ACCUMULATIONS[p.operand]:
        allowed = " or ".join(ACCUMULATIONS[p.operand])
        return f"accumulation {p.accumulation} of {p.operand} operands: it must be {allowed}"
    if p.out not in OUTPUTS:
        return f"output of {p.out}: supported are {', '.join(OUTPUTS)}"
    if min(p.n, p.k, p.num_experts) < 1:
        return f"N {p.n}, K {p.k} and {p.num_experts} experts must be positive"
    if p.num_experts > MAX_EXPERTS:
        return f"{p.num_experts} experts: at most {MAX_EXPERTS}"
    if p.k * p.operand.bytes % 16:
        return f"K {p.k} of {p.operand}: rows of x and weight must be multiples of 16 bytes"
    if p.gated and p.n % (2 * GATE_BLOCK):
        return f"N {p.n} of a gated activation: it must be a multiple of {2 * GATE_BLOCK}"
    if p.n * p.out.bytes % 16:
        return f"N {p.n} of {p.out}: rows of the output must be multiples of 16 bytes"
    if p.weight_major is Major.N:
        if p.operand.bytes != 2:
            return f"N-major weights of {p.operand}: WGMMA reads them K-major only"
        if p.weights is WeightStorage.TABLE:
            return "N-major weights in a table: only stacked ones are read in place"
        if p.n * p.operand.bytes % 16:
            return f"N {p.n} of N-major {p.operand} weights: rows must be multiples of 16 bytes"
    kinds = [node.kind for node in p.epilogue]
    if len(set(kinds)) < len(kinds):
        return f"epilogue {', '.join(kinds)}: each node at most once"
    if Activation.kind in kinds[:-1]:
        return f"epilogue {', '.join(kinds)}: the activation must be last"
    return None


def _config_reason(p: GemmProblem, c: GemmSm90Config) -> str | None:
    if c.tile_m not in (64, 128, 192):
        return f"tile_m {c.tile_m}: 64 rows a consumer warpgroup, one to three of them"
    step = SLICE_BYTES // DType.BF16.bytes
    if p.gated and (p.out is not DType.FP32 or p.weight_major is Major.N):
        step *= 2  # columns of weights for a slice of outputs, or boxes of gate and up
    if c.tile_n % step or not step <= c.tile_n <= 256:
        return f"tile_n {c.tile_n}: a multiple of {step} up to 256 (WGMMA's N, whole store slices)"
    if c.pingpong and c.tile_m > 128:
        return f"ping-pong tiles of {c.tile_m} rows: at most 128"
    if c.cluster_m not in (1, 2):
        return f"cluster_m {c.cluster_m}: 1 or 2"
    if c.cluster_m > 1 and c.schedule is Schedule.DYNAMIC:
        return "a dynamic schedule of clusters: the counter serves single CTAs"
    if p.weight_major is Major.N and c.tile_n % (N_MAJOR_BLOCK * c.cluster_m):
        return f"tile_n {c.tile_n} in {c.cluster_m} shares of N-major weights, boxes of 64 columns"
    if c.group_m < 1 or c.group_m % c.cluster_m:
        return f"group_m {c.group_m}: a positive multiple of cluster_m"
    reason = _memory_reason(p, c)
    if reason:
        return reason
    needed = c.tile_n // 2 + 26  # of one WGMMA, before registers change hands
    if needed > c.launch_registers:
        return (
            f"about {needed} registers a thread for one WGMMA where {c.launch_registers} are there "
            "at launch"
        )
    kinds = {node.kind for node in p.epilogue}
    others = 80  # addresses, scales, one store slice
    if {"channel_scale", "bias"} <= kinds:
        others = 112 if p.n % c.tile_n else 100 if p.gated else 80  # with a tail: predicates
    return _register_reason(p, c, others, c.consumer_registers, "a consumer thread")


def _swap_reason(p: GemmProblem, c: GemmSwapSm90Config) -> str | None:
    if c.tile_m != 8 and (c.tile_m % 16 or not 16 <= c.tile_m <= 96):
        return f"tile_m {c.tile_m}: 8, or a multiple of 16 up to 96 (WGMMA's N)"
    if c.tile_n not in (64, 128):
        return f"tile_n {c.tile_n}: 64 or 128 (blocks of 64 columns, WGMMA's M)"
    if p.gated and p.weight_major is Major.N and c.tile_n == N_MAJOR_BLOCK:
        return f"tile_n {c.tile_n} of N-major weights: 128 for a box of gate and one of up"
    if c.k_boxes not in (1, 2, 4):
        return f"k_boxes {c.k_boxes}: 1, 2 or 4"
    if c.split_k not in (1, 2, 4, 8):
        return f"split_k {c.split_k}: 1, 2, 4 or 8 CTAs of a cluster"
    if c.split_k > c.k_steps(p):
        return f"split_k {c.split_k}: K {p.k} has {c.k_steps(p)} steps to share"
    return _register_reason(p, c, 64, c.registers, "a thread")  # 64: as above, fewer scales


def _register_reason(p: GemmProblem, c: Config, others: int, there: int, whose: str) -> str | None:
    """others: registers that are needed besides accumulators."""
    accumulators = c.accumulator_registers(p)
    if accumulators + others <= there:
        return None
    return (
        f"about {accumulators + others} registers {whose} ({accumulators} of them accumulators) "
        f"where {there} are to be had"
    )


def _memory_reason(p: GemmProblem, c: Config) -> str | None:
    if c.ctas_per_sm not in (1, 2):
        return f"ctas_per_sm {c.ctas_per_sm}: 1 or 2"
    stages = c.pipeline_stages(p)
    if not 2 <= stages <= c.MAX_STAGES:
        return f"{stages} stages of {c.stage_bytes} bytes: between 2 and {c.MAX_STAGES} are needed"
    smem = c.smem_bytes(p)
    if smem > c.smem_limit:
        return f"{smem} bytes of shared memory: {c.ctas_per_sm} CTAs an SM have {c.smem_limit} each"
    return None


Problem = GemmProblem | Step
Config = GemmSm90Config | GemmSwapSm90Config

AnyConfig = Config | StepConfig


_PROBLEMS: dict[str, type[GemmProblem] | type[Step]] = {
    c.op: c
    for c in (
        GemmProblem,
        RouteProblem,
        TopkProblem,
        RouteLogitsProblem,
        QuantizeProblem,
        CombineProblem,
    )
}


def problem_from_json(plain: dict[str, Any]) -> Problem:
    """Raises ValueError on an unknown op, field or value."""
    op = dict(plain).get("op")
    if op not in _PROBLEMS:
        raise ValueError(f"expected a problem with an op of {sorted(_PROBLEMS)}, got {op!r}")
    return _PROBLEMS[op].from_json(plain)


def any_config_from_json(plain: dict[str, Any]) -> AnyConfig:
    """Raises ValueError on an unknown template, field or value."""
    if dict(plain).get("template") == StepConfig.template:
        return StepConfig.from_json(plain)
    return config_from_json(plain)


_CONFIGS: dict[str, type[GemmSm90Config] | type[GemmSwapSm90Config]] = {
    c.template: c for c in (GemmSm90Config, GemmSwapSm90Config)
}


def config_from_json(plain: dict[str, Any]) -> Config:
    """Raises ValueError on an unknown template, field or value."""
    template = plain.get("template")
    if template not in _CONFIGS:
        raise ValueError(f"expected a config of one of {sorted(_CONFIGS)}, got {template!r}")
    return _CONFIGS[template].from_json(plain)
