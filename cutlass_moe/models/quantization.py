"""What a config.json says of the weights' quantisation: the dtype that kernels have for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from cutlass_moe.operands import PACKINGS

# quant_method -> dtype, of methods that always have a scale a channel and one a token; and mxfp4.
_PLAIN = {
    "mxfp4": "mxfp4",
    "fbgemm_fp8": "fp8",
    "w8a8_fp8": "fp8",
    "ptpc_fp8": "fp8",
    "w8a8_int8": "int8",
}
_FOUR_BITS = {
    "awq": "4-bit weights (awq)",
    "gptq": "weights of few bits (gptq)",
    "bitsandbytes": "weights in bitsandbytes' formats",
}


class Quantization(NamedTuple):
    """dtype: "fp8", "fp8_block", "int8", "bf16", "mxfp4", "int4_g32", "int4_g128", or None where no
    kernel has what is asked for; why_not: that, in words."""

    dtype: str | None
    why_not: str | None = None


def read_quantization(plain: Any) -> Quantization | None:
    """Of the object quantization_config; None where there is none.

    fp8 and int8 are those with a float32 scale a channel, or one an expert, and one a token that is
    taken from the activations as they come; fp8_block has one a block of 128 x 128, and one for
    each 128 values of a token. All else is named in why_not.
    """
    if plain is None:
        return None
    if not isinstance(plain, dict):
        return Quantization(None, f"quantization_config {plain!r}")
    method = str(plain.get("quant_method") or plain.get("quant_algo") or "").lower()
    if plain.get("expert_dtype") not in (None, "fp8"):
        return Quantization(None, f"experts of {plain['expert_dtype']}")
    if _spared(plain):
        return Quantization("bf16")
    if method in _PLAIN:
        return Quantization(_PLAIN[method])
    if method == "fp8":
        return _fp8(plain)
    if method == "compressed-tensors":
        return _compressed(plain)
    if method == "modelopt" or "quant_algo" in plain:
        algorithm = str(plain.get("quant_algo")).upper()
        if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
            return Quantization("fp8")
        return Quantization(None, f"modelopt's {algorithm}")
    words = _FOUR_BITS.get(method)
    if words is None and "bits" in plain:
        words = f"{plain['bits']}-bit weights ({method or 'of no named method'})"
    return Quantization(None, words or f"quant_method {method!r}")


def block_size(plain: dict[str, Any]) -> Sequence[int] | None:
    """The rows and columns of a weight that share a scale, in either of two formats."""
    groups = (plain.get("config_groups") or {}).values()
    structures = ((group.get("weights") or {}).get("block_structure") for group in groups)
    return plain.get("weight_block_size") or next(filter(None, structures), None)


def _fp8(plain: dict[str, Any]) -> Quantization:
    block = plain.get("weight_block_size")
    scheme = plain.get("activation_scheme", "dynamic")
    if scheme != "dynamic":
        return Quantization(None, f"fp8 with {scheme} scales of activations")
    if block == [128, 128]:
        return Quantization("fp8_block")
    if block is not None:
        shape = " x ".join(map(str, block)) if isinstance(block, list) else block
        return Quantization(None, f"fp8 with a scale a block of {shape}")
    return Quantization("fp8")


def _compressed(plain: dict[str, Any]) -> Quantization:
    groups = plain.get("config_groups") or {}
    found = {_group(group) for group in groups.values() if isinstance(group, dict)}
    if len(found) == 1:
        return found.pop()
    reason = "no group" if not found else "several groups of different formats"
    return Quantization(None, f"compressed-tensors with {reason}")


def _group(group: dict[str, Any]) -> Quantization:
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    bits, kind = weights.get("num_bits"), weights.get("type")
    strategy = weights.get("strategy")
    name = f"{bits}-bit {kind} weights with a scale a {strategy}"
    packed = f"int4_g{weights.get('group_size')}"
    plain = weights.get("symmetric", True) and not inputs and not weights.get("actorder")
    blocks = weights.get("block_structure")
    if strategy == "block":
        shape = " x ".join(map(str, blocks)) if isinstance(blocks, list) else blocks
        name += f" of {shape}"
    if (bits, kind, strategy) == (4, "int", "group") and packed in PACKINGS and plain:
        return Quantization(packed)
    in_blocks = kind == "float" and strategy == "block" and blocks == [128, 128]
    known = in_blocks or (kind in ("float", "int") and strategy in ("channel", "tensor"))
    if bits != 8 or not known:
        return Quantization(None, f"compressed-tensors' {name}")
    if not inputs:
        return Quantization(None, f"compressed-tensors' {name} and 16-bit activations")
    if (inputs.get("num_bits"), inputs.get("type")) != (bits, kind):
        other = f"{inputs.get('num_bits')}-bit {inputs.get('type')}"
        return Quantization(None, f"compressed-tensors' {name} and {other} activations")
    needed = ("group", 128) if in_blocks else ("token", None)
    if not inputs.get("dynamic") or (inputs.get("strategy"), inputs.get("group_size")) != needed:
        scale = f"a {'dynamic' if inputs.get('dynamic') else 'static'} scale"
        size = f" of {inputs['group_size']}" if inputs.get("group_size") else ""
        return Quantization(
            None, f"compressed-tensors' {name} and activations with {scale} a "
            f"{inputs.get('strategy')}{size}"
        )  # fmt: skip
    if not (weights.get("symmetric", True) and inputs.get("symmetric", True)):
        return Quantization(None, f"compressed-tensors' {name}, not symmetric")
    if in_blocks:
        return Quantization("fp8_block")
    return Quantization("fp8" if kind == "float" else "int8")


def _spared(plain: dict[str, Any]) -> bool:
    """Whether the routed experts are among what is not quantised."""
    names = ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules")
    listed = [one for name in names for one in plain.get(name) or []]
    return any(str(one).rstrip(".*$").endswith(("mlp.experts", "mixer.experts")) for one in listed)
