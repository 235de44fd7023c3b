"""Named shapes and the problems they pose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cutlass_moe import grouped_matmul_problem, pad_experts, quantize_packed
from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.models.problems import gemm_problems, model_problems, weight_grad_problems
from cutlass_moe.models.shapes import DTYPES, MODELS, MoeShape, Routed
from cutlass_moe.operands import NAMED_DTYPES, PACKINGS
from emitters.spec.dtypes import Accumulation, DType
from emitters.spec.epilogue import Activation, ActivationFunction
from emitters.spec.gemm import Granularity
from emitters.spec.layer_steps import (
    CombineProblem,
    QuantizeProblem,
    RouteLogitsProblem,
    RouteProblem,
    TopkProblem,
)
from emitters.spec.registry import why_illegal
from emitters.spec.weight_grad import Side, WeightGradProblem

every_model = pytest.mark.parametrize("shape", MODELS.values(), ids=list(MODELS))
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def test_names_and_gemms():
    assert all(name == shape.name for name, shape in MODELS.items())
    assert MODELS["qwen3-30b"].gemms == {"up": (1536, 2048), "down": (2048, 768)}


@every_model
@every_dtype
def test_every_model_has_kernels(shape, dtype):
    for problem in model_problems(shape, dtype).values():
        assert every_config(problem)
        assert all(why_illegal(problem, config) is None for config in every_config(problem))


@every_dtype
def test_problems(dtype):
    up, down, activated = gemm_problems(MODELS["mixtral"], dtype).values()
    assert (up.gather, down.gather) == (True, False)
    assert (up.n, up.k, down.n, down.k) == (28672, 4096, 4096, 14336)
    packed = dtype in PACKINGS
    scales = {
        "bf16": (None, None),
        **dict.fromkeys(PACKINGS, (None, None)),
        "fp8_block": (Granularity.TOKEN_BLOCK, Granularity.BLOCK_128),
    }.get(dtype, (Granularity.TOKEN, Granularity.CHANNEL))
    for problem in (up, down):
        assert (problem.x_scale, problem.weight_scale, problem.epilogue) == (*scales, ())
    assert up.out is DType.BF16
    expected = {"fp8": Accumulation.FAST, "int8": Accumulation.INT32, "bf16": Accumulation.FP32}
    expected |= {"fp8_block": Accumulation.TWO_LEVEL}
    expected |= dict.fromkeys(PACKINGS, Accumulation.FP32)
    assert up.weight.packing == down.weight.packing == (dtype if packed else None)
    assert up.accumulation is expected[dtype]
    assert activated.out_columns == down.k
    assert activated.out is DType.BF16
    assert activated.activation == Activation(ActivationFunction.SWIGLU)


def test_activations_of_models():
    activated = gemm_problems(MODELS["gpt-oss-120b"], "bf16")["activated"]
    assert activated.activation == Activation(ActivationFunction.SWIGLU_OAI)
    plain = MoeShape("m", 8, 2, 64, 32, activation="gelu")
    assert gemm_problems(plain, "bf16")["activated"].out_columns == plain.gemms["up"].n == 32
    with pytest.raises(ValueError, match="m: activation must be one of swiglu, .*, got 'tanh'"):
        MoeShape("m", 8, 2, 64, 32, activation="tanh")
    with pytest.raises(ValueError, match="m: scoring must be one of softmax, sigmoid, .*got 'max'"):
        MoeShape("m", 8, 2, 64, 32, scoring="max")
    with pytest.raises(ValueError, match="m: num_groups 3 does not divide 8 experts"):
        MoeShape("m", 8, 2, 64, 32, num_groups=3)


@every_dtype
@pytest.mark.parametrize(("inter", "bias"), [(192, False), (64, False), (256, True)])
def test_problems_are_those_that_calls_pose(dtype, inter, bias):
    """Else a build would compile images that no call asks for."""
    shape = MoeShape("small", 4, 2, 320, inter, bias)
    for problem in gemm_problems(shape, dtype).values():
        operand = NAMED_DTYPES.get(dtype, torch.bfloat16)
        weight = torch.empty(4, problem.n, problem.k, dtype=operand)
        if dtype in PACKINGS:
            weight = quantize_packed(weight.zero_(), dtype)
        x_scale, scale = None, None
        if problem.block_rows:
            blocks, groups = problem.scale_blocks
            x_scale, scale = torch.ones(3, groups), torch.ones(4, blocks, groups)
        elif operand != torch.bfloat16:
            x_scale, scale = torch.ones(3), torch.ones(4, problem.n)
        posed = grouped_matmul_problem(
            torch.empty(3, problem.k, dtype=operand),
            weight,
            index=torch.zeros(6, dtype=torch.int32) if problem.gather else None,
            offsets=torch.zeros(4, dtype=torch.int32),
            per_token_scale=x_scale,
            scale=scale,
            bias=torch.ones(4, problem.n, dtype=torch.bfloat16) if bias else None,
            activation=str(problem.activation.function) if problem.activation else None,
        )
        assert posed == problem


def test_steps():
    """Of a rank, the router and the sum over a token's rows are those of all ranks."""
    problems = model_problems(MODELS["dsv3"].shard(tp=2, ep=16), "fp8")
    assert {name: p for name, p in problems.items() if name not in ("up", "down", "activated")} == {
        "combine bf16": CombineProblem(DType.BF16, DType.BF16, 7168, 8, DType.BF16),
        "combine fp32": CombineProblem(DType.BF16, DType.BF16, 7168, 8),
        "route int32": RouteProblem(16, 32),
        "route int64": RouteProblem(16, 64),
        "topk_router bf16": TopkProblem(256, DType.BF16, "sigmoid", 8),
        "topk_router fp32": TopkProblem(256, DType.FP32, "sigmoid", 8),
        "quantize hidden": QuantizeProblem(DType.BF16, DType.E4M3, 7168),
        "quantize inter": QuantizeProblem(DType.BF16, DType.E4M3, 1024),
    }
    whole = model_problems(MODELS["qwen3-30b"], "bf16")
    assert whole["route_logits fp32"] == RouteLogitsProblem(128, DType.FP32, "softmax", 1)
    assert not any(isinstance(problem, QuantizeProblem) for problem in whole.values())


def test_gradients_of_weights():
    shape = replace(MODELS["qwen3-30b"], inter=765)  # padded to 768
    found = weight_grad_problems(shape, "bf16")
    assert all(why_illegal(problem) is None for problem in found.values())
    up = WeightGradProblem(DType.BF16, DType.BF16, 1536, 2048, 128, Side.RIGHT)
    assert found["up gradient k"] == up
    assert found["down gradient n"] == replace(up, m=768, n=2048)
    turned = replace(up, m=2048, n=1536, gathered=Side.LEFT)
    assert found["up gradient n added"] == replace(turned, out=DType.FP32, accumulate=True)
    assert len(found) == 8
    with pytest.raises(ValueError, match="are those of bf16 weights, got 'fp8'"):
        model_problems(shape, "fp8", training=True)


def test_shard():
    assert MODELS["dsv3"].shard(ep=8) == MODELS["dsv3-ep8"]
    assert MODELS["mixtral"].shard() == MODELS["mixtral"]
    sharded = MODELS["gpt-oss-120b"].shard(tp=2, ep=4)
    rank = MoeShape("gpt-oss-120b-tp2-ep4", 32, 1, 2880, 1440, True, "swiglu_oai")
    assert sharded == replace(rank, all_ranks=Routed(128, 4))
    assert MODELS["dsv3"].shard(ep=2).shard(ep=4).routed == (256, 8)
    assert sharded.gemms == {"up": (2880, 2880), "down": (2880, 1440)}


NANO = MoeShape("nano", 128, 6, 2688, 1856, activation="relu2", scoring="sigmoid")


@every_dtype
@pytest.mark.parametrize(
    ("shape", "inter", "padded"),
    [(MODELS["gpt-oss-120b"], 360, 368), (NANO, 232, 240), (MODELS["qwen3-30b"], 96, 96)],
    ids=lambda value: getattr(value, "name", value),
)
def test_ranks_pose_the_problems_of_padded_experts(shape, inter, padded, dtype):
    """Those that fused_moe poses for what pad_experts returns; 16-bit rows here need no padding."""
    rank = shape.shard(tp=8)
    size = inter if dtype == "bf16" else padded
    if dtype in PACKINGS:
        size = -(-inter // 32) * 32
    assert (rank.inter, rank.padded(dtype).inter) == (inter, size)
    assert rank.padded(dtype).padded(dtype) == rank.padded(dtype)
    assert model_problems(rank, dtype) == model_problems(rank.padded(dtype), dtype)
    for problem in model_problems(rank, dtype).values():
        assert every_config(problem)
        assert all(why_illegal(problem, config) is None for config in every_config(problem))
    if dtype in PACKINGS:
        return  # padded before they are packed
    operand = NAMED_DTYPES[dtype]
    gates = rank.gemms["up"].n // inter
    w13 = torch.empty(128, gates * inter, shape.hidden, dtype=operand, device="meta")
    w2 = torch.empty(128, shape.hidden, inter, dtype=operand, device="meta")
    experts = pad_experts(w13, w2)
    down, activated = (gemm_problems(rank, dtype)[name] for name in ("down", "activated"))
    assert experts.w13.shape[1:] == (activated.n, activated.k) == (gates * size, shape.hidden)
    assert experts.w2.shape[1:] == (down.n, down.k) == (shape.hidden, size)


def test_shard_must_divide():
    with pytest.raises(ValueError, match="mixtral: tp 3 does not divide inter 14336"):
        MODELS["mixtral"].shard(tp=3)
    with pytest.raises(ValueError, match="mixtral: ep 16 does not divide 8 experts"):
        MODELS["mixtral"].shard(ep=16)


@pytest.mark.parametrize("wrong", [0, -1, 1.0, "8", True, None])
def test_sizes_are_positive_integers(wrong):
    with pytest.raises(ValueError, match="m: top_k must be a positive integer, got"):
        MoeShape("m", 8, wrong, 64, 32)


def test_unknown_dtype():
    with pytest.raises(ValueError, match="fp8, int8, bf16, fp8_block, .*mxfp4, got 'fp4'"):
        gemm_problems(MODELS["mixtral"], "fp4")
