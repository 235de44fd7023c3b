"""fused_moe's gradients on a GPU: kernels against float64, to the bit again, and nothing read that
nobody wrote."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.choose.heuristics_sm90 import choose, every_config
from cutlass_moe.layer import products
from cutlass_moe.layer.activate import (
    activate_rows,
    activate_rows_backward,
    activate_rows_backward_reference,
    activate_rows_reference,
)
from cutlass_moe.layer.steps import (
    LayerSizes,
    Projection,
    layer_problems,
    with_stored_columns,
)
from cutlass_moe.operands import DTYPES, QUANTS, LayerOptions
from cutlass_moe.ops.activations import ACTIVATIONS
from cutlass_moe.ops.dispatch import forced_config
from cutlass_moe.runtime.signatures import Signatures
from emitters.spec.config_sm90 import GemmSm90Config
from emitters.spec.dtypes import DType
from emitters.spec.gemm import GemmProblem, Granularity
from emitters.spec.layer_steps import ActivateBackwardProblem, ActivateProblem
from emitters.spec.registry import Config, Problem
from tests.support.training_cases import (
    TrainingCase,
    gradients,
    images_of,
    leaves_of,
    reference_gradients,
    relative,
)

pytestmark = pytest.mark.gpu

TOKENS = (7, 300)
BASE = TrainingCase(tokens=300, top_k=3, experts=9, hidden=256, inter=192, bias=True)
CASES = {
    **{activation: replace(BASE, activation=activation) for activation in ACTIVATIONS},
    "plain": replace(BASE, bias=False),
    "interleaved": replace(BASE, interleaved=True),
    "clamped": replace(BASE, options={"limit": 30.0, "alpha": 1.5, "beta": 0.5}),
    "n_major": replace(BASE, n_major=True),
    "float16": replace(BASE, dtype=torch.float16),
    "recompute": replace(BASE, options={"recompute": True}),
    "capacity": replace(BASE, options={"capacity_factor": 0.5}),
    "max_rows": replace(BASE, options={"max_rows": 5}),
    "one_expert": replace(BASE, routing="one_expert"),
    "foreign": replace(BASE, routing="foreign"),
    "nobody": replace(BASE, routing="nobody"),
    "many_rows": replace(BASE, hidden=64),  # the activation's result is larger than w2
    "bf16_weights": replace(BASE, weights=torch.bfloat16),
    "one_choice": replace(BASE, options={"weight_on_input": True}),
}
LIMITS = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
FROZEN = ("fp8", "int8")
# Of an up projection that stores its columns before the activation: of whole tiles or in turn,
# alone or in pairs of CTAs.
STORED_TILES = (
    GemmSm90Config(64, 256, pingpong=True),
    GemmSm90Config(64, 256, pingpong=True, cluster_m=2),
    GemmSm90Config(128, 256),
    GemmSm90Config(128, 256, cluster_m=2),
    GemmSm90Config(128, 128, pingpong=True, cluster_m=2),
)
INTERS = (8, 256, 2880, 14336)
_SMALL = 64 << 10  # bytes of tables and router weights


def images() -> set[tuple[Problem, Config]]:
    found = {
        image for case in CASES.values() for tokens in TOKENS for image in images_of(case, tokens)
    }
    for kind in (ActivateProblem, ActivateBackwardProblem):
        for activation in ACTIVATIONS:
            for options, dtype, inter in activations(activation):
                problem = kind(options.function, DTYPES[dtype], inter, options.interleaved)
                found |= {(problem, config) for config in every_config(problem)}
    return found | set(frozen_images()) | {(_stored_up(), config) for config in STORED_TILES}


def _stored_up() -> GemmProblem:
    """The up projection of BASE without biases, which stores its columns before the activation."""
    sizes = LayerSizes(BASE.experts, BASE.top_k, BASE.hidden, BASE.inter)
    layer = layer_problems(
        sizes, DType.BF16, DType.BF16, BASE.activation, Projection(), Projection()
    )
    return with_stored_columns(layer.up)


def frozen_images() -> Iterator[tuple[Problem, Config]]:
    """Of the forward past 8-bit experts; the backward's products are those of bfloat16."""
    each = Projection(Granularity.CHANNEL, DType.BF16)
    sizes = LayerSizes(BASE.experts, BASE.top_k, BASE.hidden, BASE.inter)
    per_expert = -(-BASE.tokens * BASE.top_k // BASE.experts)
    for quant in FROZEN:
        operand = DTYPES[QUANTS[quant]]
        layer = layer_problems(sizes, operand, DType.BF16, "swiglu", each, each)
        plain = replace(layer.up, epilogue=layer.up.epilogue[:-1])
        for product in (plain, layer.down):
            yield product, choose(product, BASE.tokens, per_expert)
        for step in (layer.quantize_hidden, layer.quantize_active):
            assert step is not None
            yield from ((step, config) for config in every_config(step))


def activations(name: str) -> Iterator[tuple[LayerOptions, torch.dtype, int]]:
    for number, inter in enumerate(INTERS):
        dtype = (torch.bfloat16, torch.float16)[number % 2]
        options = LayerOptions(activation=name)
        yield options, dtype, inter
        if options.function.gated:
            yield options._replace(interleaved=True), dtype, inter


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No torch path in a kernel's place; what nobody wrote is NaN."""
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["apart", "fused"])
def activation_in_products(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once never, once wherever there are kernels for it."""
    rows = {"apart": 1 << 30, "fused": 0}[request.param]
    for name in ("STORED_ROWS", "GRADIENT_ROWS"):
        monkeypatch.setattr(products, name, rows)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("activation_in_products")
def test_against_float64(name: str, tokens: int, record_property: Any) -> None:
    case = CASES[name]
    given = case.arguments("cuda", tokens)
    dropped = given["topk_ids"] < 0
    leaves = leaves_of(given)
    if name != "one_choice":  # whose weights multiply tokens
        with torch.no_grad():
            leaves["topk_weights"][dropped] = torch.nan  # of pairs that have no row
    out, found = gradients({**given, **leaves})
    again, repeated = gradients({**given, **leaves})
    want_out, want = reference_gradients(given)
    assert torch.equal(out, again)
    errors = {"out": relative(out, want_out)}
    for leaf, got in found.items():
        assert torch.equal(got, repeated[leaf]), leaf
        assert got.stride() == leaves[leaf].stride(), leaf
        errors[leaf] = relative(got, want[leaf])
    record_property("errors", {leaf: f"{error:.1e}" for leaf, error in errors.items()})
    assert all(error <= LIMITS[case.dtype] for error in errors.values()), errors


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    """Their kernels alone, on rows of any width; what they write may lie where they read."""
    generator = torch.Generator("cuda").manual_seed(0)
    for options, dtype, inter in activations(activation):
        rows, columns = 37, inter * (2 if options.function.gated else 1)
        h = 3 * torch.randn(rows, columns, generator=generator, device="cuda").to(dtype)
        grad = torch.randn(rows, inter, generator=generator, device="cuda").to(dtype)
        h[-1], grad[-1] = torch.nan, torch.nan  # a row of no pair
        inverse = torch.randperm(rows - 1, generator=generator, device="cuda").int()
        inverse = torch.cat([inverse, inverse.new_tensor([-1, rows])]).view(-1, 2)
        weights = torch.rand(inverse.shape, generator=generator, device="cuda")
        loose = {"rtol": 1e-3 if dtype == torch.float16 else 8e-3, "atol": 1e-3}
        active = activate_rows(h, inverse, options)
        want = activate_rows_reference(h.double(), inverse, options)
        torch.testing.assert_close(active[:-1].double(), want[:-1], **loose)
        by_h, weighted = torch.empty_like(h), torch.empty_like(grad)
        by_weight = activate_rows_backward(h, grad, weights, inverse, options, by_h, weighted)
        wanted = activate_rows_backward_reference(
            h.double(), grad.double(), weights.double(), inverse, options
        )
        torch.testing.assert_close(by_h[:-1].double(), wanted[0][:-1], **loose)
        torch.testing.assert_close(weighted[:-1].double(), wanted[1][:-1], **loose)
        torch.testing.assert_close(by_weight.double(), wanted[2], rtol=1e-4, atol=2e-3)
        again = activate_rows_backward(h, grad, weights, inverse, options, h, grad)
        assert torch.equal(again, by_weight)
        assert torch.equal(h[:-1], by_h[:-1]) and torch.equal(grad[:-1], weighted[:-1])


@pytest.mark.parametrize("config", STORED_TILES, ids=lambda config: config.words)
def test_stored_columns(config: GemmSm90Config, monkeypatch: pytest.MonkeyPatch) -> None:
    given = BASE.arguments("cuda")
    x, w13 = given["hidden"], given["w13"]
    table = cm.route(given["topk_ids"], BASE.experts)
    how = products.How(BASE.activation, False, None, None, None, None, None, products.STORED_ROWS)
    monkeypatch.setattr(products, "_decisions", Signatures())
    with forced_config(config):
        up = products.Factor(w13, None, None)
        h, active = products.project_up(x, up, how, table, torch.bfloat16)
    wide = x.double(), w13.double()
    want = cm.grouped_matmul_reference(
        *wide, index=table.index, offsets=table.offsets, out_dtype=torch.float64
    )
    rows = int(table.offsets[-1])
    assert relative(h[:rows], want[:rows]) < 4e-3
    gate, up_columns = want[:rows].chunk(2, 1)
    assert relative(active[:rows], torch.nn.functional.silu(gate) * up_columns) < 4e-3


@pytest.mark.usefixtures("activation_in_products")
def test_a_kept_graph_has_the_same_gradients_again() -> None:
    given = BASE.arguments("cuda")
    leaves = leaves_of(given)
    out = cm.fused_moe(**{**given, **leaves})
    grad, tensors = torch.randn_like(out), list(leaves.values())
    first = torch.autograd.grad(out, tensors, grad, retain_graph=True)
    last = torch.autograd.grad(out, tensors, grad)  # which may write over what was saved
    assert all(torch.equal(a, b) for a, b in zip(first, last, strict=True))


@pytest.mark.usefixtures("activation_in_products")
def test_peak_memory() -> None:
    """h, twice as large as the activation's result, is gone when w2's gradient is computed."""
    case = CASES["plain"]
    given = case.arguments("cuda")
    del given["residual"]
    leaves = leaves_of(given)
    out = cm.fused_moe(**{**given, **leaves})
    grad, tensors = torch.randn_like(out), list(leaves.values())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    found = torch.autograd.grad(out, tensors, grad)
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    active = 2 * given["topk_ids"].numel() * case.inter  # bytes
    assert peak <= sum(tensor.nbytes for tensor in found) + active - 2 * active + _SMALL


def test_main_gradients() -> None:
    given = BASE.arguments("cuda")
    leaves = leaves_of(given)
    _, want = gradients({**given, **leaves_of(given)})
    into = tuple(torch.randn(given[name].shape, device="cuda") for name in ("w13", "w2"))
    before = [tensor.clone() for tensor in into]
    for _ in range(2):
        out = cm.fused_moe(**{**given, **leaves}, grad_into=into)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        out.backward(grad.to(out))
    for name, main, old in zip(("w13", "w2"), into, before, strict=True):
        assert leaves[name].grad is None
        assert relative(main - old, 2 * want[name].double()) < 6e-3


@pytest.mark.parametrize("quant", FROZEN)
@pytest.mark.usefixtures("activation_in_products")
def test_frozen_8_bit_experts(quant: str) -> None:
    """Close to the gradients of the same weights in bfloat16."""
    given = BASE.arguments("cuda")
    wide = dict(given)
    for name in ("w13", "w2"):
        values, scale = cm.quantize_per_channel(given[name], QUANTS[quant])
        wide[name] = (values.float() * scale[..., None]).bfloat16()
        given[name], given[f"{name}_scale"] = values, scale
    leaves = {name: leaf for name, leaf in leaves_of(wide).items() if name not in ("w13", "w2")}
    out, found = gradients({**given, **leaves, "quant": quant})
    want_out, want = gradients({**wide, **leaves})
    limit = {"fp8": 0.1, "int8": 0.04}[quant]
    assert relative(out, want_out.double()) < limit
    for name, gradient in found.items():
        assert relative(gradient, want[name].double()) < limit, name


def test_compiled() -> None:
    given = BASE.arguments("cuda")
    out, want = gradients({**given, **leaves_of(given)})
    compiled = torch.compile(cm.fused_moe, fullgraph=True)
    got, found = gradients({**given, **leaves_of(given)}, call=compiled)
    assert torch.equal(got, out) and all(torch.equal(found[leaf], want[leaf]) for leaf in want)


@pytest.mark.parametrize("recompute", [False, True])
def test_captured_in_a_graph_and_replayed_with_other_tokens(recompute: bool) -> None:
    options = {"recompute": recompute}
    case = replace(BASE, options=options)
    given = case.arguments("cuda")
    leaves = leaves_of(given)
    stream = torch.cuda.Stream()
    grad = torch.randn(given["hidden"].shape, device="cuda").bfloat16()

    def step() -> tuple[Tensor, ...]:
        out = cm.fused_moe(**{**given, **leaves})
        return out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad)

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves["hidden"].copy_(leaves["hidden"].flip(0))
        given["topk_ids"].copy_(given["topk_ids"].roll(5, 0))
    want = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))
