"""SGLang's runner with our experts, on the CPU: their torch path."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("sglang", reason="needs SGLang")
import cutlass_moe as cm
from cutlass_moe.integrations import plugins, serving
from cutlass_moe.integrations.experts import FP8_BLOCK, QUANTS, ActivationArguments
from tests.support.checkpoints import QUANTIZATION

ours: Any = import_module("cutlass_moe.integrations.sglang")
StandardTopKOutput = import_module("sglang.srt.layers.moe.topk").StandardTopKOutput
BACKENDS = import_module("sglang.srt.layers.moe.utils").MoeRunnerBackend
E, TOP_K, HIDDEN, INTER, T = 8, 2, 256, 128, 21
ALL_QUANTS = (None, "int8", "fp8", FP8_BLOCK)
quants = pytest.mark.parametrize("quant", ALL_QUANTS)
SWIGLU = ActivationArguments("swiglu")
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # info, config, reason
    "activation": (
        {},
        {"activation": "situ"},
        "one of silu, gelu, gelu_tanh with a gate, got situ",
    ),
    "step": ({}, {"gemm1_clamp_limit": 7.0}, "a clamp must come before the activation"),
    "beta": (
        {},
        {"gemm1_alpha": 1.7, "gemm1_clamp_limit": 7.0, "gemm1_beta": 0.5},
        "beta 1, got alpha 1.7, limit 7.0, beta 0.5",
    ),
    "limit": ({}, {"activation": "gelu", "swiglu_limit": 7.0}, "gelu must have no limits"),
    "rows": ({}, {"no_combine": True}, "rows must be summed, got no_combine"),
    "weights": ({}, {"apply_router_weight_on_input": True}, "need one expert per token, got 2"),
    "static": ({"a13_scale": torch.ones(1)}, {}, "scales of their own, got static ones"),
    "blocks": ({"block_shape": [64, 64]}, {}, "in blocks of 128 x 128, got blocks [64, 64]"),
    "tensor": ({"per_channel_quant": False}, {}, "per channel and token"),
    "one scale": (
        {"w13_scale": torch.ones(E, 1, 1), "w2_scale": torch.ones(E, 1, 1)},
        {},
        "of FP8 in blocks of 128 x 128, got blocks [] and scales [8, 1, 1]",
    ),
    "16 bits": ({"use_int8_w8a16": True}, {}, "16-bit, FP8 or INT8, got ['use_int8_w8a16']"),
}


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls on the CPU are taken, outside a server."""
    monkeypatch.setattr(ours, "DEVICES", ("cpu",))
    off = SimpleNamespace(moe=SimpleNamespace(enable_fused_moe_sum_all_reduce=False))
    monkeypatch.setattr(ours, "get_exec", lambda: off)
    monkeypatch.setattr(ours, "get_parallel", lambda: SimpleNamespace(tp_group=None))
    monkeypatch.setattr(ours, "use_symmetric_memory", lambda *_, **__: nullcontext())
    serving._known.clear()
    serving.refuse.cache_clear()
    plugins.sglang()
    ours.HookRegistry.apply_hooks()
    yield


def info_of(quant: str | None, seed: int = 0, **others: Any) -> Any:
    """SGLang's TritonMoeQuantInfo."""
    torch.manual_seed(seed)
    found: dict[str, Any] = {}
    for name, n, k in (("w13", 2 * INTER, HIDDEN), ("w2", HIDDEN, INTER)):
        weight = (torch.randn(E, n, k) * 1.5 * k**-0.5).bfloat16()
        if quant == FP8_BLOCK:
            weight, found[f"{name}_scale"] = cm.quantize_per_block(weight, gated=name == "w13")
        elif quant:
            weight, scale = cm.quantize_per_channel(weight, QUANTS[quant])
            found[f"{name}_scale"] = scale[..., None]
        found[f"{name}_weight"] = weight
    if quant:
        found["use_int8_w8a8" if quant == "int8" else "use_fp8_w8a8"] = True
        found["per_channel_quant"] = quant != FP8_BLOCK
    if quant == FP8_BLOCK:
        found["block_shape"] = [128, 128]
    return ours.TritonMoeQuantInfo(**{**found, **others})


def config_of(**others: Any) -> Any:
    sizes = {"hidden_size": HIDDEN, "intermediate_size_per_partition": INTER, "top_k": TOP_K}
    plain = {"num_experts": E, "num_local_experts": E, "inplace": False, **sizes}
    return ours.MoeRunnerConfig(**{**plain, **others})


def dispatched(top_k: int = TOP_K, **others: Any) -> Any:
    torch.manual_seed(1)
    ids = torch.rand(T, E).topk(top_k).indices.int()
    ids[0, 0] = -1  # of another rank
    topk = StandardTopKOutput(torch.rand(T, top_k), ids, None)
    hidden = torch.randn(T, HIDDEN).bfloat16()
    return ours.StandardDispatchOutput(hidden, None, topk, **others)


def right(info: Any, quant: str | None, dispatch: Any, **options: Any) -> Tensor:
    """The reference of `fused_moe`, in float64."""
    return cm.fused_moe_reference(
        dispatch.hidden_states,
        info.w13_weight,
        info.w2_weight,
        dispatch.topk_output.topk_weights,
        dispatch.topk_output.topk_ids,
        quant=quant,
        w13_scale=info.w13_scale,
        w2_scale=info.w2_scale,
        w13_bias=info.b13,
        w2_bias=info.b2,
        compute_dtype=torch.float64,
        **options,
    )


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def through(backend: Any, info: Any, config: Any, dispatch: Any) -> Tensor:
    return ours.MoeRunner(backend, config).run(dispatch, info).hidden_states


@quants
def test_core_and_hooked_runner_agree(quant: str | None) -> None:
    info, dispatch = info_of(quant), dispatched()
    core = through(ours.resolve_moe_runner_backend("cutlass_moe"), info, config_of(), dispatch)
    hooked = through(BACKENDS.TRITON, info, config_of(), dispatch)
    assert torch.equal(core, hooked) and core.dtype == torch.bfloat16
    assert relative(hooked, right(info, quant, dispatch)) <= 2e-2


def test_entry_point_twice_is_once() -> None:
    hooks = ours.HookRegistry._hooks
    before = {target: len(found) for target, found in hooks.items()}
    plugins.sglang()
    assert {target: len(found) for target, found in hooks.items()} == before
    assert len(before) == 2
    assert ours.MOE_RUNNER_BACKEND_CHOICES.count("cutlass_moe") == 1


def test_the_sum_is_scaled() -> None:
    info, dispatch = info_of("int8"), dispatched()
    out = through(BACKENDS.TRITON, info, config_of(routed_scaling_factor=2.5), dispatch)
    assert relative(out, 2.5 * right(info, "int8", dispatch)) <= 1e-2


def test_in_place() -> None:
    info, dispatch = info_of("fp8"), dispatched()
    want = right(info, "fp8", dispatch)
    out = through(BACKENDS.TRITON, info, config_of(inplace=True), dispatch)
    assert out.data_ptr() == dispatch.hidden_states.data_ptr() and relative(out, want) <= 2e-2


def test_weights_on_the_input() -> None:
    info, dispatch = info_of("int8"), dispatched(top_k=1)
    out = through(BACKENDS.TRITON, info, config_of(apply_router_weight_on_input=True), dispatch)
    assert relative(out, right(info, "int8", dispatch, weight_on_input=True)) <= 1e-2


def test_biases() -> None:
    biases = {"b13": torch.randn(E, 2 * INTER).bfloat16(), "b2": torch.randn(E, HIDDEN).bfloat16()}
    info, dispatch = info_of("int8", **biases), dispatched()
    out = through(BACKENDS.TRITON, info, config_of(), dispatch)
    assert relative(out, right(info, "int8", dispatch)) <= 1e-2


@pytest.mark.parametrize(
    ("config", "activation", "interleaved"),
    [
        ({}, SWIGLU, False),
        ({"activation": "gelu"}, ActivationArguments("geglu"), False),
        ({"activation": "relu2", "is_gated": False}, ActivationArguments("relu2"), False),
        ({"swiglu_limit": 10.0}, SWIGLU._replace(limit=10.0), False),
        (
            {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0},
            ActivationArguments("swiglu", 7.0, 1.702, 1.0),
            True,
        ),
        (
            {"gemm1_alpha": 1.5, "gemm1_clamp_limit": 7.0, "gate_up_interleaved": False},
            ActivationArguments("swiglu", 7.0, 1.5, 1.0),
            False,
        ),
    ],
)
def test_activations(config: Any, activation: ActivationArguments, interleaved: bool) -> None:
    assert ours.activation_of(config_of(**config)) == (activation, interleaved)
    experts = ours.describe(dispatched(), info_of(None), config_of(**config))
    assert serving.why_not(experts, "SGLang", -1) is None


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_words_and_left_to_sglang(
    case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    info, config, reason = REFUSED[case]
    given, mine = replace(info_of("int8"), **info), config_of(**config)
    called = []
    runner = ours.MoeRunner(BACKENDS.TRITON, mine)
    monkeypatch.setattr(runner, "fused_func", lambda *arguments: called.append(arguments))
    dispatch = dispatched()
    with caplog.at_level(logging.INFO, "cutlass_moe"):
        assert runner.run(dispatch, given) is None  # what their function returned
    assert called == [(dispatch, given, mine)] and reason in caplog.text


def test_other_devices_forms_and_lora_are_left_to_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = dispatched(hidden_states_pre_quant=(torch.ones(1), torch.ones(1)))
    with pytest.raises(serving.Unsupported, match="must not be quantised yet"):
        ours.describe(scaled, info_of(None), config_of())
    monkeypatch.setattr(ours, "DEVICES", ("cuda",))
    with pytest.raises(serving.Unsupported, match="must be on cuda, got cpu"):
        ours.describe(dispatched(), info_of(None), config_of())
    with pytest.raises(serving.Unsupported, match="must be those of Triton's runner, got Other"):
        ours.quant_of(type("Other", (), {})())
    core = ours.CutlassMoeRunnerCore(config_of())
    with pytest.raises(NotImplementedError, match="LoRA needs"):
        core.run_from_dispatch(dispatched(), info_of(None), config_of(), hooks=object())


# compressed-tensors


def scheme_of(quantization: dict[str, Any]) -> Any:
    config = ours.CompressedTensorsConfig.from_config(quantization)
    layer = type("FusedMoE", (torch.nn.Module,), {})()  # which it knows by its class's name
    return config.get_moe_scheme(layer, "model.layers.0.mlp.experts")


def test_int8_checkpoints_of_compressed_tensors() -> None:
    """Their experts have the weights of SGLang's W8A8 INT8 method, and run on our kernels."""
    scheme = scheme_of(dict(QUANTIZATION["int8"] or {}))
    assert isinstance(scheme, ours.CutlassMoeInt8Scheme)
    layer = torch.nn.Module()
    scheme.create_weights(layer, E, HIDDEN, INTER, torch.bfloat16, weight_loader=None)
    info = info_of("int8")
    for name in ("w13", "w2"):
        getattr(layer, f"{name}_weight").data.copy_(getattr(info, f"{name}_weight"))
        getattr(layer, f"{name}_weight_scale").data.copy_(getattr(info, f"{name}_scale"))
    scheme.process_weights_after_loading(layer)
    scheme.create_moe_runner(layer, config_of())
    assert scheme.get_moe_runner_backend(layer) == BACKENDS.TRITON
    dispatch = dispatched()
    out = scheme.apply_weights(layer, dispatch).hidden_states
    assert relative(out, right(info, "int8", dispatch)) <= 1e-2


@pytest.mark.parametrize("strategy", ["tensor", "group"])
def test_other_int8_checkpoints_stay_refused(strategy: str) -> None:
    quantization = dict(QUANTIZATION["int8"] or {})
    group = quantization["config_groups"]["group_0"]
    weights = {**group["weights"], "strategy": strategy}
    if strategy == "group":
        weights |= {"group_size": 128}
    quantization["config_groups"] = {"group_0": {**group, "weights": weights}}
    with pytest.raises((NotImplementedError, RuntimeError)):
        scheme_of(quantization)
