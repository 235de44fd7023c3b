"""Small checkpoints in the layouts of published ones, written tensor by tensor.

Names are spelled here as they are in the files, without the reader's tables, and what is expected
of a reader is computed from the weights before they are written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIGS = Path(__file__).parents[1] / "models/configs"
EXPERTS, TOP_K, HIDDEN, INTER = 8, 2, 64, 48
ZERO_EXPERTS = 4  # LongCat's: rows of the router that are no expert's
LAYERS = (1, 3)
BLOCK = 128
_SIZES = {
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), "experts"),
    **dict.fromkeys(("num_experts_per_tok", "experts_per_token", "top_k_experts"), "top_k"),
    **dict.fromkeys(("moe_topk", "moe_top_k", "moe_k"), "top_k"),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), "inter"),
    **{"moe_num_experts": "experts", "intermediate_size": "inter", "hidden_size": "hidden"},
}
_W = ("w1", "w3", "w2")
_CORRECTION = "mlp.gate.e_score_correction_bias"
_SHARED = ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.down_proj.weight")


@dataclass(frozen=True)
class Form:
    """How a family's checkpoints look.

    file: its config in tests/models/configs. root: what precedes a layer's number. experts: of the
    module. names: of gate, up and down. style: "each" expert has its tensors; "joint", "transposed"
    and "interleaved" are one gate_up_proj of all; "apart" is a stack of each; "ungated" has no
    gate. router, bias: names of the router's weight and correction bias. shared: names beside.
    """

    file: str
    root: str = "model.layers"
    experts: str = "mlp.experts"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    style: str = "each"
    router: str = "mlp.gate.weight"
    bias: str | None = None
    shared: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.file}-{self.style}"


def _sparse(file: str, bias: str | None = None) -> Form:
    block = "block_sparse_moe"
    return Form(file, "model.layers", f"{block}.experts", _W, "each", f"{block}.gate.weight", bias)


QWEN3, DEEPSEEK = Form("qwen3-30b"), Form("deepseek-v3", bias=_CORRECTION, shared=_SHARED)
MIXTRAL = _sparse("mixtral-8x7b")
MINIMAX = _sparse("minimax-m2", "block_sparse_moe.e_score_correction_bias")
GPT_OSS = Form("gpt-oss-120b", style="interleaved", router="mlp.router.weight")
STACKED = Form("qwen3.5-397b", "model.language_model.layers", style="joint")
NEMOTRON = Form(
    "nemotron-3-nano",
    "backbone.layers",
    "mixer.experts",
    style="ungated",
    router="mixer.gate.weight",
    bias="mixer.gate.e_score_correction_bias",
    shared=("mixer.shared_experts.up_proj.weight",),
)
FORMS = (
    QWEN3,
    Form("olmoe"),
    Form(
        "qwen1.5-moe", shared=("mlp.shared_expert.up_proj.weight", "mlp.shared_expert_gate.weight")
    ),
    STACKED,
    Form("qwen3.5-397b", "model.language_model.layers", style="transposed"),  # as Qwen3-VL's
    Form("qwen3.5-397b", "model.language_model.layers"),  # as its FP8 files
    DEEPSEEK,
    Form("deepseek-v2", shared=_SHARED),
    Form("kimi-k2.5", "language_model.model.layers", bias=_CORRECTION, shared=_SHARED),
    Form("glm-4.5-air", bias=_CORRECTION, shared=_SHARED),
    Form("dots.llm1", bias=_CORRECTION, shared=_SHARED),
    Form("ling-1t", bias="mlp.gate.expert_bias", shared=_SHARED),
    Form("trinity-large", router="mlp.router.gate.weight", bias="mlp.expert_bias", shared=_SHARED),
    Form("ernie-4.5-21b", bias="mlp.moe_statics.e_score_correction_bias", shared=_SHARED),
    Form("ernie-4.5-vl-28b", bias="mlp.moe_statics.e_score_correction_bias", shared=_SHARED),
    Form("hunyuan-a13b", router="mlp.gate.wg.weight", shared=("mlp.shared_mlp.up_proj.weight",)),
    Form(
        "longcat-flash",
        router="mlp.router.classifier.weight",
        bias="mlp.router.e_score_correction_bias",
    ),
    MIXTRAL,
    _sparse("phi-3.5-moe"),
    MINIMAX,
    Form("jamba", experts="feed_forward.experts", router="feed_forward.router.weight"),
    Form(
        "llama-4-maverick",
        "language_model.model.layers",
        "feed_forward.experts",
        style="transposed",
        router="feed_forward.router.weight",
        shared=("feed_forward.shared_expert.down_proj.weight",),
    ),
    GPT_OSS,
    NEMOTRON,
    Form(
        "step-3.5-flash",
        experts="moe",
        style="apart",
        router="moe.gate.weight",
        bias="moe.router_bias",
        shared=("share_expert.up_proj.weight",),
    ),
    Form(
        "gemma-4-26b-a4b",
        "model.language_model.layers",
        "experts",
        style="joint",
        router="router.proj.weight",
        shared=("mlp.up_proj.weight",),
    ),
)


@dataclass
class Written:
    """One layer as it was written, in float32, with what its scales make of it.

    gate (None where there is none) and up [E, I, H], down [E, H, I]; biases [E, I] or [E, H];
    tensors: all of its tensors, by the names that follow the layer's.
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    tensors: dict[str, Tensor]


def write_checkpoint(
    directory: Path,
    form: Form,
    quant: str = "bf16",
    *,
    hidden: int = HIDDEN,
    inter: int = INTER,
    shards: int = 3,
    changes: dict[str, Any] | None = None,
) -> dict[int, Written]:
    """Writes config.json and safetensors files, and returns the layers.

    quant: a key of QUANTIZATION: "fp8" has a scale per channel, "fp8_tensor" one per weight;
    "fp8_block" float32 ones per block, "_ue8m0" powers of two in float32, "_e8m0" in 8 bits,
    "_compressed" those of compressed-tensors. shards: how many files, 0 for model.safetensors
    without an index. changes: of the config's fields.
    """
    from safetensors.torch import save_file

    directory.mkdir(exist_ok=True)
    plain = json.loads((CONFIGS / f"{form.file}.json").read_text())
    inside = plain.get("text_config", plain)
    sizes = {"experts": EXPERTS, "top_k": TOP_K, "hidden": hidden, "inter": inter}
    for name, size in _SIZES.items():
        if name in inside:
            inside[name] = [sizes[size]] * 2 if isinstance(inside[name], list) else sizes[size]
    if "zero_expert_num" in inside:
        inside["zero_expert_num"] = ZERO_EXPERTS
    inside.pop("quantization_config", None)
    plain["quantization_config"] = QUANTIZATION[quant]
    inside.update(changes or {})
    (directory / "config.json").write_text(json.dumps(plain))

    torch.manual_seed(len(str(form)))
    layers = {layer: _layer(form, quant, hidden, inter) for layer in LAYERS}
    tensors = {
        f"{form.root}.{layer}.{name}": tensor
        for layer, written in layers.items()
        for name, tensor in written.tensors.items()
    }
    tensors[f"{form.root}.0.mlp.up_proj.weight"] = torch.zeros(2, 2)  # a dense layer
    tensors[f"{form.root}.1.self_attn.q_proj.weight"] = torch.zeros(2, 2)
    tensors[f"mtp.layers.0.{form.experts}.0.up_proj.weight"] = torch.zeros(2, 2)
    if not shards:
        save_file(tensors, directory / "model.safetensors")
        return layers
    files: dict[str, str] = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, directory / name)
        files |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return layers


def _layer(form: Form, quant: str, hidden: int, inter: int) -> Written:
    gates, ups, downs = (
        [_store(torch.randn(*shape) / 8, quant) for _ in range(EXPERTS)]
        for shape in ((inter, hidden), (inter, hidden), (hidden, inter))
    )
    kept = {"gate": gates, "up": ups, "down": downs}
    dense = {name: torch.stack([one[0] for one in each]) for name, each in kept.items()}
    stored = {name: [one[1] for one in each] for name, each in kept.items()}
    biased = form.file.startswith("gpt-oss")
    biases = [torch.randn(EXPERTS, n).bfloat16() for n in (inter, inter, hidden)]
    if form.style == "ungated":
        del stored["gate"]
    tensors = _each(form, stored) if form.style in ("each", "ungated") else _stacks(form, stored)
    if biased:
        rows = torch.stack(biases[:2], 2).flatten(1)  # gate, up, gate, up, ...
        tensors |= {f"{form.experts}.gate_up_proj_bias": rows}
        tensors |= {f"{form.experts}.down_proj_bias": biases[2]}
    rows = EXPERTS + (ZERO_EXPERTS if form.file.startswith("longcat") else 0)
    tensors[form.router] = torch.randn(rows, hidden).bfloat16()
    if biased:
        tensors["mlp.router.bias"] = torch.randn(rows)
    if form.bias:
        ernie = {"ernie-4.5-21b": (1, rows), "ernie-4.5-vl-28b": (2, rows)}
        tensors[form.bias] = torch.randn(ernie.get(form.file, (rows,)))
    if form.file == "ernie-4.5-vl-28b":  # the experts of images
        tensors |= {
            f"mlp.experts.{EXPERTS}.{name}.weight": torch.zeros(3, 3) for name in form.names
        }
    tensors |= {name: torch.randn(3, 2).bfloat16() for name in form.shared}
    gate = None if form.style == "ungated" else dense["gate"]
    return Written(
        gate, dense["up"], dense["down"], *(biases if biased else (None,) * 3), tensors
    )  # fmt: skip


def _each(form: Form, stored: dict[str, list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    names = dict(zip(("gate", "up", "down"), form.names, strict=True))
    return {
        f"{form.experts}.{e}.{names[which]}.{suffix}": tensor
        for which, experts in stored.items()
        for e, tensors in enumerate(experts)
        for suffix, tensor in tensors.items()
    }


def _stacks(form: Form, stored: dict[str, list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    def stack(name: str) -> dict[str, Tensor]:
        return {
            suffix: torch.stack([one[suffix] for one in stored[name]]) for suffix in stored[name][0]
        }

    gate, up, down = stack("gate"), stack("up"), stack("down")
    if form.style == "apart":
        parts = dict(zip(form.names, (gate, up, down), strict=True))
        return {f"{form.experts}.{n}.{s}": t for n, part in parts.items() for s, t in part.items()}
    if form.style == "interleaved":
        joint = {s: torch.stack((gate[s], up[s]), 2).flatten(1, 2) for s in gate}
    else:
        joint = {s: torch.cat((gate[s], up[s]), 1) for s in gate}
    found = {}
    for name, part in (("gate_up_proj", joint), ("down_proj", down)):
        for suffix, tensor in part.items():
            if form.style in ("transposed", "interleaved") and "weight_blocks" not in part:
                tensor = tensor.transpose(1, 2).contiguous()
            found[f"{form.experts}.{name}{suffix.removeprefix('weight')}"] = tensor
    return found


def _store(weight: Tensor, quant: str) -> tuple[Tensor, dict[str, Tensor]]:
    """A matrix [N, K] as it is stored, and what that means in float32."""
    if quant in ("bf16", "fp16"):
        stored = weight.to(torch.bfloat16 if quant == "bf16" else torch.float16)
        return stored.float(), {"weight": stored}
    if quant.startswith("fp8_block"):
        return _store_blocks(weight, quant.removeprefix("fp8_block"))
    if quant == "mxfp4":
        return _store_mxfp4(weight)
    if quant.startswith("int4"):
        return _store_int4(weight, int(quant.removeprefix("int4_g")))
    tensor_wide = quant == "fp8_tensor"
    largest = weight.abs().amax() if tensor_wide else weight.abs().amax(1, keepdim=True)
    if quant == "int8":
        scale = largest / 127
        values = (weight / scale).round().to(torch.int8)
    else:
        scale = (largest / 448).bfloat16()
        values = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values.float() * scale.float(), {"weight": values, "weight_scale": scale}


def _store_blocks(weight: Tensor, kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    n, k = weight.shape
    dense, values = torch.empty_like(weight), torch.empty(n, k, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-n // BLOCK), -(-k // BLOCK))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            scale = weight[part].abs().max() / 448 * (1 + 0.5 * torch.rand(()))
            if kind.endswith("e8m0"):
                scale = scale.log2().ceil().exp2()
            scales[i, j] = scale.bfloat16() if kind == "_compressed" else scale
            values[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
            dense[part] = values[part].float() * scales[i, j]
    if kind == "_compressed":
        return dense, {"weight": values, "weight_scale": scales.bfloat16()}
    stored = scales.to(torch.float8_e8m0fnu) if kind == "_e8m0" else scales
    return dense, {"weight": values, "weight_scale_inv": stored}


_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _store_mxfp4(weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Blocks of 32 in the order of memory, the first of two values in the low bits."""
    n, k = weight.shape
    exponents = torch.randint(118, 125, (n, k // 32))
    codes = torch.randint(0, 16, (n, k))
    values = _E2M1[codes % 8] * torch.where(codes < 8, 1.0, -1.0)
    dense = values * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    blocks = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8).view(n, k // 32, 16)
    return dense, {"weight_blocks": blocks, "weight_scales": exponents.to(torch.uint8)}


def _store_int4(weight: Tensor, group: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Eight values + 8 to a word, the first in the low bits."""
    n, k = weight.shape
    scale = (weight.view(n, -1, group).abs().amax(2) / 7).bfloat16()
    wide = scale.float().repeat_interleave(group, 1)
    values = (weight / wide).round().clamp(-8, 7).long()
    words = sum((values[:, i::8] + 8) << 4 * i for i in range(8))
    words = torch.where(words >= 2**31, words - 2**32, words).int()
    tensors = {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
    return values.float() * wide, tensors


def _compressed_int4(group: int) -> dict[str, Any]:
    plain = _compressed("int", "group")
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True}
    of_group = {"weights": {**weights, "group_size": group}, "input_activations": None}
    plain["config_groups"]["group_0"] |= of_group
    return {**plain, "format": "pack-quantized"}


def _compressed(kind: str, strategy: str) -> dict[str, Any]:
    """As llm-compressor writes it."""
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True}
    inputs = {"num_bits": 8, "type": kind, "strategy": "token", "dynamic": True, "symmetric": True}
    if strategy == "block":
        weights["block_structure"] = [BLOCK, BLOCK]
        inputs |= {"strategy": "group", "group_size": BLOCK}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


_BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
_UE8M0 = {**_BLOCKS, "scale_fmt": "ue8m0"}
QUANTIZATION: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "fp16": None,
    "fp8": _compressed("float", "channel"),
    "fp8_tensor": _compressed("float", "tensor"),
    "int8": _compressed("int", "channel"),
    "fp8_block": _BLOCKS,
    "fp8_block_ue8m0": _UE8M0,
    "fp8_block_e8m0": _UE8M0,
    "fp8_block_compressed": _compressed("float", "block"),
    "mxfp4": {"quant_method": "mxfp4"},
    "int4_g32": _compressed_int4(32),
    "int4_g128": _compressed_int4(128),
}
