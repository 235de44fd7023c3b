"""Humming's products and layers, called as vLLM does: with its own rule's config for so many rows,
the ids aligned to that config's block of rows (of a product, that is not charged)."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch

from perf.operands import LayerInputs, ProductInputs, Weights
from perf.peers.prepared import Call, Prepared, Quick, only, require
from perf.peers.vllm import vllm

# Humming's names of what weights and x hold. It stores int8 with an offset of 128.
KINDS = {"fp8": ("float8e4m3", "float8e4m3"), "int8": ("uint8", "int8")}
SWIGLU = {
    "activation_type": "binary_split",
    "activation_impl": "(a / (1.f + expf(-a))) * b",  # in CUDA: silu(gate) * up
}
COMPUTE = json.dumps({"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "indexed"})
LOCKS = 2048


def transformed(weights: Weights, dtype: str) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """Its config of the weights, its form of them, and locks; made once a layer."""
    if "humming" not in weights.made:
        schema, transform = require("humming.schema"), require("humming.transform")
        b, a = KINDS[dtype]
        raw = weights.w.view(torch.uint8)
        raw = raw ^ 0x80 if dtype == "int8" else raw.clone()
        assert weights.scale is not None
        tensors = {
            "weight": raw.view(torch.int32),
            "weight_scale": weights.scale.bfloat16()[..., None].contiguous(),
        }
        experts, n, k = weights.w.shape
        made = transform.prepare_and_transform_humming_tensors(
            tensors, n, k,
            schema.HummingWeightSchema(b_dtype=b, weight_scale_group_size=0),
            schema.HummingInputSchema(a_dtype=a, input_quant_mode="dynamic_token"),
            num_experts=experts, torch_dtype=torch.bfloat16,
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
) -> Call:
    """A launch of the product that aligns the ids first. slots: pairs that read one row of x."""
    config, tensors, locks = transformed(weights, inputs.case.dtype)
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
    assert inputs.x_scale is not None
    out = inputs.new_out(inputs.case.rows, inputs.n)  # in the order of pairs
    scale = inputs.x_scale[:, None]
    launch = call(inputs.weight, inputs, inputs.x, scale, out, inputs.case.slots)
    config, *_ = transformed(inputs.weight, inputs.case.dtype)
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
    up, *_ = transformed(inputs.up, case.dtype)
    down, *_ = transformed(inputs.down, case.dtype)

    def launch() -> None:
        x, _, x_scale = process(up, inputs=inputs.hidden)
        call(inputs.up, inputs, x, x_scale, h, case.top_k)()
        act, _, act_scale = process(down, inputs=h, **SWIGLU)
        call(inputs.down, inputs, act, act_scale, y, 1)()
        total(
            inputs=y.view(case.tokens, case.top_k, -1), topk_weights=inputs.topk_weights,
            topk_ids=inputs.ids, outputs=out,
        )  # fmt: skip

    return Prepared(launch, lambda tokens: out[tokens], clear=lambda: out.fill_(torch.nan))
