"""Humming's products and layers, called as vLLM does: with its own rule's config for so many rows,
the ids aligned to that config's block of rows (of a product, that is not charged)."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch

from cutlass_moe.operands import PACKINGS
from emitters.spec.packing import Packing
from perf.operands import LayerInputs, ProductInputs, Weights
from perf.peers.prepared import Call, Prepared, Quick, only, require
from perf.peers.vllm import vllm

# Humming's names of what weights and x hold. It stores integers with an offset.
KINDS = {
    "fp8": ("float8e4m3", "float8e4m3"),
    "int8": ("uint8", "int8"),
    "mxfp4": ("float4e2m1", "bfloat16"),
    "int4_g128": ("uint4", "bfloat16"),
}
ACTIVATIONS = {  # in CUDA, of gate a and up b
    "swiglu": "(a / (1.f + expf(-a))) * b",
    "swiglu_oai": "fminf(a, 7.f) / (1.f + expf(-1.702f * fminf(a, 7.f)))"
    " * (fminf(fmaxf(b, -7.f), 7.f) + 1.f)",
}
COMPUTE = json.dumps({"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "indexed"})
LOCKS = 2048


def tensors_of(weights: Weights, dtype: str) -> dict[str, torch.Tensor]:
    """Weights and scales as it takes them."""
    w, scale = weights.w, weights.scale
    assert scale is not None
    if dtype in PACKINGS:
        scale = scale if dtype == "int4_g128" else scale.view(torch.float8_e8m0fnu)
        words = w.flatten(2).view(torch.int32)
        return {"weight": words.clone(), "weight_scale": scale.clone()}
    raw = w.view(torch.uint8)
    raw = raw ^ 0x80 if dtype == "int8" else raw.clone()
    return {
        "weight": raw.view(torch.int32),
        "weight_scale": scale.bfloat16()[..., None].contiguous(),
    }


def transformed(
    weights: Weights, dtype: str, n: int, k: int
) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """Its config of the weights [E, n, k], its form of them, and locks; made once a layer."""
    if "humming" not in weights.made:
        schema, transform = require("humming.schema"), require("humming.transform")
        b, a = KINDS[dtype]
        options: dict[str, Any] = {}
        kind = {"b_dtype": b, "weight_scale_group_size": 0}
        if dtype in PACKINGS:
            options = {"pad_n_to_multiple": 256, "pad_k_to_multiple": 128}  # as vLLM has it
            kind["weight_scale_group_size"] = Packing(dtype).group
            if dtype == Packing.MXFP4:
                kind["bs_dtype"] = "float8e8m0"
        made = transform.prepare_and_transform_humming_tensors(
            tensors_of(weights, dtype), n, k,
            schema.HummingWeightSchema(**kind),
            schema.HummingInputSchema(
                a_dtype=a, input_quant_mode="none" if dtype in PACKINGS else "dynamic_token"
            ),
            num_experts=len(weights.w), torch_dtype=torch.bfloat16, **options,
        )  # fmt: skip
        locks = torch.zeros(LOCKS, dtype=torch.int32, device="cuda")
        weights.made["humming"] = (*made, locks)
    return weights.made["humming"]


def chosen(config: Any, rows: int) -> dict[str, Any]:
    tune = require("humming.tune")
    return tune.get_heuristics_config(layer_config=config, shape_m=rows, gemm_type="indexed")


def call(
    weights: Weights,
    inputs: ProductInputs | LayerInputs,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    out: torch.Tensor,
    slots: int,
    part: str,
) -> Call:
    """A launch of the product that aligns the ids first. slots: pairs that read one row of x."""
    case = inputs.case
    config, tensors, locks = transformed(weights, case.dtype, *case.products[part])
    config_for_rows = chosen(config, inputs.case.rows)
    ids, experts, padded = vllm().moe_align_block_size.moe_align_block_size(
        inputs.ids, config_for_rows["block_shape"][0], inputs.case.num_experts, None,
        ignore_invalid_experts=True,
    )[:3]  # fmt: skip
    return partial(
        require("humming.forward").humming_forward, config, inputs=x, weight=tensors["weight"],
        weight_scale=tensors["weight_scale"], outputs=out, input_scale=x_scale, sorted_ids=ids,
        expert_ids=experts, num_tokens_padded=padded, locks=locks, top_k=slots,
        valid_shape_m=inputs.case.rows, compute_config=COMPUTE,
        tuning_config=json.dumps([[0, 1 << 30, config_for_rows]]),
    )  # fmt: skip


def product(inputs: ProductInputs, quick: Quick) -> Prepared:
    only(inputs, *KINDS)
    require("humming")
    case = inputs.case
    out = inputs.new_out(case.rows, inputs.n)  # in the order of pairs
    scale = None if inputs.x_scale is None else inputs.x_scale[:, None]
    launch = call(inputs.weight, inputs, inputs.x, scale, out, case.slots, case.part)
    config, *_ = transformed(inputs.weight, case.dtype, inputs.n, inputs.k)
    used = chosen(config, inputs.case.rows)
    note = f"{used.get('mma_type')} {used['block_shape']}"
    return Prepared(launch, lambda rows: out[inputs.order[rows]], note)


def layer(inputs: LayerInputs, quick: Quick) -> Prepared:
    """Quantise, align, up, SwiGLU and quantise, align, down, vLLM's weighted sum."""
    only(inputs, *KINDS)
    process = require("humming.forward").may_process_input
    case, total = inputs.case, vllm().sum.moe_fused_mul_sum
    h = inputs.new_out(case.rows, 2 * case.inter)
    y = inputs.new_out(case.rows, case.hidden)
    out = torch.full_like(inputs.hidden, torch.nan)
    up, *_ = transformed(inputs.up, case.dtype, *case.products["up"])
    down, *_ = transformed(inputs.down, case.dtype, *case.products["down"])
    halves = {"activation_type": "binary_split", "activation_impl": ACTIVATIONS[case.activation]}

    def launch() -> None:
        x, _, x_scale = process(up, inputs=inputs.hidden)
        call(inputs.up, inputs, x, x_scale, h, case.top_k, "up")()
        act, _, act_scale = process(down, inputs=h, **halves)
        call(inputs.down, inputs, act, act_scale, y, 1, "down")()
        total(
            inputs=y.view(case.tokens, case.top_k, -1), topk_weights=inputs.topk_weights,
            topk_ids=inputs.ids, outputs=out,
        )  # fmt: skip

    return Prepared(launch, lambda tokens: out[tokens], clear=lambda: out.fill_(torch.nan))
