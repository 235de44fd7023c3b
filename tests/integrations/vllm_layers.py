"""Layers of experts inside vLLM, on the CPU and on a GPU: weights, its configs, its kernels.

Call `prepare` before anything of vLLM is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.operands import FP8_BLOCK, QUANTS

ALL_QUANTS = (None, "int8", "fp8", FP8_BLOCK)


def prepare(device: str) -> None:
    """Lets vLLM be imported where its attention's compiled parts are not; on a CPU, for a CPU."""
    found = importlib.util.find_spec("vllm")
    folders = [Path(folder) for folder in (found and found.submodule_search_locations) or ()]
    if not any(list(folder.glob("vllm_flash_attn/_vllm_fa*.so")) for folder in folders):
        absent = ModuleType("vllm.vllm_flash_attn")
        absent.__path__ = []
        absent.__getattr__ = _nothing  # type: ignore[method-assign]
        sys.modules.setdefault(absent.__name__, absent)
    if device == "cpu":
        import vllm.platforms
        from vllm.platforms.cpu import CpuPlatform

        vllm.platforms._current_platform = CpuPlatform()


def _nothing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *_, **__: None


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer and what vLLM is told about it; local: the experts of this rank."""

    quant: str | None
    experts: int = 8
    top_k: int = 2
    hidden: int = 256
    inter: int = 128
    device: str = "cpu"
    activation: str = "silu"
    bias: bool = False
    local: int | None = None
    numbers: tuple[tuple[str, float], ...] = ()  # swiglu_limit, swiglu_alpha, swiglu_beta

    @property
    def held(self) -> int:
        return self.local or self.experts

    @property
    def gated(self) -> bool:
        return not self.activation.endswith("_no_mul")

    def config(self, **changes: Any) -> Any:
        """vLLM's FusedMoEConfig."""
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation
        from vllm.model_executor.layers.fused_moe.config import (
            FusedMoEConfig,
            FusedMoEParallelConfig,
            RoutingMethodType,
        )

        given = {
            "num_experts": self.experts,
            "experts_per_token": self.top_k,
            "hidden_dim": self.hidden,
            "intermediate_size": self.inter,
            "num_local_experts": self.held,
            "num_logical_experts": self.experts,
            "activation": MoEActivation(self.activation),
            "device": self.device,
            "routing_method": RoutingMethodType.TopK,
            "moe_parallel_config": FusedMoEParallelConfig.make_no_parallel(),
            "in_dtype": torch.bfloat16,
            "has_bias": self.bias,
            **dict(self.numbers),
        }
        return FusedMoEConfig(**{**given, **changes})

    def weights(self, seed: int = 0) -> dict[str, Tensor | None]:
        """By their names in `fused_moe`."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def random(*shape: int, std: float = 1.0) -> Tensor:
            values = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
            return values.normal_(std=std, generator=generator)

        found: dict[str, Tensor | None] = {}
        columns = 2 * self.inter if self.gated else self.inter
        for name, n, k in (("w13", columns, self.hidden), ("w2", self.hidden, self.inter)):
            weight, scale = random(self.held, n, k, std=1.5 * k**-0.5), None
            if self.quant == FP8_BLOCK:
                weight, scale = cm.quantize_per_block(weight, gated=name == "w13" and self.gated)
            elif self.quant:
                weight, scale = cm.quantize_per_channel(weight, QUANTS[self.quant])
            found |= {name: weight, f"{name}_scale": scale}
            found[f"{name}_bias"] = random(self.held, n) if self.bias else None
        return found

    def calls(self, tokens: int, seed: int = 0) -> dict[str, Tensor]:
        """hidden, topk_weights and topk_ids."""
        generator = torch.Generator(self.device).manual_seed(seed)
        hidden = torch.empty(tokens, self.hidden, dtype=torch.bfloat16, device=self.device)
        scores = torch.rand(tokens, self.experts, device=self.device, generator=generator)
        weights, ids = scores.topk(self.top_k)
        return {
            "hidden": hidden.normal_(generator=generator),
            "topk_weights": weights / weights.sum(1, keepdim=True),
            "topk_ids": ids.int(),
        }


@cache
def expert_map_of(layer: Layer) -> Tensor | None:
    """Every second expert is on this rank, where it has half of them."""
    if layer.local is None:
        return None
    ids = torch.full((layer.experts,), -1, dtype=torch.int32)
    ids[:: layer.experts // layer.local] = torch.arange(layer.local, dtype=torch.int32)
    return ids.to(layer.device)


def select(layer: Layer, **changes: Any) -> tuple[Any, type]:
    """The backend and the class of experts that vLLM chooses."""
    from vllm.model_executor.layers.fused_moe.oracle import fp8, int8, unquantized
    from vllm.model_executor.layers.quantization.utils import quant_utils as keys

    config = layer.config(**changes)
    if layer.quant is None:
        return unquantized.select_unquantized_moe_backend(config)
    if layer.quant == "int8":
        return int8.select_int8_moe_backend(config)
    scheme = (keys.kFp8StaticChannelSym, keys.kFp8DynamicTokenSym)
    if layer.quant == FP8_BLOCK:
        scheme = (keys.kFp8Static128BlockSym, keys.kFp8Dynamic128Sym)
    return fp8.select_fp8_moe_backend(config, *scheme, allow_vllm_cutlass=layer.quant == "fp8")


def quant_config(layer: Layer, weights: dict[str, Any]) -> Any:
    """vLLM's FusedMoEQuantConfig."""
    from vllm.model_executor.layers.fused_moe import config

    scales = {"w1_scale": weights["w13_scale"], "w2_scale": weights["w2_scale"]}
    biases = {"w1_bias": weights["w13_bias"], "w2_bias": weights["w2_bias"]}
    if layer.quant is None:
        return (
            config.biased_moe_quant_config(**biases)
            if layer.bias
            else (config.FUSED_MOE_UNQUANTIZED_CONFIG)
        )
    if layer.quant == FP8_BLOCK:
        return config.fp8_w8a8_moe_quant_config(**scales, **biases, block_shape=[128, 128])
    scales = {name: scale[..., None] for name, scale in scales.items()}
    given = {**scales, **biases, "per_act_token_quant": True}
    if layer.quant == "int8":
        return config.int8_w8a8_moe_quant_config(**given, a1_scale=None, a2_scale=None)
    return config.fp8_w8a8_moe_quant_config(**given, per_out_ch_quant=True)


def make_kernel(layer: Layer, weights: dict[str, Any], backend: Any, experts: type) -> Any:
    """vLLM's FusedMoEKernel around a class of experts."""
    from vllm.model_executor.layers.fused_moe.oracle import fp8, int8, unquantized

    quant, moe = quant_config(layer, weights), layer.config()
    if layer.quant is None:
        return unquantized.make_unquantized_moe_kernel(quant, moe, backend, experts)
    if layer.quant == "int8":
        return int8.make_int8_moe_kernel(backend, quant, moe, experts)
    return fp8.make_fp8_moe_kernel(quant, moe, experts, backend)


def load_packed(layer: Layer, quant: str, weights: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """vLLM's kernel of experts in 4 bits, from what a checkpoint has, and the weights it holds.

    Of MXFP4 as in gpt-oss, which is the only one that ours take.
    """
    of_quant = _load_mxfp4 if quant == "mxfp4" else _load_int4
    loaded = {
        name: cm.unpack_weights(cm.quantize_packed(weights[name], quant)) for name in ("w13", "w2")
    }
    kernel, module = of_quant(layer, loaded, weights)
    return kernel, {**weights, "w13": module.w13_weight.data, "w2": module.w2_weight.data}


def _load_int4(layer: Layer, loaded: dict[str, Any], weights: dict[str, Any]) -> tuple[Any, Any]:
    from compressed_tensors.quantization import QuantizationArgs
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as wna16,
    )

    group = layer.hidden // loaded["w13"][1].shape[2]
    how = QuantizationArgs(num_bits=4, strategy="group", group_size=group, symmetric=True)
    method = wna16.CompressedTensorsWNA16MoEMethod(how, None, layer.config())
    module = Held(layer.inter)
    with torch.device(layer.device):
        method.create_weights(module, layer.held, layer.hidden, layer.inter, torch.bfloat16)
    for name, (values, scale) in loaded.items():
        getattr(module, f"{name}_weight_packed").data.copy_(values)
        getattr(module, f"{name}_weight_scale").data.copy_(scale)
    method.process_weights_after_loading(module)
    return method.moe_kernel, module


def _load_mxfp4(layer: Layer, loaded: dict[str, Any], weights: dict[str, Any]) -> tuple[Any, Any]:
    from vllm.model_executor.layers.fused_moe.oracle import mxfp4

    module, moe = Held(layer.inter), layer.config()
    with patch.object(mxfp4, "_user_moe_activation_override", lambda: None):  # asks for a model
        backend, experts = mxfp4.select_mxfp4_moe_backend(moe)
    for name, (values, scale) in loaded.items():
        for end, tensor in (("", values.flatten(2)), ("_scale", scale)):
            held = torch.nn.Parameter(tensor, requires_grad=False)
            module.register_parameter(f"{name}_weight{end}", held)
    given = {"w1_bias": weights["w13_bias"], "w2_bias": weights["w2_bias"], "swiglu_limit": 7.0}
    given |= {"w1_scale": module.w13_weight_scale, "w2_scale": module.w2_weight_scale}
    quant = mxfp4.make_mxfp4_moe_quant_config(backend, **given, gemm1_alpha=1.702, gemm1_beta=1.0)
    kernel = mxfp4.make_mxfp4_moe_kernel(quant, moe, experts, backend)
    kernel.fused_experts.process_weights_after_loading(module)
    return kernel, module


class Held(torch.nn.Module):
    """What a method of vLLM gets its weights from."""

    def __init__(self, inter: int):
        super().__init__()
        self.intermediate_size_per_partition = inter

    def _expert_routing_tables(self) -> None:
        return None


def run(
    kernel: Any,
    layer: Layer,
    weights: dict[str, Any],
    call: dict[str, Tensor],
    weight_on_input: bool = False,
) -> Tensor:
    """The output of vLLM's kernel."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    return kernel.apply(
        call["hidden"],
        weights["w13"],
        weights["w2"],
        topk_ids=call["topk_ids"],
        topk_weights=call["topk_weights"],
        activation=MoEActivation(layer.activation),
        global_num_experts=layer.experts,
        expert_map=expert_map_of(layer),
        apply_router_weight_on_input=weight_on_input,
    )


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-9))
