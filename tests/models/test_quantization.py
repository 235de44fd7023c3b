"""quantization_config of published checkpoints: the dtype it asks for, or what no kernel has."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cutlass_moe.models.files import read_model
from cutlass_moe.models.quantization import read_quantization
from tests.models.test_families import CONFIGS

FP8_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"} | {
    "weight_block_size": [128, 128]
}


def compressed(
    bits: int = 8,
    kind: str = "float",
    strategy: str = "channel",
    inputs: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """As llm-compressor writes it. inputs: changes of input_activations, {} for none of them."""
    dynamic = {"num_bits": bits, "type": kind, "strategy": "token", "dynamic": True}
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **changes}
    activations = dynamic if inputs is None else {**dynamic, **inputs} if inputs else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    ignored = ["lm_head", "re:.*mlp.gate$", "model.layers.1.mlp.shared_experts.up_proj"]
    groups = {"group_0": group}
    return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ignored}


def compressed_blocks(rows: int = 128, **inputs: Any) -> dict[str, Any]:
    inputs = {"strategy": "group", "group_size": 128, **inputs}
    return compressed(strategy="block", inputs=inputs, block_structure=[rows, 128])


SEVERAL = compressed()
SEVERAL["config_groups"] = {
    **SEVERAL["config_groups"],
    "group_1": compressed(kind="int")["config_groups"]["group_0"],
}


@pytest.mark.parametrize(
    ("plain", "dtype"),
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "fp8"),
        ({"quant_method": "w8a8_int8"}, "int8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "fp8"),
        (FP8_BLOCKS, "fp8_block"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        (compressed(4, "int", "group", inputs={}, group_size=32), "int4_g32"),
        (compressed(4, "int", "group", inputs={}, group_size=128), "int4_g128"),
        (compressed(), "fp8"),
        (compressed(strategy="tensor"), "fp8"),
        (compressed(kind="int"), "int8"),
        (compressed_blocks(), "fp8_block"),
        ({**FP8_BLOCKS, "scale_fmt": "ue8m0"}, "fp8_block"),
        ({**FP8_BLOCKS, "modules_to_not_convert": ["lm_head", "layers.3.mlp.experts"]}, "bf16"),
        ({**compressed(), "ignore": ["re:.*mlp.experts.*"]}, "bf16"),
    ],
)
def test_what_kernels_have(plain: dict[str, Any], dtype: str) -> None:
    assert read_quantization(plain) == (dtype, None)


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        ({**FP8_BLOCKS, "weight_block_size": [1, 128]}, "fp8 with a scale a block of 1 x 128"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "static scales of activations"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "4-bit weights (awq)"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "(gptq)"),
        ({"quant_method": "auto-round", "bits": 4}, "4-bit weights (auto-round)"),
        ({"group_size": 64, "bits": 4, "mode": "affine"}, "4-bit weights (of no named method)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt's NVFP4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "modelopt's FP8"),
        ({"quant_method": "quark"}, "quant_method 'quark'"),
        ({**FP8_BLOCKS, "expert_dtype": "fp4"}, "experts of fp4"),
        (compressed(4, "int", "group"), "4-bit int weights with a scale a group"),
        (compressed(4, "float", "tensor_group"), "4-bit float weights"),
        (compressed(strategy="block"), "8-bit float weights with a scale a block of None"),
        (compressed_blocks(64), "8-bit float weights with a scale a block of 64 x 128"),
        (compressed_blocks(strategy="token"), "activations with a dynamic scale a token"),
        (compressed_blocks(group_size=64), "activations with a dynamic scale a group of 64"),
        (compressed(inputs={}), "and 16-bit activations"),
        (compressed(kind="int", inputs={"type": "float"}), "and 8-bit float activations"),
        (compressed(inputs={"dynamic": False}), "activations with a static scale a token"),
        (compressed(inputs={"strategy": "tensor"}), "activations with a dynamic scale a tensor"),
        (compressed(kind="int", symmetric=False), "not symmetric"),
        (SEVERAL, "several groups of different formats"),
        ({"quant_method": "compressed-tensors"}, "no group"),
        ("<omitted>", "quantization_config '<omitted>'"),
    ],
)
def test_what_no_kernel_has(plain: Any, words: str) -> None:
    found = read_quantization(plain)
    assert found is not None and found.dtype is None
    assert words in str(found.why_not)


def test_none_is_asked_for() -> None:
    assert read_quantization(None) is None


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_where_it_stands(tmp_path, key: str, nested: bool) -> None:
    """In the model, or in the whole of which it is a part."""
    plain = json.loads((CONFIGS / "qwen3-30b.json").read_text())
    asked = {key: compressed(kind="int")}
    file = {"text_config": plain, **asked} if nested else {**plain, **asked}
    (tmp_path / "config.json").write_text(json.dumps(file))
    model = read_model(tmp_path)
    assert (model.dtype, model.notes) == ("int8", ())
