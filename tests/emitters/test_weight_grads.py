"""Problems and configs of grouped weight gradients: legality, JSON, kernels without a spill."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.choose.weight_grads_sm90 import weight_grad_config
from cutlass_moe.images.cache import Cache
from cutlass_moe.images.compiler import Request, build_images
from emitters.spec.config_sm90 import GemmSm90Config
from emitters.spec.dtypes import DType
from emitters.spec.registry import config_from_json, problem_from_json, why_illegal
from emitters.spec.weight_grad import Side, WeightGradProblem, WeightGradSm90Config

PROBLEM = WeightGradProblem(DType.BF16, DType.BF16, 1536, 2048, 128, Side.RIGHT)
PROBLEMS = [
    PROBLEM,
    replace(PROBLEM, m=2048, n=768, gathered=Side.LEFT),
    replace(PROBLEM, gathered=None, operand=DType.FP16, out=DType.FP16),
    replace(PROBLEM, m=8, num_experts=9),
    replace(PROBLEM, n=64, num_experts=9, out=DType.FP32, accumulate=True),
    *(  # each output with and without sums from before, and each of these with either way to rows
        replace(PROBLEM, m=200, n=n, num_experts=3, gathered=gathered, out=out, accumulate=add)
        for n, gathered, out, add in (
            (136, Side.LEFT, DType.BF16, False),
            (136, Side.LEFT, DType.FP32, True),
            (200, None, DType.BF16, True),
            (200, None, DType.FP32, False),
        )
    ),
]
CONFIGS = [
    WeightGradSm90Config(),
    WeightGradSm90Config(256, 128, group_m=4),
    WeightGradSm90Config(128, 192, pingpong=True),
    WeightGradSm90Config(128, 128, pingpong=True),
    WeightGradSm90Config(64, 256, pingpong=True, stages=2),
    WeightGradSm90Config(cluster=2),
]


def test_every_kernel_compiles_without_spills(shared_cache: Cache) -> None:
    """Of each problem those that calls may get, and each other config with one of them."""
    requests = [
        Request(problem, config) for problem in PROBLEMS for config in every_config(problem)
    ]
    requests += [Request(*pair) for pair in zip(PROBLEMS, CONFIGS, strict=False)]
    results = list(build_images(shared_cache, dict.fromkeys(requests)))
    assert [(r.request, r.error) for r in results if r.image is None] == []
    for result in results:
        assert result.image is not None
        record, config = result.image.record, result.request.config
        assert record.spill_bytes == 0, result.request
        assert problem_from_json(record.problem) == result.request.problem
        assert config_from_json(record.config) == config
        assert isinstance(config, WeightGradSm90Config)
        assert record.smem_bytes == config.smem_bytes(result.request.problem) <= 232_448
        assert record.registers == config.launch_registers


@pytest.mark.parametrize("rows", [0.0, 1.0, 300.0, 2000.0, 1e5])
def test_choices_are_built(rows: float) -> None:
    for problem in PROBLEMS:
        config = weight_grad_config(problem, rows)
        assert config in every_config(problem)
        assert why_illegal(problem, config) is None


def test_json_round_trips() -> None:
    for problem in PROBLEMS:
        assert problem_from_json(json.loads(json.dumps(problem.to_json()))) == problem
    for config in CONFIGS:
        assert config_from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(ValueError, match="weight_grad problem must have the fields"):
        problem_from_json({**PROBLEM.to_json(), "k": 3})


def test_words() -> None:
    words = "weight_grad bf16 > fp32 E 128 M 1536 N 2048 gather right accumulate"
    assert replace(PROBLEM, out=DType.FP32, accumulate=True).words == words
    assert replace(PROBLEM, gathered=None).words == "weight_grad bf16 > bf16 E 128 M 1536 N 2048"
    assert CONFIGS[2].words == "128x192 ping-pong group 16"
    assert CONFIGS[-1].words == "128x256 cluster 2 group 16"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"operand": DType.E4M3}, "operands must be bf16 or fp16, got e4m3"),
        ({"out": DType.FP16}, "must be bf16 like the operands or fp32, got fp16"),
        ({"num_experts": 0}, "the number of experts must be 1 to 1024, got 0"),
        ({"num_experts": 1025}, "got 1025"),
        ({"m": 12}, "M must be a positive multiple of 8 .* got 12"),
        ({"n": 0}, "N must be a positive multiple of 8 .* got 0"),
    ],
)
def test_illegal_problems_have_a_reason(changes: dict[str, Any], reason: str) -> None:
    problem = replace(PROBLEM, **changes)
    assert re.search(reason, why_illegal(problem) or "")
    assert every_config(problem) == ()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (WeightGradSm90Config(64), "tile_m must be 128 or 256 .* got 64"),
        (WeightGradSm90Config(256, pingpong=True), "tile_m must be 64 or 128 .* got 256"),
        (WeightGradSm90Config(128, 96), "tile_n must be a multiple of 64 up to 256 .* got 96"),
        (WeightGradSm90Config(128, 320), "got 320"),
        (WeightGradSm90Config(group_m=0), "group_m must be a positive number, got 0"),
        (WeightGradSm90Config(cluster=3), "cluster must be 1 or 2, got 3"),
        (WeightGradSm90Config(64, 128, pingpong=True, cluster=2), "a multiple of 128, got 64"),
        (WeightGradSm90Config(ctas_per_sm=2), "ctas_per_sm must be 1, got 2"),
        (WeightGradSm90Config(stages=5), "shared memory per CTA must be at most 232448 bytes"),
        (WeightGradSm90Config(stages=1), "stages must be 2 to 8, got 1"),
        (WeightGradSm90Config(pingpong=True), "a consumer thread must need at most 232 registers"),
        (GemmSm90Config(), "config must be of weight_grad_sm90 for weight_grad, got gemm_sm90"),
    ],
)
def test_illegal_configs_have_a_reason(config: Any, reason: str) -> None:
    assert re.search(reason, why_illegal(PROBLEM, config) or "")
    assert why_illegal(PROBLEM, WeightGradSm90Config()) is None


def test_tiles_are_counted() -> None:
    wide = replace(PROBLEM, m=2**20, n=2**20, num_experts=1024)
    assert "tiles must be fewer than 2**31" in (why_illegal(wide, CONFIGS[0]) or "")
    assert CONFIGS[0].units(PROBLEM) == 128 * 12 * 8
    odd = replace(PROBLEM, m=8, n=513)
    assert CONFIGS[-1].unit_grid(odd) == (1, 2)  # pairs of three N tiles
    assert CONFIGS[-1].unit_grid(replace(odd, gathered=None)) == (1, 3)
