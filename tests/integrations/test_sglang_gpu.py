"""SGLang's runner with our experts on a GPU: its hook, on layers made by hand."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from tests.integrations.sglang_imports import prepare
from tests.integrations.test_vllm_gpu import LIMITS, REAL, of_quant, quants
from tests.layer.test_nn_gpu import no_wait
from tests.support.numerics import same_bits

pytestmark = pytest.mark.gpu
# Images: `images()` of test_vllm_gpu.py, whose layers these are.


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The integration, its hooks applied, outside a server; an error where it is refused."""
    pytest.importorskip("sglang", reason="needs SGLang")
    prepare()
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    integration: Any = importlib.import_module("cutlass_moe.integrations.sglang")
    off = SimpleNamespace(moe=SimpleNamespace(enable_fused_moe_sum_all_reduce=False))
    monkeypatch.setattr(integration, "get_exec", lambda: off)
    monkeypatch.setattr(integration, "get_parallel", lambda: SimpleNamespace(tp_group=None))
    monkeypatch.setattr(integration, "use_symmetric_memory", lambda *_, **__: nullcontext())
    integration.register()
    integration.HookRegistry.apply_hooks()
    yield integration


class Runner:
    """SGLang's Triton runner of a layer, whose function of its own is an error to call."""

    def __init__(self, ours: Any, quant: str | None, **config: Any) -> None:
        self.ours, self.layer = ours, of_quant(REAL, quant)
        self.weights: dict[str, Any] = self.layer.weights()
        wide = quant in ("int8", "fp8")
        scales = [self.weights[f"{name}_scale"] for name in ("w13", "w2")]
        scales = [scale[..., None] if wide else scale for scale in scales]
        self.info = ours.TritonMoeQuantInfo(
            w13_weight=self.weights["w13"],
            w2_weight=self.weights["w2"],
            use_int8_w8a8=quant == "int8",
            use_fp8_w8a8=quant not in (None, "int8"),
            per_channel_quant=wide,
            w13_scale=scales[0],
            w2_scale=scales[1],
            block_shape=[128, 128] if quant == "fp8_block" else None,
        )
        sizes = {"num_experts": self.layer.experts, "num_local_experts": self.layer.experts}
        given = ours.MoeRunnerConfig(**{"inplace": False, "top_k": 8, **sizes, **config})
        backend = ours.resolve_moe_runner_backend("triton")
        self.runner = ours.MoeRunner(backend, given)
        self.runner.fused_func = None
        self.runner.runner_core = None

    def __call__(self, call: dict[str, Tensor]) -> Tensor:
        topk_output = importlib.import_module("sglang.srt.layers.moe.topk").StandardTopKOutput
        topk = topk_output(call["topk_weights"], call["topk_ids"], None)
        dispatch = self.ours.StandardDispatchOutput(call["hidden"], None, topk)
        return self.runner.run(dispatch, self.info).hidden_states


@quants
@pytest.mark.parametrize("tokens", [1, 128, 1024])
def test_layer(quant: str | None, tokens: int, ours: Any) -> None:
    """Against float64; half of the experts are other ranks', and nothing waits."""
    runner = Runner(ours, quant, routed_scaling_factor=2.5)
    call = runner.layer.calls(tokens)
    call["topk_ids"][1::2] = -1
    out = runner(call)
    with no_wait():
        again = runner(call)
    assert same_bits(out, again)
    few = {name: tensor[:64] for name, tensor in call.items()}
    want = cm.fused_moe_reference(**few, **runner.weights, quant=quant, compute_dtype=torch.float64)
    difference = (out[:64].double() - 2.5 * want).norm() / (2.5 * want).norm()
    assert difference <= LIMITS[quant][0]


@quants
def test_in_place(quant: str | None, ours: Any) -> None:
    call = of_quant(REAL, quant).calls(64)
    apart = Runner(ours, quant)(call)
    out = Runner(ours, quant, inplace=True)(call)
    assert out.data_ptr() == call["hidden"].data_ptr() and same_bits(out, apart)


@quants
def test_graph_replay_with_new_tokens(quant: str | None, ours: Any) -> None:
    runner = Runner(ours, quant)
    call = runner.layer.calls(64)
    runner(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = runner(call)
    for seed in (1, 2):
        for name, tensor in runner.layer.calls(64, seed).items():
            call[name].copy_(tensor)
        graph.replay()
        assert same_bits(out.clone(), runner(call))
