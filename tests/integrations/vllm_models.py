"""A tiny Qwen3-MoE as a checkpoint, in the forms that vLLM reads; one of its layers inside vLLM."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import cutlass_moe as cm
from cutlass_moe.operands import FP8_BLOCK, PACKINGS, QUANTS
from tests.integrations.vllm_layers import Layer
from tests.support.checkpoints import QUANTIZATION

TINY = Layer(None, 8, 2, 256, 128)
EXPERTS = "model.layers.0.mlp.experts"
NAMES = {"gate_proj": ("w13", "w1"), "up_proj": ("w13", "w3"), "down_proj": ("w2", "w2")}  # vLLM's
_SUFFIXES = ("weight", "weight_scale", "weight_scale_inv", "weight_packed")


def write_model(directory: Path, quant: str | None) -> None:
    """A tiny Qwen3-MoE whose experts are quantised, and nothing else."""
    experts, hidden, inter, layers, vocab = TINY.experts, TINY.hidden, TINY.inter, 2, 512
    heads, kv_heads, head = 4, 2, 64
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": torch.randn(vocab, hidden),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": torch.randn(vocab, hidden) * hidden**-0.5 * 4,
    }
    dense = ["lm_head"]
    for layer in range(layers):
        root = f"model.layers.{layer}"
        columns = (heads * head, kv_heads * head, kv_heads * head)
        for name, n, k in zip(
            names, (*columns, hidden), (*(hidden,) * 3, heads * head), strict=True
        ):
            tensors[f"{root}.self_attn.{name}.weight"] = torch.randn(n, k) * k**-0.5
            dense.append(f"{root}.self_attn.{name}")
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{root}.{name}.weight"] = torch.ones(hidden)
        for name in ("q_norm", "k_norm"):
            tensors[f"{root}.self_attn.{name}.weight"] = torch.ones(head)
        tensors[f"{root}.mlp.gate.weight"] = torch.randn(experts, hidden) * hidden**-0.5
        dense.append(f"{root}.mlp.gate")
        for e in range(experts):
            for name in ("gate_proj", "up_proj", "down_proj"):
                n, k = (hidden, inter) if name == "down_proj" else (inter, hidden)
                weight = torch.randn(1, n, k).bfloat16() * 1.5 * k**-0.5
                tensors |= stored(f"{root}.mlp.experts.{e}.{name}.weight", weight, quant)
    wide = {
        n: t.bfloat16() if t.dtype == torch.float32 and "scale" not in n else t
        for n, t in tensors.items()
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in wide.items()},
        directory / "model.safetensors",
    )
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "moe_intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "num_experts": experts,
        "num_experts_per_tok": TINY.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if quant:
        how: dict[str, Any] = copy.deepcopy(QUANTIZATION[quant]) or {}
        how["modules_to_not_convert" if quant == FP8_BLOCK else "ignore"] = dense
        config["quantization_config"] = how
    (directory / "config.json").write_text(json.dumps(config))


def stored(name: str, weight: Tensor, quant: str | None) -> dict[str, Tensor]:
    """A weight [1, N, K] as checkpoints hold it, with its scale."""
    if quant is None:
        return {name: weight[0]}
    if quant == FP8_BLOCK:
        values, scale = cm.quantize_per_block(weight)
        return {name: values[0], f"{name}_scale_inv": scale[0]}
    if quant in PACKINGS:
        values, scale = cm.unpack_weights(cm.quantize_packed(weight, quant), weight.shape[2])
        shape = torch.tensor(weight.shape[1:])
        return {f"{name}_packed": values[0], f"{name}_scale": scale[0], f"{name}_shape": shape}
    values, scale = cm.quantize_per_channel(weight, QUANTS[quant])
    return {name: values[0], f"{name}_scale": scale[0][:, None]}


def load_layer(directory: Path, vllm_config: Any) -> tuple[nn.Module, Any]:
    """The experts of the first layer, as vLLM builds and loads them; and its kernel of them."""
    from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory

    layer = FusedMoEFactory(
        num_experts=TINY.experts,
        top_k=TINY.top_k,
        hidden_size=TINY.hidden,
        intermediate_size=TINY.inter,
        params_dtype=torch.bfloat16,
        quant_config=vllm_config.quant_config,
        prefix=EXPERTS,
    )
    held = next(module for module in layer.modules() if _has_weights(module))
    parameters = dict(held.named_parameters())
    for name, tensor in load_file(directory / "model.safetensors").items():
        if name.startswith(EXPERTS):
            expert, projection, suffix = name.removeprefix(f"{EXPERTS}.").split(".")
            weight, shard = NAMES[projection]
            parameter: Any = parameters[f"{weight}_{suffix}"]
            parameter.weight_loader(
                parameter, tensor, f"{weight}_{suffix}", shard_id=shard, expert_id=int(expert)
            )
    held.quant_method.process_weights_after_loading(held)
    return layer, held.quant_method.moe_kernel


def read_layer(directory: Path) -> dict[str, Tensor]:
    """The same experts, as `fused_moe` takes them."""
    tensors = load_file(directory / "model.safetensors")
    found = {}
    for ours, names in (("w13", ("gate_proj", "up_proj")), ("w2", ("down_proj",))):
        for suffix in _SUFFIXES:
            each = [
                [tensors.get(f"{EXPERTS}.{e}.{name}.{suffix}") for name in names]
                for e in range(TINY.experts)
            ]
            if each[0][0] is not None:
                key = f"{ours}_scale" if "scale" in suffix else ours
                found[key] = torch.stack([torch.cat(parts) for parts in each])  # type: ignore[arg-type]
        if found[ours].dtype == torch.int32:
            found[ours] = cm.pack_weights(found[ours], found.pop(f"{ours}_scale"))
        elif f"{ours}_scale" in found and found[f"{ours}_scale"].shape[1] == found[ours].shape[1]:
            found[f"{ours}_scale"] = found[f"{ours}_scale"].squeeze(-1)  # [E, N, 1], per channel
    return found


def _has_weights(module: nn.Module) -> bool:
    return hasattr(module, "w13_weight") or hasattr(module, "w13_weight_packed")
