"""transformers' models with our experts on a GPU: the kernels against the models' own code."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.choose.heuristics_sm90 import choose, every_config
from cutlass_moe.layer.steps import Forms, LayerSizes, Projection, layer_problems
from emitters.spec.dtypes import DType
from emitters.spec.gemm import GemmProblem, Granularity
from emitters.spec.packing import Packing
from emitters.spec.registry import Config, Problem
from tests.integrations.tiny_models import (
    FAMILIES,
    TOP_K,
    VOCAB,
    E,
    definition,
    experts_of,
    make,
    write_mxfp4,
)
from tests.layer.test_nn_gpu import no_wait
from tests.support.numerics import same_bits
from tests.support.training_cases import trained_problems

pytestmark = pytest.mark.gpu

HIDDEN, INTER = 256, 128
WIDE = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "moe_intermediate_size": INTER,
    "moe_shared_expert_intermediate_size": INTER,
}
TOKENS = (1, 2, 34, 42, 64, 333)  # of the calls below
SHAPES = {"qwen3-moe": "swiglu", "gpt-oss": "swiglu_oai", "nemotron-h": "relu2"}
PACKED = {"mxfp4": "gpt-oss", "int4_g32": "qwen3-moe", "int4_g128": "nemotron-h"}
OPERANDS = {None: DType.BF16, "int8": DType.INT8, "fp8": DType.E4M3}
LIMITS = {None: 6e-3, "int8": 2.5e-2, "fp8": 7e-2}  # of a module, from float32
quants = pytest.mark.parametrize("quant", LIMITS)


def images() -> set[tuple[Problem, Config]]:
    """Of all calls here: layers, and the two products of a gate that no kernel has."""
    found: set[tuple[Problem, Config]] = set()
    for family, activation in SHAPES.items():
        bias = DType.BF16 if family == "gpt-oss" else None
        for quant, operand in OPERANDS.items():
            each = Projection(Granularity.CHANNEL if quant else None, bias)
            sizes = LayerSizes(E, TOP_K, HIDDEN, INTER)
            for weights in (DType.BF16, DType.FP32):
                layer = layer_problems(
                    sizes, operand, DType.BF16, activation, each, each, forms=Forms(64, weights)
                )
                plain = replace(layer.up, out=DType.BF16, epilogue=layer.up.epilogue[:-1])
                trained = trained_problems(layer, family == "gpt-oss") if quant is None else ()
                for problem in filter(None, (*layer, plain, *trained)):
                    found |= {(problem, config) for config in _configs(problem)}
    for quant, family in PACKED.items():
        bias = DType.BF16 if family == "gpt-oss" else None
        each = Projection(bias=bias, packing=Packing(quant))
        sizes = LayerSizes(E, TOP_K, HIDDEN, INTER)
        for weights in (DType.BF16, DType.FP32):
            layer = layer_problems(
                *(sizes, DType.BF16, DType.BF16, SHAPES[family], each, each),
                forms=Forms(64, weights),
            )
            for problem in filter(None, layer):
                found |= {(problem, config) for config in _configs(problem)}
    return found


def _configs(problem: Problem) -> set[Config]:
    if not isinstance(problem, GemmProblem):
        return set(every_config(problem))
    rows = (tokens * TOP_K / E for tokens in TOKENS)
    return {choose(problem, 0, mean) for one in rows for mean in (one, ceil(one))}


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The integration, with an error where no kernel serves a call."""
    pytest.importorskip("transformers", reason="needs transformers")
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    yield importlib.import_module("cutlass_moe.integrations.transformers")


def model_of(family: str, **options: Any) -> Any:
    return make(family, "cuda", **WIDE, **options)


def routing(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, ids and weights; half of the experts get no token."""
    generator = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, device="cuda", generator=generator).bfloat16()
    scores = torch.rand(tokens, E // 2, device="cuda", generator=generator)
    ids = scores.topk(TOP_K, 1).indices
    return hidden, ids, scores.gather(1, ids).bfloat16()


def eager(experts: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What the model's own code computes, in float32."""
    wide = copy.deepcopy(experts).float()
    return type(experts).forward.__wrapped__(wide, hidden.float(), ids, weights.float())


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def per_token(got: Tensor, want: Tensor) -> Tensor:
    got, want = got.double(), want.double()
    return ((got - want).norm(dim=-1) / want.norm(dim=-1)).flatten()


def tokens_of(batch: int = 2, length: int = 17) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(2, VOCAB, (batch, length), generator=generator).cuda()


@pytest.mark.parametrize("family", FAMILIES)
def test_model(family: str) -> None:
    """Logits by the median token; greedy generation by the logits of the model's own code."""
    model, ids = model_of(family), tokens_of()
    with torch.no_grad():
        logits = model(ids).logits
        longer = model.generate(ids, max_new_tokens=4, do_sample=False)
        model.set_experts_implementation("eager")
        assert per_token(logits, model(ids).logits).median() <= 2e-2
        right = model(longer).logits[:, 16:-1]
    chosen = right.gather(2, longer[:, 17:, None])[..., 0]
    near = right.max(dim=-1).values - chosen <= 0.1 * right.float().std(dim=-1)
    assert near.float().mean() >= 0.75


@quants
@pytest.mark.parametrize("family", FAMILIES)
def test_module(family: str, quant: str | None, ours: Any) -> None:
    model = model_of(family)
    before = copy.deepcopy(experts_of(model)[0])
    if quant:
        ours.quantize_(model, quant)
    experts = experts_of(model)[0]
    for tokens in (0, 1, 333):
        arguments = routing(tokens)
        with torch.no_grad():
            out = experts(*arguments)
            with no_wait():
                again = experts(*arguments)
        assert out.shape == arguments[0].shape and same_bits(out, again)
        if tokens:
            few = 1.6 if tokens == 1 else 1  # of rows: their errors scatter
            assert relative(out, eager(before, *arguments)) <= few * LIMITS[quant]


@quants
@pytest.mark.parametrize("family", SHAPES)
def test_graph_replay_with_new_routing(family: str, quant: str | None, ours: Any) -> None:
    model = model_of(family)
    if quant:
        ours.quantize_(model, quant)
    experts, arguments = experts_of(model)[0], routing(64)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        experts(*arguments)
        with torch.cuda.graph(graph):
            out = experts(*arguments)
        for seed in (1, 2):
            new = routing(64, seed)
            new[1][::3, 1] = E  # of another rank
            for tensor, value in zip(arguments, new, strict=True):
                tensor.copy_(value)
            graph.replay()
            assert same_bits(out, experts(*new))


@pytest.mark.parametrize("family", SHAPES)
def test_compiled(family: str) -> None:
    experts, arguments = experts_of(model_of(family))[0], routing(42)
    with torch.no_grad():
        want = experts(*arguments)
        torch.compiler.reset()
        got = torch.compile(experts, fullgraph=True)(*arguments)
    assert relative(got, want) <= 1e-3


@quants
@pytest.mark.parametrize("family", SHAPES)
def test_a_gate_of_its_own(
    family: str, quant: str | None, ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    experts = experts_of(model)[0]
    if experts.has_gate:
        monkeypatch.setattr(type(experts), "_apply_gate", _hyperbolic)
    else:
        experts.act_fn = torch.nn.Tanh()
    before = copy.deepcopy(experts)
    if quant:
        ours.quantize_(model, quant)
    arguments = routing(64)
    with torch.no_grad():
        out = experts(*arguments)
        with no_wait():
            again = experts(*arguments)
        assert same_bits(out, again)
        assert relative(out, definition(before, *arguments)) <= 1.5 * LIMITS[quant]
    assert experts._cutlass_moe.activation is None


def _hyperbolic(self: Any, x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1) if self.is_concatenated else (x[..., ::2], x[..., 1::2])
    return torch.tanh(gate) * up


@pytest.mark.parametrize("quant", ["int8", "fp8"])
@pytest.mark.parametrize("family", SHAPES)
def test_a_quantised_model(family: str, quant: str, ours: Any) -> None:
    model, ids = model_of(family), tokens_of()
    with torch.no_grad():
        want = model(ids).logits
        got = ours.quantize_(model, quant)(ids).logits
    assert per_token(got, want).median() <= (0.05 if quant == "int8" else 0.15)


@pytest.mark.parametrize(("quant", "family"), PACKED.items())
def test_packed_experts(quant: str, family: str, ours: Any) -> None:
    """Against the plain path on the CPU; nothing waits; graphs with other routing."""
    experts = experts_of(ours.quantize_(model_of(family), quant))[0]
    apart = copy.deepcopy(experts).cpu()  # the reference
    arguments, graph = routing(64), torch.cuda.CUDAGraph()
    with torch.no_grad():
        for tokens in (0, 1, 333):
            given = routing(tokens)
            out = experts(*given)
            with no_wait():
                again = experts(*given)
            assert out.shape == given[0].shape and same_bits(out, again)
            if tokens:
                assert relative(out.cpu(), apart(*(one.cpu() for one in given))) <= LIMITS[None]
        experts(*arguments)
        with torch.cuda.graph(graph):
            out = experts(*arguments)
        new = routing(64, seed=1)
        for tensor, value in zip(arguments, new, strict=True):
            tensor.copy_(value)
        graph.replay()
        assert same_bits(out, experts(*new))


def test_gpt_oss_keeps_its_bits(tmp_path: Path, ours: Any) -> None:
    """Loaded in MXFP4, beside the model that transformers makes of the same file in bfloat16."""
    transformers = importlib.import_module("transformers")
    write_mxfp4(tmp_path, make("gpt-oss", **WIDE))
    loaded, ids = ours.load_quantized(tmp_path).eval(), tokens_of()
    wide = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16, experts_implementation="eager",
    ).eval().cuda()  # fmt: skip
    for mine, theirs in zip(experts_of(loaded), experts_of(wide), strict=True):
        assert mine.down_proj.dtype == torch.uint8 and mine.down_proj.is_cuda
        w2 = cm.dequantize_packed(mine.down_proj, INTER)
        assert torch.equal(w2, theirs.down_proj.detach().transpose(1, 2).float())
        arguments = routing(42)
        with torch.no_grad():
            assert relative(mine(*arguments), eager(theirs, *arguments)) <= LIMITS[None]
    with torch.no_grad():
        assert per_token(loaded(ids).logits, wide(ids).logits).median() <= 2e-2


@pytest.mark.parametrize("family", SHAPES)
def test_gradients(family: str) -> None:
    experts, arguments = experts_of(model_of(family))[0].train(), routing(64)
    with torch.no_grad():
        experts(*arguments)  # moves gpt-oss's weights

    def gradients(implementation: str) -> list[Tensor]:
        experts.config._experts_implementation = implementation
        hidden = arguments[0].clone().requires_grad_()
        out = experts(hidden, *arguments[1:])
        generator = torch.Generator("cuda").manual_seed(1)
        grad = torch.randn(out.shape, generator=generator, device="cuda").to(out.dtype)
        return list(torch.autograd.grad(out, [hidden, *experts.parameters()], grad))

    for mine, right in zip(gradients("cutlass_moe"), gradients("grouped_mm"), strict=True):
        assert relative(mine, right) <= 2e-2


@pytest.mark.parametrize("family", SHAPES)
def test_fine_tuning(family: str) -> None:
    """20 steps of a whole model: the losses of transformers' own experts, to within a step."""
    start, ids = model_of(family).train(), tokens_of()

    def losses(implementation: str) -> list[float]:
        model, found = copy.deepcopy(start), []
        model.set_experts_implementation(implementation)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(20):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    mine, right = losses("cutlass_moe"), losses("grouped_mm")
    assert mine == pytest.approx(right, rel=0.1, abs=0.25)
    assert mine[-1] < mine[0] / 2


def test_what_has_no_kernel_is_transformers(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    experts, (hidden, ids, weights) = experts_of(model_of("qwen3-moe").float())[0], routing(5)
    with torch.no_grad(), pytest.raises(RuntimeError, match="no kernel for these experts"):
        experts(hidden.float(), ids, weights.float())
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "0")
    ours._warn_once.cache_clear()
    with torch.no_grad(), pytest.warns(UserWarning, match="transformers' own function"):
        out = experts(hidden.float(), ids, weights.float())
    assert relative(out, eager(experts, hidden, ids, weights)) <= 1e-3
