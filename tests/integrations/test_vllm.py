"""vLLM's own choice and kernel class with our experts, on the CPU: their torch path.

vLLM believes to be on a CPU, our class to be on a GPU.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")
import cutlass_moe as cm
from cutlass_moe.integrations import plugins, serving
from cutlass_moe.integrations.experts import ActivationArguments
from cutlass_moe.operands import PACKINGS
from tests.integrations.vllm_layers import (
    ALL_QUANTS,
    Layer,
    expert_map_of,
    load_packed,
    make_kernel,
    prepare,
    relative,
    run,
    select,
)
from tests.integrations.vllm_models import load_layer, read_layer, write_model

prepare("cpu")  # before anything of vLLM is imported
choice: Any = import_module("cutlass_moe.integrations.vllm")
ours: Any = import_module("cutlass_moe.integrations.vllm_experts")
config: Any = import_module("vllm.config")
fp8, int8, mxfp4, unquantized = choice.fp8, choice.int8, choice.mxfp4, choice.unquantized
wna16, INT4_METHOD = choice.wna16, choice.wna16.CompressedTensorsWNA16MoEMethod
UNQUANTIZED = ours.FusedMoEQuantConfig.make()

ORACLES: tuple[ModuleType, ...] = (fp8, int8, unquantized)
PATCHED = ("_get_priority_backends", "backend_to_kernel_cls")
quants = pytest.mark.parametrize("quant", ALL_QUANTS)
ACTIVATIONS = {
    "silu": {},
    "gelu": {"activation": "geglu"},
    "gelu_tanh": {"activation": "geglu_tanh"},
    "swigluoai": {"activation": "swiglu_oai", "interleaved": True},
}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # layer, vLLM's config, reason
    "lora": ({}, {"is_lora_enabled": True}, "LoRA"),
    "activation": ({"activation": "swiglustep"}, {}, "SWIGLUSTEP activation"),
    "limit": ({"activation": "gelu"}, {"swiglu_limit": 7.0}, "gelu must have no limit, got 7.0"),
    "other limit": ({"activation": "swigluoai"}, {"swiglu_limit": 5.0}, "must be 7, got 5.0"),
    "no limit": ({"activation": "swigluoai_uninterleave"}, {}, "needs a limit, got None"),
    "sizes": ({"inter": 100}, {}, "pad_experts pads the experts' inner size to 112"),
    "asked for": ({}, {"moe_backend": "triton"}, "--moe-backend is triton"),
    "dtype": ({}, {"in_dtype": torch.float32}, "float32"),
}


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Our class thinks that there is a GPU, and is in no choice that a test does not put it in."""
    here = staticmethod(lambda: True)
    monkeypatch.setattr(ours.CutlassMoeExperts, "_supports_current_device", here)
    patched: list[tuple[Any, str]] = [(oracle, name) for oracle in ORACLES for name in PATCHED]
    patched += [(mxfp4, name) for name in ("_get_priority_backends_for_gpt_oss", PATCHED[1])]
    patched += [(wna16, "select_wna16_moe_backend"), (INT4_METHOD, "_setup_kernel")]
    before = {(owner, name): getattr(owner, name) for owner, name in patched}
    choice.register.cache_clear()
    serving.refuse.cache_clear()
    serving._known.clear()
    with config.set_current_vllm_config(config.VllmConfig()):
        yield
    for (owner, name), function in before.items():
        setattr(owner, name, function)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> None:
    """vLLM's groups of ranks, of this process alone."""
    distributed: Any = import_module("vllm.distributed")
    meeting = tmp_path_factory.mktemp("ranks") / "file"
    with config.set_current_vllm_config(config.VllmConfig()):
        distributed.init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        distributed.initialize_model_parallel(1)


# What is chosen


@quants
def test_our_class_is_chosen_and_weights_stay_as_they_are(quant: str | None) -> None:
    choice.register()
    backend, experts = select(Layer(quant))
    assert backend.value == "TRITON" and experts is ours.CutlassMoeExperts


def test_entry_point_and_twice_is_once() -> None:
    plugins.vllm()
    once = [getattr(oracle, name) for oracle in ORACLES for name in PATCHED]
    plugins.vllm()
    assert once == [getattr(oracle, name) for oracle in ORACLES for name in PATCHED]
    assert fp8.backend_to_kernel_cls(fp8.Fp8MoeBackend.TRITON)[0] is ours.CutlassMoeExperts


def test_a_version_with_a_registry_gets_our_class_through_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As the pull request that adds it has it; nothing else is changed."""
    registry, entered = ModuleType("fp8_registry"), list[tuple[str, str]]()
    registry.register_fp8_moe_backend = lambda *entry: entered.append(entry)  # type: ignore
    monkeypatch.setitem(sys.modules, plugins.VLLM_REGISTRY, registry)
    monkeypatch.setattr(plugins, "is_tested", lambda _: False)
    before = [getattr(oracle, name) for oracle in ORACLES for name in PATCHED]
    choice.register()
    assert before == [getattr(oracle, name) for oracle in ORACLES for name in PATCHED]
    ((name, path),) = entered
    module, _, attribute = path.rpartition(".")
    experts = getattr(import_module(module), attribute)
    moe = Layer("int8").config(moe_backend=name)
    arguments = (*ours.INT8, ours.mk.FusedMoEActivationFormat.Standard)
    assert experts.is_supported_config(experts, moe, *arguments) == (True, None)


def test_what_vllm_would_choose_is_not_reordered_where_ours_is_refused() -> None:
    """FP8 per channel is CUTLASS's in vLLM, which comes before Triton."""
    layer = Layer("fp8", activation="swiglustep")
    keys = (ours.keys.kFp8StaticChannelSym, ours.keys.kFp8DynamicTokenSym)
    before = fp8._get_priority_backends(layer.config(), *keys)
    choice.register()
    assert fp8._get_priority_backends(layer.config(), *keys) == before
    first = fp8._get_priority_backends(Layer("fp8").config(), *keys)[0]
    assert first == fp8.Fp8MoeBackend.TRITON != before[0]


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_words(case: str, caplog: pytest.LogCaptureFixture) -> None:
    layer, changes, reason = REFUSED[case]
    moe = Layer("int8", **layer).config(**changes)
    with caplog.at_level(logging.INFO, "cutlass_moe"):
        supported, why = ours.CutlassMoeExperts.is_supported_config(
            ours.CutlassMoeExperts, moe, *ours.INT8, ours.mk.FusedMoEActivationFormat.Standard
        )
    assert not supported and reason in str(why)
    assert bool(caplog.messages) == (case != "asked for")  # what a user asks for is no fallback
    assert not caplog.messages or reason in caplog.messages[0]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (("kFp8StaticTensorSym", "kFp8StaticTensorSym"), "quantization scheme"),
        (("kFp8StaticTensorSym", "kFp8DynamicTensorSym"), "quantization scheme"),
        (("kInt8StaticTensorSym", "kInt8DynamicTensorSym"), "quantization scheme"),
    ],
)
def test_other_schemes_are_refused(keys: tuple[str, str], reason: str) -> None:
    scheme = [getattr(ours.keys, key) for key in keys]
    supported, why = ours.CutlassMoeExperts.is_supported_config(
        ours.CutlassMoeExperts,
        Layer("fp8").config(),
        *scheme,
        ours.mk.FusedMoEActivationFormat.Standard,
    )
    assert not supported and reason in str(why)


def test_all2all_and_batch_invariance_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = ours.CutlassMoeExperts
    across = replace(Layer(None).config().moe_parallel_config, use_ep=True, dp_size=2)
    assert across.use_all2all_kernels
    arguments = (None, None, ours.mk.FusedMoEActivationFormat.Standard)
    moe = Layer(None).config(moe_parallel_config=across)
    assert "parallel config" in str(experts.is_supported_config(experts, moe, *arguments)[1])
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    moe = Layer(None).config()
    assert "batch invariance" in str(experts.is_supported_config(experts, moe, *arguments)[1])


def test_strict_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    choice.register()
    with pytest.raises(RuntimeError, match="no kernel for experts of vLLM .*: .*LoRA"):
        select(Layer("int8"), is_lora_enabled=True)


def test_with_lora_the_class_is_tritons_in_all_but_name() -> None:
    """vLLM takes the first class of the Triton backend then, without asking it."""
    choice.register()
    _, cls = unquantized.select_unquantized_moe_backend(Layer(None).config(is_lora_enabled=True))
    experts = cls(Layer(None).config(is_lora_enabled=True), UNQUANTIZED)
    triton = ours.TritonExperts(Layer(None).config(), UNQUANTIZED)
    assert (
        isinstance(experts, ours.TritonExperts) and experts.supports_lora() and not experts.is_ours
    )
    assert not experts.expects_unquantized_inputs
    shape = (7, 256, 256, 2, 8, 8, None, Layer(None).config().activation)
    assert experts.workspace_shapes(*shape) == triton.workspace_shapes(*shape)


def test_int8_made_at_load_keeps_tokens_in_16_bits() -> None:
    """vLLM selects it as W8A8 and runs it as W8A16: Triton does that, not our kernels."""
    made = int8.make_int8_moe_quant_config(
        int8.Int8MoeBackend.TRITON, torch.ones(8, 256), torch.ones(8, 256)
    )
    with pytest.raises(ValueError, match=r"must be quantised alike.*got torch.int8 and None"):
        ours.quant_of(made)
    assert not ours.CutlassMoeExperts(Layer("int8").config(), made).is_ours


def test_one_scale_an_expert_is_refused() -> None:
    config = import_module("vllm.model_executor.layers.fused_moe.config")
    scales = {"w1_scale": torch.ones(8), "w2_scale": torch.ones(8)}
    made = config.fp8_w8a8_moe_quant_config(**scales, per_act_token_quant=True)
    with pytest.raises(serving.Unsupported, match="per channel and token"):
        ours.quant_of(made)


def test_images_that_are_missing_are_a_reason_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*_: Any) -> None:
        raise RuntimeError("no image for that problem")

    monkeypatch.setattr(serving.torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(serving.torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cm, "warmup", missing)
    experts = ours.describe(Layer("int8").config(), "int8", None, None, None)
    with caplog.at_level(logging.WARNING, "cutlass_moe"):
        reason = serving.why_not(experts, "vLLM", 0)
    assert reason == "its images can't be loaded: no image for that problem"
    assert "own kernels run 8 experts 256 x 128 in int8" in caplog.text


# What is computed


@quants
@pytest.mark.parametrize("local", [None, 4], ids=["all", "expert_map"])
@pytest.mark.parametrize("tokens", [1, 33])
def test_a_layer_in_vllms_kernel(quant: str | None, local: int | None, tokens: int) -> None:
    layer = Layer(quant, local=local)
    compare(layer, tokens, {})


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, bias: bool) -> None:
    compare(Layer("int8", activation=activation, bias=bias), 9, ACTIVATIONS[activation])


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu2"])
def test_activations_without_a_gate(name: str) -> None:
    """vLLM has them on GPUs alone: this is what is asked of ours."""
    moe = copy.copy(Layer("int8").config())
    moe.activation = ours.MoEActivation(f"{name}_no_mul")
    experts = ours.describe(moe, "int8", None, None, None)
    assert experts.activation == ActivationArguments(name)
    assert serving.arguments(experts, 3)["w13"].shape == (8, 128, 256)
    assert serving.why_not(experts, "vLLM", -1) is None


@pytest.mark.parametrize("quant", [None, "fp8"])
def test_clamped(quant: str | None) -> None:
    numbers = (("swiglu_limit", 0.5), ("swiglu_alpha", 1.5), ("swiglu_beta", 0.25))
    clamped = {"limit": 0.5, "alpha": 1.5, "beta": 0.25}
    compare(Layer(quant, activation="swigluoai_uninterleave", numbers=numbers), 9, clamped)
    compare(Layer(quant, numbers=numbers[:1]), 9, {"limit": 0.5})


def compare(layer: Layer, tokens: int, options: dict[str, Any]) -> None:
    """vLLM's kernel against the reference of `fused_moe`."""
    choice.register()
    weights, call = layer.weights(), layer.calls(tokens)
    kernel = make_kernel(layer, weights, *select(layer))
    assert kernel.fused_experts.is_ours
    got = run(kernel, layer, weights, call)
    want = cm.fused_moe_reference(
        **call,
        **weights,
        quant=layer.quant,
        expert_map=expert_map_of(layer),
        compute_dtype=torch.float64,
        **options,
    )
    assert got.dtype == torch.bfloat16 and relative(got, want) <= 2e-2


@pytest.mark.parametrize("quant", (*ALL_QUANTS, "int4_g32", "int4_g128"))
def test_a_layer_of_a_checkpoint(quant: str | None, tmp_path: Path, one_rank: None) -> None:
    """vLLM's own module of experts: its choice, its loader, its router and its runner."""
    write_model(tmp_path, quant)
    engine = import_module("vllm.engine.arg_utils").EngineArgs(
        model=str(tmp_path), skip_tokenizer_init=True, max_model_len=256, enforce_eager=True
    )
    made = engine.create_engine_config()
    choice.register()
    hidden, logits = torch.randn(17, 256).bfloat16(), torch.randn(17, 8)
    with config.set_current_vllm_config(made):
        layer, kernel = load_layer(tmp_path, made)
        assert kernel.fused_experts.is_ours
        with import_module("vllm.forward_context").set_forward_context(None, made):
            got = layer(hidden, logits)
    weights, ids = logits.softmax(-1).topk(2)
    want = cm.fused_moe_reference(
        hidden,
        topk_weights=weights / weights.sum(1, keepdim=True),
        topk_ids=ids.int(),
        quant=None if quant in PACKINGS else quant,
        compute_dtype=torch.float64,
        **read_layer(tmp_path),
    )
    assert relative(got, want) <= 2e-2


@pytest.mark.parametrize("local", [None, 4], ids=["all", "expert_map"])
@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("quant", ["mxfp4", "int4_g128"])
def test_packed(quant: str, tokens: int, local: int | None) -> None:
    """Weights as vLLM loads them, which are packed then; biases stay as they are."""
    choice.register()
    layer, options = Layer(None, local=local), {}
    if quant == "mxfp4":  # gpt-oss
        layer = replace(layer, activation="swigluoai", bias=True)
        options = {"activation": "swiglu_oai", "interleaved": True}
    kernel, held = load_packed(layer, quant, layer.weights())
    assert kernel.fused_experts.is_ours and held["w13"].dim() == 4
    assert not kernel.fused_experts.w1_scale.numel()
    call = layer.calls(tokens)
    got = run(kernel, layer, held, call)
    want = cm.fused_moe_reference(
        **call, **held, **options,
        expert_map=expert_map_of(layer), compute_dtype=torch.float64,
    )  # fmt: skip
    assert got.dtype == torch.bfloat16 and relative(got, want) <= 1e-2


def test_other_mxfp4_is_refused() -> None:
    experts, silu = ours.CutlassMoeExperts, Layer(None).config()
    arguments = (*ours.MXFP4, ours.mk.FusedMoEActivationFormat.Standard)
    supported, why = experts.is_supported_config(experts, silu, *arguments)
    assert not supported and "gpt-oss's, with swigluoai, got silu" in str(why)


def int4_method(group: int = 128, symmetric: bool = True, **changes: Any) -> Any:
    """The method of compressed-tensors for INT4, with what it chose."""
    how = {"num_bits": 4, "strategy": "group", "group_size": group, "symmetric": symmetric}
    layer = Layer(None)
    return INT4_METHOD(wna16.QuantizationArgs(**how), None, layer.config(**changes))


@pytest.mark.parametrize(
    "refused",
    [{"group": 64}, {"symmetric": False}, {"in_dtype": torch.float16}, {"moe_backend": "triton"}],
    ids=str,
)
def test_other_int4_is_vllms(refused: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = wna16.WNA16MoEBackend.TRITON, choice.TritonWNA16Experts
    monkeypatch.setattr(wna16, "select_wna16_moe_backend", lambda *_, **__: theirs)
    choice.register()
    assert int4_method().experts_cls is ours.CutlassMoeExperts
    assert int4_method(**refused).experts_cls is choice.TritonWNA16Experts


def test_int4_that_is_refused_once_loaded_is_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the Triton kernels want the weights, which must not be packed then."""
    built: list[Any] = []
    monkeypatch.setattr(INT4_METHOD, "_setup_kernel", lambda self, layer: built.append(self))
    choice.register()
    method = int4_method()
    monkeypatch.setattr(ours, "describe", Mock(side_effect=ours.Unsupported("no")))
    scales = {f"{name}_weight_scale": torch.ones(8, 256, 2) for name in ("w13", "w2")}
    method._setup_kernel(SimpleNamespace(**scales, _expert_routing_tables=lambda: None))
    assert built == [method] and method.experts_cls is choice.TritonWNA16Experts


def test_packed_weights_are_not_rebalanced() -> None:
    parallel = ours.FusedMoEParallelConfig.make_no_parallel()
    moe = Layer(None).config(moe_parallel_config=replace(parallel, enable_eplb=True))
    with pytest.raises(ours.Unsupported, match="moves weights that must not be packed"):
        ours.describe(moe, "int4_g32", None, None, None)
    assert ours.describe(moe, "int8", None, None, None).quant == "int8"


def test_weights_on_the_input() -> None:
    """Where vLLM multiplies tokens by their only weight, results are not weighted again."""
    choice.register()
    layer = Layer("int8", top_k=1)
    weights, call = layer.weights(), layer.calls(9)
    call["topk_weights"] = torch.full_like(call["topk_weights"], 0.5)
    kernel = make_kernel(layer, weights, *select(layer))
    got = run(kernel, layer, weights, call, weight_on_input=True)
    want = cm.fused_moe_reference(**call, **weights, quant="int8", weight_on_input=True)
    assert relative(got, want) <= 1e-2


def test_a_hook_for_rows_before_their_sum_gets_tritons_workspace() -> None:
    experts = make_kernel(
        Layer(None), Layer(None).weights(), unquantized.UnquantizedMoeBackend.TRITON,
        ours.CutlassMoeExperts,
    ).fused_experts  # fmt: skip
    assert experts.is_ours
    experts.post_gemm2_hook = lambda *_: None
    assert not experts.is_ours and experts.expects_unquantized_inputs  # it quantises them itself
    shape = (7, 256, 256, 2, 8, 8, None, ours.MoEActivation.SILU)
    triton = ours.TritonExperts(Layer(None).config(), UNQUANTIZED)
    assert experts.workspace_shapes(*shape) == triton.workspace_shapes(*shape)


def test_sizes_of_a_call_are_those_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer with a shared expert among the others has one more, and tokens one more choice."""
    layer, silu = Layer("int8"), ours.MoEActivation.SILU
    kernel = make_kernel(layer, layer.weights(), int8.Int8MoeBackend.TRITON, ours.CutlassMoeExperts)
    experts = kernel.fused_experts
    before = experts.workspace_shapes(7, 256, 256, 2, 8, 8, None, silu)
    shapes = experts.workspace_shapes(7, 256, 256, 3, 8, 9, None, silu)
    assert shapes[1][1] > before[1][1] and experts.experts[:2] == (9, 3)
    monkeypatch.setattr(serving, "why_not", lambda *_: "no image")
    shapes = experts.workspace_shapes(7, 256, 256, 4, 8, 10, None, silu)
    triton = ours.TritonExperts(layer.config(), experts.quant_config)
    assert shapes == triton.workspace_shapes(7, 256, 256, 4, 8, 10, None, silu)
    assert not experts.is_ours and experts.expects_unquantized_inputs


@quants
def test_workspace_is_what_fused_moe_asks_for(quant: str | None) -> None:
    layer = Layer(quant)
    weights = layer.weights()
    backend = {"int8": int8.Int8MoeBackend, None: unquantized.UnquantizedMoeBackend}.get(
        quant, fp8.Fp8MoeBackend
    )
    kernel = make_kernel(layer, weights, backend.TRITON, ours.CutlassMoeExperts)
    shapes = kernel.fused_experts.workspace_shapes(
        33, 256, 256, 2, 8, 8, None, ours.MoEActivation.SILU
    )
    size = cm.fused_moe_workspace_size(**layer.calls(33), **weights, quant=quant)
    assert shapes[0] == (0,) and shapes[2] == (33, 256)
    assert size <= 2 * shapes[1][0] * shapes[1][1] < size + 2 * 33


def test_scales_follow_updates_of_weights() -> None:
    """They are views: what the engine writes into its parameters is what kernels read."""
    layer = Layer("fp8")
    weights = layer.weights()
    experts = make_kernel(
        layer, weights, fp8.Fp8MoeBackend.TRITON, ours.CutlassMoeExperts
    ).fused_experts
    assert experts.options["w13_scale"].shape == weights["w13_scale"].shape
    assert experts.options["w13_scale"].data_ptr() == weights["w13_scale"].data_ptr()
