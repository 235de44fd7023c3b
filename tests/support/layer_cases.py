"""Whole layers to test: shapes of models, random weights, routings with what goes wrong in them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from cutlass_moe.choose.heuristics_sm90 import choose, every_config, step_config
from cutlass_moe.layer.steps import LayerSizes, Projection, layer_problems
from cutlass_moe.layer.workspace import up_projection
from cutlass_moe.models.shapes import MODELS, MoeShape
from cutlass_moe.operands import DTYPES, FP8_BLOCK, QUANTS
from cutlass_moe.ops.pack import quantize_packed
from cutlass_moe.ops.quantize import quantize_per_token_reference
from cutlass_moe.ops.quantize_groups import quantize_per_block
from emitters.spec.dtypes import DType
from emitters.spec.epilogue import ActivationFunction
from emitters.spec.gemm import Granularity
from emitters.spec.layer_steps import Step, TopkProblem
from emitters.spec.packing import Packing
from emitters.spec.registry import Config, Problem

# A layer's relative error to float64 with the same quantisation points, by quant, accumulation.
# fp8 with fast sums: an error of 1e-3 before an activation is quantised turns some of its values
# over to the next of 8 bits, which costs 1e-2 (perf/README.md).
LIMITS = {
    (None, None): 4e-3,
    ("int8", None): 5e-3,
    ("fp8", "two_level"): 1e-2,
    ("fp8", None): 3e-2,  # fast sums grow less exact with K: 1.4e-2 at 2,048, 2.5e-2 at 14,336
    (FP8_BLOCK, None): 1e-2,
}
ALL_QUANTS = (None, "int8", "fp8", FP8_BLOCK)
TOKENS = (0, 1, 7, 128, 4096)


@dataclass(frozen=True)
class LayerCase:
    shape: MoeShape
    activation: str = "swiglu"
    interleaved: bool = False


CASES = {
    "qwen3-30b": LayerCase(MODELS["qwen3-30b"]),
    "mixtral": LayerCase(MODELS["mixtral"]),
    "dsv3-ep8": LayerCase(MODELS["dsv3-ep8"]),
    "gpt-oss": LayerCase(MODELS["gpt-oss-120b"], "swiglu_oai", interleaved=True),
    "qwen3-next": LayerCase(MODELS["qwen3-next"]),
}
PACKED_LAYERS = {  # with packed 4-bit weights
    "gpt-oss": (
        LayerCase(
            replace(MODELS["gpt-oss-120b"], num_experts=32, name="gpt-oss-20b"),
            "swiglu_oai",
            interleaved=True,
        ),
        Packing.MXFP4,
    ),
    "qwen3-30b": (LayerCase(MODELS["qwen3-30b"]), Packing.INT4_G128),
    "qwen3-next": (LayerCase(MODELS["qwen3-next"]), Packing.INT4_G32),
}
SMALL = LayerCase(MoeShape("small", num_experts=9, top_k=3, hidden=256, inter=192))


@lru_cache(maxsize=2)
def weights(case: LayerCase, quant: str | None, device: str) -> dict[str, Any]:
    """w13, w2 and what belongs to them, of a layer whose activations are of order 1."""
    shape = case.shape
    generator = torch.Generator(device).manual_seed(0)

    def random(n: int, k: int) -> Tensor:
        values = torch.empty(shape.num_experts, n, k, dtype=torch.bfloat16, device=device)
        return values.normal_(std=1.5 * k**-0.5, generator=generator)

    found: dict[str, Any] = {"activation": case.activation, "interleaved": case.interleaved}
    sizes = {"w13": (2 * shape.inter, shape.hidden), "w2": (shape.hidden, shape.inter)}
    for name, (n, k) in sizes.items():
        weight = random(n, k)
        if quant == FP8_BLOCK:
            weight, found[f"{name}_scale"] = quantize_per_block(weight, gated=name == "w13")
        elif quant:
            parts = [quantize_per_token_reference(one, QUANTS[quant]) for one in weight]
            weight = torch.stack([values for values, _ in parts])
            found[f"{name}_scale"] = torch.stack([scale for _, scale in parts])
        found[name] = weight
        if shape.bias:
            bias = torch.empty(shape.num_experts, n, dtype=torch.bfloat16, device=device)
            found[f"{name}_bias"] = bias.normal_(generator=generator)
    return found


def packed_weights(
    case: LayerCase,
    packing: Packing,
    device: str,
    activation: str | None = None,
    interleaved: bool | None = None,
    bias: bool | None = None,
) -> dict[str, Any]:
    """w13 and w2 in 4 bits, and what belongs to them; the rest: default what the case has."""
    shape = case.shape if bias is None else replace(case.shape, bias=bias)
    case = LayerCase(
        shape,
        activation or case.activation,
        case.interleaved if interleaved is None else interleaved,
    )
    found = dict(weights(case, None, device))
    if not ActivationFunction(case.activation).gated:
        found["w13"] = found["w13"][:, : shape.inter]
    found["w13"] = quantize_packed(found["w13"], str(packing), interleaved=case.interleaved)
    found["w2"] = quantize_packed(found["w2"], str(packing))
    return found


def packed_images() -> set[tuple[Problem, Config]]:
    """Of the layers in tests/ops/test_four_bit_gpu.py."""
    found: set[tuple[Problem, Config]] = set()
    for case, packing in PACKED_LAYERS.values():
        found |= _images(case, None, packing=packing)
    return found


def tokens(case: LayerCase, count: int, device: str, seed: int = 0) -> dict[str, Tensor]:
    """hidden, topk_weights and topk_ids of distinct random experts."""
    shape = case.shape
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.empty(count, shape.hidden, dtype=torch.bfloat16, device=device)
    scores = torch.rand(count, shape.num_experts, generator=generator, device=device)
    chosen, ids = scores.topk(shape.top_k) if count else (scores[:, : shape.top_k],) * 2
    return {
        "hidden": hidden.normal_(generator=generator),
        "topk_weights": chosen / chosen.sum(1, keepdim=True),
        "topk_ids": ids.int(),
    }


def images() -> set[tuple[Problem, Config]]:
    """Of all the calls in tests/test_layers_gpu.py and tests/test_nn_gpu.py."""
    found: set[tuple[Problem, Config]] = set()
    for case in CASES.values():
        for quant, accumulation in LIMITS:
            if not (case.interleaved and quant == FP8_BLOCK):  # which fused_moe refuses
                found |= _images(case, quant, accumulation)
    for quant in ALL_QUANTS:
        for activation in ActivationFunction:
            found |= _images(replace(SMALL, activation=str(activation)), quant)
    for scoring, dtype in product(("softmax", "sigmoid"), (DType.FP32, DType.BF16)):
        router = TopkProblem(SMALL.shape.num_experts, dtype, scoring, 1)
        found.add((router, step_config(router)))
    for activation in ("swiglu", "swiglu_oai", "relu2"):  # of tests/test_nn_gpu.py's modules
        for bias in (False, True):
            case = replace(SMALL, shape=replace(SMALL.shape, bias=bias), activation=activation)
            for quant in ALL_QUANTS:
                found |= _images(case, quant, n_major=quant is None)
    return found | _images(replace(SMALL, interleaved=True), None, n_major=True)


def _images(
    case: LayerCase,
    quant: str | None,
    accumulation: str | None = None,
    n_major: bool = False,
    packing: Packing | None = None,
) -> set[tuple[Problem, Config]]:
    shape = case.shape
    outside = DType.BF16
    operand = DTYPES[QUANTS[quant]] if quant else outside
    scale = Granularity.CHANNEL if quant else None
    if quant == FP8_BLOCK:
        scale = Granularity.BLOCK_128
    each = Projection(scale, DType.BF16 if shape.bias else None, n_major, packing=packing)
    up = each._replace(alternating=n_major and case.interleaved)
    every = layer_problems(
        LayerSizes(shape.num_experts, shape.top_k, shape.hidden, shape.inter),
        operand,
        outside,
        case.activation,
        up,
        each,
        accumulation,
    )
    counts = TOKENS[1:] if case in CASES.values() else range(1, 501)
    if packing is not None:
        counts = (*TOKENS[1:4], 1024)
    found: set[tuple[Problem, Config]] = set()
    for problem in filter(None, every):
        if isinstance(problem, Step):
            found |= {(problem, config) for config in every_config(problem)}
    for count in counts:
        per_expert = count * shape.top_k / shape.num_experts
        for expected in (per_expert, per_expert / 4):  # or on a rank of four
            up = up_projection(every, expected, count * shape.top_k)
            found |= {(p, choose(p, count, expected)) for p in (up, every.down)}
    return found
