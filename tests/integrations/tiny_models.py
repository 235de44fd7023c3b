"""Tiny random models of the families that transformers' integration is tested with."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cutlass_moe as cm

E, TOP_K, HIDDEN, INTER, VOCAB = 8, 2, 64, 32, 128
_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_DEEPSEEK = {
    "moe_intermediate_size": INTER,
    "n_routed_experts": E,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # transformers' model type, and its options
    "mixtral": ("mixtral", {"num_local_experts": E}),
    "qwen3-moe": ("qwen3_moe", {"num_experts": E, "moe_intermediate_size": INTER, "head_dim": 16}),
    "deepseek-v3": (
        "deepseek_v3",
        {
            **_DEEPSEEK,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    "gpt-oss": ("gpt_oss", {"num_local_experts": E, "head_dim": 16, "sliding_window": 64}),
    "olmoe": ("olmoe", {"num_experts": E}),
    "glm-4-moe": ("glm4_moe", {**_DEEPSEEK, "head_dim": 16}),
    "nemotron-h": (
        "nemotron_h",
        {
            **_DEEPSEEK,
            "hybrid_override_pattern": "ME*E",
            "num_hidden_layers": 4,
            "moe_shared_expert_intermediate_size": INTER,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 16,
            "head_dim": 16,
        },
    ),
}


def config(family: str, **options: Any) -> Any:
    import transformers  # here: what only needs the tables above does without

    model_type, own = FAMILIES[family]
    return transformers.AutoConfig.for_model(model_type, **{**_SHARED, **own, **options})


def make(
    family: str, device: str = "cpu", implementation: str = "cutlass_moe", **options: Any
) -> Any:
    """A model in bfloat16 whose weights spread enough for experts to matter."""
    import transformers

    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config(family, **options),
            dtype=torch.bfloat16,
            experts_implementation=implementation,
        ).eval()
        for experts in experts_of(model):
            for name, parameter in experts.named_parameters():
                nn.init.normal_(
                    parameter, std=0.5 if "bias" in name else parameter.shape[-1] ** -0.5
                )
    return model


def experts_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "is_concatenated")]


def definition(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """A layer pair by pair, in float32, with the module's own gate and norm."""
    wide = copy.deepcopy(experts).float()
    name = "gate_up_proj" if wide.has_gate else "up_proj"
    up_proj, down_proj = (
        w if wide.is_transposed else w.transpose(1, 2)
        for w in (getattr(wide, name), wide.down_proj)
    )
    out = torch.zeros_like(hidden, dtype=torch.float32)
    for token, choice in (ids < len(up_proj)).nonzero().tolist():
        e = int(ids[token, choice])
        up = hidden[token, None].float() @ up_proj[e]
        up = up + (getattr(wide, f"{name}_bias")[e] if wide.has_bias else 0)
        down = (wide._apply_gate(up) if wide.has_gate else wide.act_fn(up)) @ down_proj[e]
        down = down + (wide.down_proj_bias[e] if wide.has_bias else 0)
        if getattr(wide, "has_post_expert_norm", False):
            down = wide.post_expert_norm(down)
        out[token] += weights[token, choice].float() * down[0]
    return out.detach()


def write_mxfp4(directory: Path, model: Any) -> None:
    """Saves a gpt-oss as it is published: its experts in MXFP4, as the loader of transformers
    reads them."""
    import safetensors.torch as safetensors_torch

    model.save_pretrained(directory)
    (file,) = directory.glob("*.safetensors")
    tensors = safetensors_torch.load_file(file)
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        weight = tensors.pop(name).transpose(1, 2)
        blocks, scales = cm.unpack_weights(cm.quantize_packed(weight, "mxfp4"), weight.shape[2])
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    safetensors_torch.save_file(tensors, file)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (directory / "config.json").write_text(json.dumps(config))
