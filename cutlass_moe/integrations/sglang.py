"""SGLang: experts of its Triton runner run on our kernels where there are some.

SGLang's quantisation methods name their runner themselves, most of them Triton's. So its
`MoeRunner.run` is hooked: a call of the Triton runner that our kernels serve goes to them, any
other one goes on as before. The runner core `cutlass_moe` is there for methods that take the runner
that `--moe-runner-backend` names. INT8 checkpoints of compressed-tensors, which SGLang refuses on
CUDA, are opened: their experts get the weights of SGLang's own W8A8 INT8 method.

README.md in this folder says what is supported and how to see it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationStrategy
from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES, add_moe_runner_backend_choices
from sglang.srt.distributed.device_communicators.pynccl_allocator import use_symmetric_memory
from sglang.srt.layers.dp_attention import is_allocation_symmetric
from sglang.srt.layers.moe.moe_runner import MoeRunner, MoeRunnerConfig
from sglang.srt.layers.moe.moe_runner.base import DispatchMoeRunnerCore
from sglang.srt.layers.moe.moe_runner.runner import register_moe_runner_core
from sglang.srt.layers.moe.moe_runner.triton import (
    TritonMoeQuantInfo,
    fused_experts_none_to_triton,
)
from sglang.srt.layers.moe.token_dispatcher.standard import (
    StandardCombineInput,
    StandardDispatchOutput,
)
from sglang.srt.layers.moe.topk import TopKOutputChecker
from sglang.srt.layers.moe.utils import resolve_moe_runner_backend
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsMoEScheme
from sglang.srt.layers.quantization.w8a8_int8 import W8A8Int8MoEMethod
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_exec, get_parallel
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.integrations import serving
from cutlass_moe.integrations.experts import BLOCK, ActivationArguments
from cutlass_moe.integrations.serving import ServedExperts, Unsupported
from cutlass_moe.models.shapes import FP8_BLOCK

NAME, ENGINE = "cutlass_moe", "SGLang"
GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}
NOT_GATED = {"silu": "silu", "gelu": "gelu", "relu2": "relu2"}
DEVICES = ("cuda",)  # whose calls are taken
_OTHER_FORMATS = ("use_mxfp8", "use_int8_w8a16", "use_int4_w4a16", "fuse_swiglu_interleaved")


class CutlassMoeRunnerCore(DispatchMoeRunnerCore):  # type: ignore[misc]  # it has no types here
    """The runner core `cutlass_moe`; what kernels don't serve goes to SGLang's Triton kernels."""

    @property
    def runner_backend(self) -> Any:
        return resolve_moe_runner_backend(NAME)

    def run_from_dispatch(
        self,
        dispatch_output: StandardDispatchOutput,
        quant_info: TritonMoeQuantInfo,
        runner_config: MoeRunnerConfig,
        hooks: Any = None,
    ) -> StandardCombineInput:
        out = None if hooks else run(dispatch_output, quant_info, runner_config)
        if out is not None:
            return out
        if hooks:
            raise NotImplementedError(f"LoRA needs --moe-runner-backend triton, got {NAME}")
        return fused_experts_none_to_triton(dispatch_output, quant_info, runner_config)


class CutlassMoeInt8Scheme(CompressedTensorsMoEScheme):  # type: ignore[misc]
    """INT8 experts of compressed-tensors, a scale per channel and per token.

    Weights, scales and runner are those of SGLang's W8A8 INT8 method, whose layout is the same.
    """

    def __init__(self) -> None:
        self.method = W8A8Int8MoEMethod(None)

    @classmethod
    def get_min_capability(cls) -> int:
        return 75  # of Triton's INT8 kernels, which take what ours do not

    def create_weights(self, *args: Any, **options: Any) -> None:
        self.method.create_weights(*args, **options)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.method.process_weights_after_loading(layer)

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: MoeRunnerConfig) -> None:
        self.method.create_moe_runner(layer, moe_runner_config)
        self.runner = self.method.runner

    def get_triton_quant_info(self, layer: torch.nn.Module) -> TritonMoeQuantInfo:
        return self.method.get_triton_quant_info(layer)

    def apply_weights(
        self, layer: torch.nn.Module, dispatch_output: StandardDispatchOutput
    ) -> StandardCombineInput:
        return self.runner.run(dispatch_output, self.get_triton_quant_info(layer))


def run(
    dispatch: StandardDispatchOutput, info: TritonMoeQuantInfo, config: MoeRunnerConfig
) -> StandardCombineInput | None:
    """The layer's output [T, H], in place of hidden states where config says so.

    None if no kernel serves the call: then it is the engine's.
    """
    try:
        experts = describe(dispatch, info, config)
    except Unsupported as error:
        serving.refuse(ENGINE, str(error))
        return None
    hidden: Tensor = dispatch.hidden_states
    if serving.why_not(experts, ENGINE, hidden.get_device()) is not None:
        return None
    weights, ids = dispatch.topk_output.topk_weights.float(), dispatch.topk_output.topk_ids
    if config.routed_scaling_factor not in (None, 1.0):
        weights = weights * config.routed_scaling_factor
    out = hidden
    if not config.inplace:
        group, off = get_parallel().tp_group, not is_allocation_symmetric()
        with use_symmetric_memory(group, disabled=off):
            out = torch.empty_like(hidden)
    cm.fused_moe(
        hidden,
        info.w13_weight,
        info.w2_weight,
        weights,
        ids.int(),  # of this rank's experts, or -1
        w13_scale=_scale(info.w13_scale, experts),
        w2_scale=_scale(info.w2_scale, experts),
        w13_bias=info.b13,
        w2_bias=info.b2,
        weight_on_input=config.apply_router_weight_on_input,
        out=out,
        **experts.options,
    )
    return StandardCombineInput(hidden_states=out)


def _scale(scale: Tensor | None, experts: ServedExperts) -> Tensor | None:
    if scale is None or experts.quant in (None, FP8_BLOCK):
        return scale
    return serving.per_channel(scale)


def describe(
    dispatch: StandardDispatchOutput, info: TritonMoeQuantInfo, config: MoeRunnerConfig
) -> ServedExperts:
    """The experts of a call as our kernels see them. Raises Unsupported for what they can't."""
    _refuse_forms(dispatch, config)
    quant = quant_of(info)
    top_k = dispatch.topk_output.topk_ids.shape[1]
    if config.apply_router_weight_on_input and top_k != 1:
        raise Unsupported(f"weights on the input need one expert per token, got {top_k}")
    activation, interleaved = activation_of(config)
    (experts, hidden, inter), bias = info.w2_weight.shape, info.b13
    return ServedExperts(
        num_experts=experts,
        top_k=top_k,
        hidden=hidden,
        inter=inter,
        dtype=dispatch.hidden_states.dtype,
        quant=quant,
        activation=activation,
        interleaved=interleaved,
        bias=None if bias is None else bias.dtype,
    )


def _refuse_forms(dispatch: StandardDispatchOutput, config: MoeRunnerConfig) -> None:
    """Raises Unsupported for calls that hand over, or want back, something else."""
    if not isinstance(dispatch, StandardDispatchOutput):
        raise Unsupported(f"tokens must be in the standard format, got {dispatch.format.value}")
    device = dispatch.hidden_states.device.type
    if device not in DEVICES:
        raise Unsupported(f"hidden states must be on {DEVICES[0]}, got {device}")
    if not TopKOutputChecker.format_is_standard(dispatch.topk_output):
        got = dispatch.topk_output.format.value
        raise Unsupported(f"experts must be chosen in the standard format, got {got}")
    if dispatch.hidden_states_scale is not None or dispatch.hidden_states_pre_quant is not None:
        raise Unsupported("tokens must not be quantised yet")
    if config.no_combine:
        raise Unsupported("a token's rows must be summed, got no_combine")
    if get_exec().moe.enable_fused_moe_sum_all_reduce:
        raise Unsupported("the sum over ranks must be separate, got a fused one")


def activation_of(config: MoeRunnerConfig) -> tuple[ActivationArguments, bool]:
    """The activation, and whether gates and ups are interleaved.

    Raises Unsupported for one that kernels don't have.
    """
    numbers = (config.gemm1_alpha, config.gemm1_clamp_limit, config.swiglu_limit)
    names = GATED if config.is_gated else NOT_GATED
    if config.activation not in names:
        gate = "with" if config.is_gated else "without"
        raise Unsupported(
            f"the activation must be one of {', '.join(names)} {gate} a gate, got "
            f"{config.activation}"
        )
    name = names[config.activation]
    if numbers == (None, None, None):
        return ActivationArguments(name), False
    if name != "swiglu":
        raise Unsupported(f"{config.activation} must have no limits, got {numbers}")
    alpha, limit, deepseek = numbers
    if alpha is None and limit is None:
        return ActivationArguments(name, deepseek), False
    if alpha is None or limit is None or config.gemm1_beta not in (None, 1.0):
        raise Unsupported(
            "a clamp must come before the activation, with alpha, a limit and beta 1, "
            f"got alpha {alpha}, limit {limit}, beta {config.gemm1_beta}"
        )
    return ActivationArguments(name, limit, alpha, 1.0), config.gate_up_interleaved


def quant_of(info: TritonMoeQuantInfo) -> str | None:
    """How weights and tokens are quantised. Raises Unsupported for ways that kernels don't have."""
    if type(info) is not TritonMoeQuantInfo:
        raise Unsupported(f"weights must be those of Triton's runner, got {type(info).__name__}")
    other = [name for name in _OTHER_FORMATS if getattr(info, name)]
    if other:
        raise Unsupported(f"weights must be 16-bit, FP8 or INT8, got {other}")
    if info.a13_scale is not None or info.a2_scale is not None:
        raise Unsupported("tokens must be quantised by scales of their own, got static ones")
    if not info.use_fp8_w8a8 and not info.use_int8_w8a8:
        return None
    blocks = list(info.block_shape or ())
    if info.use_fp8_w8a8 and blocks == [BLOCK, BLOCK]:
        return FP8_BLOCK
    pairs = ((info.w13_scale, info.w13_weight), (info.w2_scale, info.w2_weight))
    per_channel = all(scale.shape[1:2] == weight.shape[1:2] for scale, weight in pairs)
    if not blocks and info.per_channel_quant and per_channel:
        return "fp8" if info.use_fp8_w8a8 else "int8"
    raise Unsupported(
        f"scales must be per channel and token, or of FP8 in blocks of {BLOCK} x {BLOCK}, got "
        f"blocks {blocks} and scales {list(info.w13_scale.shape)}"
    )


def _run(
    original: Callable[..., Any],
    self: MoeRunner,
    dispatch_output: Any,
    quant_info: Any,
    lora_info: Any = None,
) -> Any:
    """Around `MoeRunner.run`."""
    if self.runner_backend.is_triton() and not self.lora_enabled:
        out = run(dispatch_output, quant_info, self.config)
        if out is not None:
            return out
    return original(self, dispatch_output, quant_info, lora_info)


def _moe_scheme(
    original: Callable[..., Any],
    self: CompressedTensorsConfig,
    layer: torch.nn.Module,
    layer_name: str | None = None,
) -> Any:
    """Around `CompressedTensorsConfig.get_moe_scheme`, which refuses INT8 on CUDA."""
    try:
        return original(self, layer, layer_name)
    except NotImplementedError:
        found: Any = self.get_scheme_dict(layer, f"{layer_name}.0.gate_proj") or {}
        weights, tokens = found.get("weights"), found.get("input_activations")
        if not self._is_dynamic_token_w8a8(weights, tokens):
            raise
        if weights.strategy != QuantizationStrategy.CHANNEL:
            raise
        return CutlassMoeInt8Scheme()


@cache
def register() -> None:
    """Registers core and hooks; SGLang applies them when all plug-ins are loaded."""
    register_moe_runner_core(NAME, CutlassMoeRunnerCore)
    if NAME not in MOE_RUNNER_BACKEND_CHOICES:
        add_moe_runner_backend_choices([NAME])
    for target, hook in (
        (MoeRunner.run, _run),
        (CompressedTensorsConfig.get_moe_scheme, _moe_scheme),
    ):
        name = f"{target.__module__}.{target.__qualname__}"
        HookRegistry.register(name, hook, HookType.AROUND)
