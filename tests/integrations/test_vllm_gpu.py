"""Our experts inside vLLM on a GPU: what is chosen, its kernel class, and whole models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.integrations import serving
from cutlass_moe.integrations.experts import ActivationArguments
from cutlass_moe.integrations.serving import ServedExperts
from cutlass_moe.operands import FP8_BLOCK
from emitters.spec.registry import Config, Problem
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
from tests.integrations.vllm_models import TINY, write_model
from tests.layer.test_nn_gpu import no_wait
from tests.support.numerics import same_bits

pytestmark = pytest.mark.gpu

REAL = Layer(None, 128, 8, 2048, 768, "cuda")  # qwen3-30b
RANK = Layer(None, 128, 8, 2048, 768, "cuda", local=64)  # of two
OSS = Layer(None, 32, 4, 2880, 2880, "cuda", activation="swigluoai", bias=True)  # gpt-oss-20b
PACKED = {"int4_g128": REAL, "int4_g32": TINY, "mxfp4": OSS}
TOKENS = (1, 16, 128, 1024, 8192)
# From float64 with the same points of quantisation, and from vLLM's kernels, which have others.
LIMITS = {None: (5e-3, 1e-2), "int8": (6e-3, 2e-2), "fp8": (3e-2, 4e-2), FP8_BLOCK: (1e-2, 4e-2)}
CHOSEN = {None: "TritonExperts", "int8": "TritonExperts", "fp8": "TritonOrCutlassExperts"}
# Between log probabilities by our experts and by vLLM's, which round elsewhere. A bfloat16 logit of
# these models has steps of 0.06; of a wrong layer they are off by 4 and more.
ALIKE = {None: 0.2, "int8": 0.3, "fp8": 0.5, FP8_BLOCK: 0.8, "int4_g32": 0.2}
quants = pytest.mark.parametrize("quant", ALL_QUANTS)


def images() -> set[tuple[Problem, Config]]:
    """All that the integration loads for these layers."""
    found: set[tuple[Problem, Config]] = set()
    layers = [(layer, quant) for layer in (REAL, RANK, TINY) for quant in ALL_QUANTS]
    for layer, quant in (*layers, *((layer, quant) for quant, layer in PACKED.items())):
        activation = "swiglu_oai" if layer is OSS else "swiglu"
        experts = ServedExperts(
            *(layer.held, layer.top_k, layer.hidden, layer.inter, torch.bfloat16, quant),
            ActivationArguments(activation),
            interleaved=layer is OSS,
            bias=torch.bfloat16 if layer.bias else None,
        )
        for problem in cm.fused_moe_problems(**serving.arguments(experts, 1)):
            found |= {(problem, config) for config in every_config(problem)}
    return found


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The integration in vLLM, with an error where it is refused."""
    pytest.importorskip("vllm", reason="needs vLLM")
    prepare("cuda")
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.worker.workspace import init_workspace_manager, is_workspace_manager_initialized

    from cutlass_moe.integrations import vllm as integration

    if not is_workspace_manager_initialized():
        init_workspace_manager(torch.device("cuda:0"))
    with set_current_vllm_config(VllmConfig()):
        yield integration


def of_quant(layer: Layer, quant: str | None) -> Layer:
    return replace(layer, quant=quant)


@quants
def test_choice(quant: str | None, ours: Any) -> None:
    """Before and after registration, in that order whatever ran before."""
    layer, modules = of_quant(REAL, quant), ("fp8", "int8", "unquantized")
    oracles = [getattr(ours, name) for name in modules]
    for oracle in oracles:
        for name in ("_get_priority_backends", "backend_to_kernel_cls"):
            function = getattr(oracle, name)
            setattr(oracle, name, getattr(function, "__wrapped__", function))
    before = select(layer)[1].__name__
    assert before == CHOSEN.get(quant, "TritonExperts")
    ours.register.cache_clear()
    ours.register()
    backend, after = select(layer)
    assert backend.value == "TRITON" and after is ours.CutlassMoeExperts


@quants
@pytest.mark.parametrize("tokens", TOKENS)
def test_layer(quant: str | None, tokens: int, ours: Any) -> None:
    """Against float64, Triton's class and, in FP8, CUTLASS's; graphs; nothing waits."""
    layer = of_quant(REAL, quant)
    check_layer(layer, tokens, ours)


@quants
@pytest.mark.parametrize("tokens", [1, 128, 1024])
def test_layer_of_a_rank(quant: str | None, tokens: int, ours: Any) -> None:
    check_layer(of_quant(RANK, quant), tokens, ours)


def check_layer(layer: Layer, tokens: int, ours: Any) -> None:
    weights, call = layer.weights(), layer.calls(tokens)
    backend, _ = select_triton(layer)
    kernel = make_kernel(layer, weights, backend, ours.CutlassMoeExperts)
    out = run_ours(kernel, layer, weights, call)
    few = {name: tensor[:64] for name, tensor in call.items()}
    want = cm.fused_moe_reference(
        **few,
        **weights,
        quant=layer.quant,
        expert_map=expert_map_of(layer),
        compute_dtype=torch.float64,
    )
    right, alike = LIMITS[layer.quant]
    assert relative(out[:64], want) <= right
    for experts in theirs(layer):
        other = run(make_kernel(layer, weights, *experts), layer, weights, call)
        assert relative(out, other) <= alike, experts


def run_ours(kernel: Any, layer: Layer, weights: dict[str, Any], call: dict[str, Any]) -> Tensor:
    """The output of our kernels; the same bits in a second call, in which nothing waits."""
    assert kernel.fused_experts.is_ours
    out = run(kernel, layer, weights, call)
    with no_wait():
        again = run(kernel, layer, weights, call)
    assert same_bits(out, again)
    return out


def select_triton(layer: Layer) -> tuple[Any, type]:
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.oracle import fp8, int8, unquantized

    modules = {None: unquantized.UnquantizedMoeBackend, "int8": int8.Int8MoeBackend}
    return modules.get(layer.quant, fp8.Fp8MoeBackend).TRITON, TritonExperts


def theirs(layer: Layer) -> list[tuple[Any, type]]:
    """vLLM's own classes for a layer."""
    found = [select_triton(layer)]
    if layer.quant == "fp8":
        from vllm.model_executor.layers.fused_moe.experts.triton_cutlass_moe import (
            TritonOrCutlassExperts,
        )
        from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend

        found.append((Fp8MoeBackend.VLLM_CUTLASS, TritonOrCutlassExperts))
    return found


@quants
@pytest.mark.parametrize("tokens", [1, 64])
def test_graph_replay_with_new_tokens(quant: str | None, tokens: int, ours: Any) -> None:
    layer = of_quant(RANK, quant)
    weights, call = layer.weights(), layer.calls(tokens)
    backend, _ = select_triton(layer)
    kernel = make_kernel(layer, weights, backend, ours.CutlassMoeExperts)
    run(kernel, layer, weights, call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(kernel, layer, weights, call)
    for seed in (1, 2):
        for name, tensor in layer.calls(tokens, seed).items():
            call[name].copy_(tensor)
        graph.replay()
        replayed = out.clone()
        assert same_bits(replayed, run(kernel, layer, weights, call))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("quant", PACKED)
def test_packed_layer(quant: str, tokens: int, ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """4-bit weights as vLLM loads them: against float64 and, in INT4, vLLM's Triton kernels."""
    ours.register()
    layer = replace(PACKED[quant], device="cuda")
    weights, call = layer.weights(), layer.calls(tokens)
    kernel, held = load_packed(layer, quant, weights)
    out = run_ours(kernel, layer, held, call)
    few = {name: tensor[:64] for name, tensor in call.items()}
    options = {"activation": "swiglu_oai", "interleaved": True} if quant == "mxfp4" else {}
    want = cm.fused_moe_reference(**few, **held, **options, compute_dtype=torch.float64)
    right, alike = LIMITS[None]
    assert relative(out[:64], want) <= right
    if quant == "mxfp4":
        return  # vLLM's own need a model's config
    triton = ours.wna16.WNA16MoEBackend.TRITON, ours.TritonWNA16Experts
    monkeypatch.setattr(ours.wna16, "select_wna16_moe_backend", lambda **_: triton)
    theirs, held = load_packed(layer, quant, weights)
    assert type(theirs.fused_experts) is ours.TritonWNA16Experts
    assert relative(out, run(theirs, layer, held, call)) <= alike


# Whole models


PREPARED = """from tests.integrations.vllm_layers import prepare
prepare("cuda")
"""


def generate(directory: Path, *options: str) -> dict[str, Any]:
    """What vllm_generate.py writes. vLLM starts processes, which must import it as it does."""
    out = directory / "out.json"
    (directory / "sitecustomize.py").write_text(PREPARED)
    paths = [str(directory), *map(os.path.abspath, sys.path)]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.integrations.vllm_generate", str(directory), str(out)]
        + list(options),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-8000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("quant", (*ALL_QUANTS, "int4_g32"))
def test_model(quant: str | None, tmp_path: Path) -> None:
    """Greedy tokens are vLLM's own, up to the first for which two are about as likely."""
    write_model(tmp_path, quant)
    packed = quant is not None and quant.startswith("int4")
    want, got = generate(tmp_path, *["--triton"] * packed), generate(tmp_path, "--ours")
    graphs = generate(tmp_path, "--ours", "--graphs")
    assert set(got["experts"]) == set(graphs["experts"]) == {"CutlassMoeExperts"}
    assert "CutlassMoeExperts" not in want["experts"]
    for found in (got, graphs):
        apart = difference(found, want)
        assert apart <= ALIKE[quant], apart


def difference(found: dict[str, Any], want: dict[str, Any]) -> float:
    """The most by which log probabilities differ, up to the first other token of each prompt.

    Both tokens of such a step must be among the best of both, so that this is more than half of
    what lies between them.
    """
    apart = [0.0]
    for prompt, right in enumerate(want["tokens"]):
        for step, (mine, token) in enumerate(zip(found["tokens"][prompt], right, strict=True)):
            ours, theirs = (report["logprobs"][prompt][step] for report in (found, want))
            both = ours.keys() & theirs.keys()
            assert {str(mine), str(token)} <= both, (prompt, step)
            apart += [abs(ours[one] - theirs[one]) for one in both]
            if mine != token:
                break
    return max(apart)
