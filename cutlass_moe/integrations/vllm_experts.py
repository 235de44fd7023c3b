"""vLLM's experts, run by our kernels: the class, and which layers it supports.

vllm.py puts it into vLLM's choice. README.md in this folder says what is supported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.quantization.utils import quant_utils as keys
from vllm.platforms import current_platform

import cutlass_moe as cm
from cutlass_moe.integrations import serving
from cutlass_moe.integrations.experts import BLOCK, QUANTS, ActivationArguments
from cutlass_moe.integrations.serving import ServedExperts, Unsupported
from cutlass_moe.models.shapes import FP8_BLOCK, PACKINGS

NAME, ENGINE = "cutlass_moe", "vLLM"
Scheme = tuple[keys.QuantKey | None, keys.QuantKey | None]  # of weights, of activations
MXFP4: Scheme = (keys.kMxfp4Static, None)  # bf16 activations
INT8: Scheme = (keys.kInt8StaticChannelSym, keys.kInt8DynamicTokenSym)
SCHEMES: dict[Scheme, str | None] = {
    (None, None): None,
    INT8: "int8",
    MXFP4: "mxfp4",
    (keys.kInt4Static32, None): "int4_g32",
    (keys.kInt4Static, None): "int4_g128",  # any other group, of which `_offer_int4` lets 128 pass
    (keys.kFp8StaticChannelSym, keys.kFp8DynamicTokenSym): "fp8",
    (keys.kFp8Static128BlockSym, keys.kFp8Dynamic128Sym): FP8_BLOCK,
}
PLAIN = {
    MoEActivation.SILU: "swiglu",
    MoEActivation.GELU: "geglu",
    MoEActivation.GELU_TANH: "geglu_tanh",
    MoEActivation.SILU_NO_MUL: "silu",
    MoEActivation.GELU_NO_MUL: "gelu",
    MoEActivation.GELU_TANH_NO_MUL: "gelu_tanh",
    MoEActivation.RELU2_NO_MUL: "relu2",
}
CLAMPED = (MoEActivation.SWIGLUOAI, MoEActivation.SWIGLUOAI_UNINTERLEAVE)


class CutlassMoeExperts(TritonExperts):  # type: ignore[misc]  # vLLM has no types here
    """vLLM's Triton experts, whose work `fused_moe` does.

    Where that turns out to be impossible once weights are loaded, they are Triton experts.
    """

    def __init__(self, moe_config: FusedMoEConfig, quant_config: FusedMoEQuantConfig) -> None:
        super().__init__(moe_config, quant_config)
        numbers, bias = self.activation_config, self.w1_bias
        limits = (numbers.clamp_limit, numbers.alpha, numbers.beta)
        found, _ = _ask(
            lambda: describe(moe_config, quant_of(quant_config), *limits)._replace(
                bias=None if bias is None else bias.dtype
            )
        )
        self.experts = found  # None: all is as in Triton's experts
        self.takes_unquantized = found is not None
        if found is not None:
            scales: Any = (self.w1_scale, self.w2_scale)
            if found.quant in ("int8", "fp8"):
                scales = tuple(map(serving.per_channel, scales))
            if found.quant in PACKINGS:
                scales = (None, None)
            self.options = {
                **found.options,
                **dict(zip(("w13_scale", "w2_scale"), scales, strict=True)),
                "w13_bias": bias,
                "w2_bias": self.w2_bias,
            }

    @staticmethod
    def is_supported_config(
        cls: type[mk.FusedMoEExperts],
        moe_config: FusedMoEConfig,
        weight_key: keys.QuantKey | None,
        activation_key: keys.QuantKey | None,
        activation_format: mk.FusedMoEActivationFormat,
    ) -> tuple[bool, str | None]:
        """Whether our kernels run a layer, else why not; loads them."""
        scheme = (weight_key, activation_key)
        if moe_config.moe_backend not in ("auto", NAME):
            return False, f"--moe-backend is {moe_config.moe_backend}"
        supported, reason = TritonExperts.is_supported_config(
            cls, moe_config, *scheme, activation_format
        )
        if not supported:
            serving.refuse(ENGINE, str(reason))
            return False, reason
        limits = (moe_config.swiglu_limit, moe_config.swiglu_alpha, moe_config.swiglu_beta)
        experts, reason = _ask(lambda: describe(moe_config, SCHEMES[scheme], *limits))
        return experts is not None, reason

    @staticmethod
    def _supports_current_device() -> bool:
        return current_platform.is_cuda()  # `serving.why_not` asks which GPU it is

    @staticmethod
    def _supports_quant_scheme(
        weight_key: keys.QuantKey | None, activation_key: keys.QuantKey | None
    ) -> bool:
        return (weight_key, activation_key) in SCHEMES

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation in PLAIN or activation in CLAMPED

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        return not moe_parallel_config.use_all2all_kernels

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return False  # it is possible, but with few tokens slower than Triton

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Packs 4-bit weights, in the place of those that vLLM loaded and of their scales."""
        if self.experts is None or self.experts.quant not in PACKINGS:
            return super().process_weights_after_loading(layer)
        for name, rows_alternate in (("w13", self.experts.interleaved), ("w2", False)):
            values, scale = (getattr(layer, f"{name}_weight{end}") for end in ("", "_scale"))
            loaded = values.data if self.experts.quant == "mxfp4" else values.data.view(torch.int32)
            packed = cm.pack_weights(loaded, scale.data, interleaved=rows_alternate)
            values.data, scale.data = packed, scale.data.new_empty(0)
        return None

    def moe_problem_size(
        self, a1: Tensor, w1: Tensor, w2: Tensor, topk_ids: Tensor
    ) -> tuple[int, int, int, int, int]:
        """Experts, tokens, rows of w1, hidden size and experts of a token."""
        if w1.dim() == 3:
            return super().moe_problem_size(a1, w1, w2, topk_ids)
        rows = 32 * w1.shape[1]  # which are packed in blocks
        return len(w1), len(a1), rows, a1.shape[-1], topk_ids.shape[1]

    @property
    def is_ours(self) -> bool:
        """Whether a call takes our kernels: not if somebody wants the rows before their sum."""
        return self.experts is not None and self.post_gemm2_hook is None

    @property
    def expects_unquantized_inputs(self) -> bool:
        return self.takes_unquantized or super().expects_unquantized_inputs

    def workspace_shapes(
        self,
        M: int,  # noqa: N803  # vLLM's names, which its calls may use
        N: int,  # noqa: N803
        K: int,  # noqa: N803
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Shapes of two workspaces, in elements of the dtype of hidden states, and the output.

        vLLM asks before each call: here sizes are known that its config does not have, as those of
        a layer whose shared experts are among the others.
        """
        if self.experts is not None:
            inter = self.adjust_N_for_activation(N, activation)
            called = self.experts._replace(
                num_experts=local_num_experts, top_k=topk, hidden=K, inter=inter
            )
            if called != self.experts:
                self.experts, _ = _ask(lambda: called)
        if not self.is_ours:
            common = (topk, global_num_experts, local_num_experts, expert_tokens_meta, activation)
            return super().workspace_shapes(M, N, K, *common)
        assert self.experts is not None
        size = serving.workspace_size(self.experts, M)
        return (0,), (M, -(-size // (M * self.experts.dtype.itemsize))), (M, K)

    def apply(self, **call: Any) -> Any:
        """Writes the layer's output, summed over a token's experts, to `output`.

        vLLM names all arguments: output and hidden_states [T, H], w1 [E, 2I or I, H], w2 [E, H, I],
        topk_weights and topk_ids [T, k], expert_map int32 [experts of all ranks] or None,
        workspace2 as `workspace_shapes` says; a token's weight is in hidden_states already if
        apply_router_weight_on_input.
        """
        if not self.is_ours:
            if call["w1"].dim() > 3:
                raise RuntimeError("cutlass_moe can't run this call, nor Triton packed experts")
            return super().apply(**call)
        weights: Tensor = call["topk_weights"]
        if call["apply_router_weight_on_input"]:
            weights = torch.ones_like(weights)
        cm.fused_moe(
            call["hidden_states"],
            call["w1"],
            call["w2"],
            weights.float(),
            call["topk_ids"].int(),
            expert_map=call["expert_map"],
            out=call["output"],
            workspace=call["workspace2"].view(-1).view(torch.uint8),
            **self.options,
        )
        return None


def _ask(make: Callable[[], ServedExperts]) -> tuple[ServedExperts | None, str | None]:
    """The experts if our kernels run them, else None and the reason."""
    try:
        experts = make()
    except Unsupported as error:
        serving.refuse(ENGINE, str(error))
        return None, str(error)
    device = torch.cuda.current_device() if current_platform.is_cuda() else -1
    reason = serving.why_not(experts, ENGINE, device)
    return (experts, None) if reason is None else (None, reason)


def describe(
    moe_config: FusedMoEConfig,
    quant: str | None,
    limit: float | None,
    alpha: float | None,
    beta: float | None,
) -> ServedExperts:
    """The experts of a layer as our kernels see them. Raises Unsupported for what they can't."""
    if moe_config.is_lora_enabled:
        raise Unsupported("LoRA needs the rows between the products")
    activation = moe_config.activation
    if quant in PACKINGS and moe_config.moe_parallel_config.enable_eplb:
        raise Unsupported("the balancing of experts' load moves weights that must not be packed")
    if quant == "mxfp4" and activation != MoEActivation.SWIGLUOAI:
        raise Unsupported(f"MXFP4 must be gpt-oss's, with swigluoai, got {activation.value}")
    arguments, interleaved = ActivationArguments(PLAIN.get(activation, "swiglu")), False
    if activation == MoEActivation.SILU:
        arguments = arguments._replace(limit=limit)
    elif activation == MoEActivation.SWIGLUOAI_UNINTERLEAVE:
        if limit is None:
            raise Unsupported(f"{activation.value} needs a limit, got None")
        arguments = ActivationArguments("swiglu", limit, alpha, beta)
    elif activation == MoEActivation.SWIGLUOAI:
        if limit not in (None, 7.0):
            raise Unsupported(f"the limit of {activation.value} must be 7, got {limit}")
        arguments, interleaved = ActivationArguments("swiglu_oai"), True
    elif limit is not None:
        raise Unsupported(f"{activation.value} must have no limit, got {limit}")
    return ServedExperts(
        num_experts=moe_config.num_local_experts,
        top_k=moe_config.experts_per_token,
        hidden=moe_config.hidden_dim,
        inter=moe_config.intermediate_size_per_partition,
        dtype=moe_config.in_dtype,
        quant=quant,
        activation=arguments,
        interleaved=interleaved,
        bias=moe_config.in_dtype if moe_config.has_bias else None,
    )


def quant_of(config: FusedMoEQuantConfig) -> str | None:
    """How weights and tokens are quantised. Raises Unsupported for ways that kernels don't have.

    What was selected may differ from it: INT8 that is made at load keeps tokens in 16 bits.
    """
    if config.a1_scale is not None or config.a2_scale is not None:
        raise Unsupported("tokens must be quantised by scales of their own, got static ones")
    dtypes = (config.weight_quant_dtype, config.quant_dtype)
    blocks = list(config.block_shape or ())
    scale, per_token = config.w1_scale, config.per_act_token_quant
    if dtypes == (None, None):
        return None
    if dtypes[0] == "mxfp4":  # what vLLM says of tokens is about kernels that ours replaces
        return "mxfp4"
    if dtypes[0] == "int4" and blocks in ([0, 32], [0, 128]) and config.w1_zp is None:
        return f"int4_g{blocks[1]}"
    per_channel = scale is not None and scale.dim() > 1 and scale.shape[1] > 1
    if dtypes[0] == dtypes[1] and per_channel and per_token and not blocks:
        for quant, dtype in QUANTS.items():
            if dtypes[0] == dtype:
                return quant
    if dtypes == (torch.float8_e4m3fn,) * 2 and blocks == [BLOCK, BLOCK]:
        return FP8_BLOCK
    raise Unsupported(
        f"weights and tokens must be quantised alike, per channel and token or in blocks of {BLOCK}"
        f" x {BLOCK}, got {dtypes[0]} and {dtypes[1]} with blocks {blocks}"
    )
