"""Modules and compatible names on a GPU, against float64."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cutlass_moe as cm
from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.compat.deep_gemm import m_grouped_gemm_nt_contiguous, m_grouped_gemm_nt_masked
from cutlass_moe.compat.grouped_gemm.ops import gmm
from cutlass_moe.nn import GatedMoeFeedForward, MoeFeedForward, quantize_
from cutlass_moe.operands import FP8_BLOCK, NAMED_DTYPES, QUANTS
from cutlass_moe.ops.quantize import quantize_per_channel
from cutlass_moe.runtime import fallback
from emitters.spec.dtypes import DType
from emitters.spec.registry import Config, Problem
from emitters.spec.weight_grad import WeightGradProblem
from tests.layer.test_nn import expected
from tests.support.compat_operands import FORMS, dense, pair
from tests.support.numerics import poisoned, same_bits

pytestmark = pytest.mark.gpu

D, H, E, TOP_K = 256, 192, 9, 3
LIMITS = {None: 4e-3, "int8": 5e-3, "fp8": 2e-2, FP8_BLOCK: 1e-2}  # as of the whole layer
LAYERS: dict[str, tuple[type[MoeFeedForward], dict[str, Any]]] = {
    "gated": (GatedMoeFeedForward, {}),
    "shared": (GatedMoeFeedForward, {"num_shared_experts": 2, "bias": True}),
    "gpt_oss": (GatedMoeFeedForward, {"activation": "swiglu_oai", "bias": True}),
    "relu2": (MoeFeedForward, {"activation": "relu2", "scoring": "sigmoid"}),
}


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextmanager
def no_wait() -> Iterator[None]:
    """Where the host waits for the device, an error is raised."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def relative(out: Tensor, want: Tensor) -> float:
    return float(((out.double() - want).norm() / want.norm()).detach())


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").bfloat16()


# Modules


def make(name: str, quant: str | None) -> tuple[MoeFeedForward, dict[str, Any] | None]:
    """A layer, and the quantised weights that it must have."""
    form, options = LAYERS[name]
    torch.manual_seed(0)
    layer = form(D, H, E, top_k=TOP_K, device="cuda", dtype=torch.bfloat16, **options).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 if parameter.dim() == 3 else 0.5)
    layer.router.float()  # else a rounded logit may choose another expert
    if not quant:
        return layer, None
    weights: dict[str, Any] = {}
    for i, part in ((1, "w13"), (2, "w2")):
        wide = getattr(layer, f"w{i}").detach().transpose(1, 2).contiguous()
        if quant == FP8_BLOCK:
            gated = i == 1 and form is GatedMoeFeedForward
            weights[part], weights[f"{part}_scale"] = cm.quantize_per_block(wide, gated=gated)
        else:
            weights[part], weights[f"{part}_scale"] = quantize_per_channel(wide, QUANTS[quant])
    quantize_(layer, quant)
    return layer, weights


@pytest.mark.parametrize("quant", LIMITS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, quant: str | None) -> None:
    layer, weights = make(name, quant)
    # shared experts are torch's: every step of theirs is rounded
    limit = LIMITS[quant] * (1.5 if layer.num_shared_experts else 1)
    for tokens in (0, 1, 7, 300):
        x = randn(tokens, D, seed=tokens)
        with torch.no_grad(), no_warning():
            out = layer(x)
            with no_wait():
                again = layer(x)
        assert out.shape == x.shape and out.dtype == x.dtype
        assert same_bits(out, again)
        if tokens:
            options = {"quant": quant} if quant else {}
            want = expected(layer, x.float(), weights, **options)
            assert relative(out, want) <= limit, tokens


@pytest.mark.parametrize("name", LAYERS)
def test_padded_path_gives_the_same_and_gradients(name: str) -> None:
    layer, _ = make(name, None)
    x = randn(300, D).requires_grad_()
    with torch.no_grad():
        fused = layer(x)
    layer.use_grouped_gemm = False
    with no_warning():
        padded = layer(x)
    assert relative(fused, padded.detach().double()) <= 8e-3
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad(padded.sum(), leaves)
    want = torch.autograd.grad(expected(layer, x.float()).sum(), leaves)
    for mine, right in zip(found, want, strict=True):
        assert relative(mine, right.double()) <= 3e-2


@pytest.mark.parametrize("quant", LIMITS)
def test_layer_in_a_graph(quant: str | None) -> None:
    layer, _ = make("shared", quant)
    x = randn(64, D)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        layer(x)
        with torch.cuda.graph(graph):
            out = layer(x)
        for seed in (1, 2):
            x.copy_(randn(64, D, seed=seed))
            graph.replay()
            assert same_bits(out, layer(x))


@pytest.mark.parametrize(
    ("d", "dtype", "reason"),
    [(D, torch.float32, "hidden must be torch.bfloat16 or"), (20, torch.bfloat16, "16 bytes")],
)
def test_layers_without_kernels(d: int, dtype: torch.dtype, reason: str) -> None:
    torch.manual_seed(0)
    layer = GatedMoeFeedForward(d, H, E, top_k=TOP_K, device="cuda", dtype=dtype)
    layer.router.float()
    x = randn(50, d).to(dtype)
    fallback._warn_once.cache_clear()
    with torch.no_grad(), pytest.warns(UserWarning, match=reason):
        out = layer(x)
    assert relative(out, expected(layer, x.float())) <= 6e-3


def test_a_layer_moves_to_the_gpu() -> None:
    torch.manual_seed(0)
    layer = quantize_(GatedMoeFeedForward(D, H, E, top_k=TOP_K, dtype=torch.bfloat16), "int8")
    x = randn(20, D)
    with torch.no_grad():
        want = layer(x.cpu())
        assert relative(layer.cuda()(x).cpu(), want.double()) <= 2e-2


# grouped_gemm and DeepGEMM

SIZES = {"ragged": [70, 0, 1, 129], "no_rows": [0, 0, 0, 0], "one_hot": [0, 0, 300, 0]}


def images() -> set[tuple[Problem, Config]]:
    """Every (problem, config) that the tests from here on may run."""
    offsets = torch.zeros(4, dtype=torch.int32)
    narrow, wide = torch.empty(1, H).bfloat16(), torch.empty(1, D).bfloat16()
    weight = torch.empty(4, H, D).bfloat16()
    problems: set[Problem] = {
        cm.grouped_matmul_problem(wide, weight, offsets=offsets),
        cm.grouped_matmul_problem(wide, weight.view(4, D, H).transpose(1, 2), offsets=offsets),
        cm.grouped_matmul_problem(narrow, weight.transpose(1, 2), offsets=offsets),
        cm.grouped_matmul_problem(narrow, weight.view(4, D, H), offsets=offsets),
        WeightGradProblem(DType.BF16, DType.BF16, D, H, 4),
        WeightGradProblem(DType.BF16, DType.BF16, H, D, 4),
    }
    for dtype in QUANTS.values():
        operands = torch.empty(1, D).to(dtype), torch.empty(4, H, D).to(dtype)
        scales = {"per_token_scale": torch.ones(1), "scale": torch.ones(4, H)}
        problems.add(cm.grouped_matmul_problem(*operands, offsets=offsets, **scales))
    return {(problem, config) for problem in problems for config in every_config(problem)}


@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_gmm(sizes: list[int], form: str, place: str) -> None:
    trans_a, trans_b = FORMS[form]
    rows, batch_sizes = sum(sizes), torch.tensor(sizes, device=place)
    a = randn(rows, D).requires_grad_()
    shape = (rows, H) if trans_a else (4, H, D) if trans_b else (4, D, H)
    b = randn(*shape, seed=1).requires_grad_()
    with no_warning():
        out = gmm(a, b, batch_sizes, trans_b, trans_a=trans_a)
        grad = randn(*out.shape, seed=2)
        found = torch.autograd.grad(out, (a, b), grad)
    wide_a, wide_b = (x.detach().double().requires_grad_() for x in (a, b))
    parts = zip(wide_a.split(sizes), wide_b.split(sizes) if trans_a else wide_b, strict=True)
    if trans_a:
        want = torch.stack([x.T @ y for x, y in parts])
    else:
        want = torch.cat([x @ (y.T if trans_b else y) for x, y in parts])
    right = torch.autograd.grad(want, (wide_a, wide_b), grad.double())
    for mine, other in zip((out, *found), (want, *right), strict=True):
        assert mine.shape == other.shape
        if other.any():
            assert relative(mine, other) <= 3e-3
        else:
            assert not mine.any()


@pytest.mark.parametrize("trans_b", [False, True])
def test_gmm_does_not_wait(trans_b: bool) -> None:
    a = randn(200, D).requires_grad_()
    b = (randn(4, H, D) if trans_b else randn(4, D, H)).requires_grad_()
    batch_sizes = torch.tensor(SIZES["ragged"], device="cuda")
    grad = randn(200, H)
    for wait in (True, False):
        with no_wait() if not wait else no_warning():
            gmm(a, b, batch_sizes, trans_b=trans_b).backward(grad)


def contiguous_layout(sizes: list[int]) -> Tensor:
    """m_indices of experts in descending order, each padded to a multiple of 128."""
    runs = [[e] * sizes[e] + [-1] * (-sizes[e] % 128) for e in reversed(range(len(sizes)))]
    return torch.tensor(sum(runs, []), dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("dtype", dict.fromkeys(NAMED_DTYPES.values()), ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_contiguous(sizes: list[int], dtype: torch.dtype) -> None:
    m_indices = contiguous_layout(sizes)
    a, b = pair(randn(len(m_indices), D), dtype), pair(randn(4, H, D, seed=1), dtype)
    d = poisoned(len(m_indices), H, torch.bfloat16, "cuda")
    before = d.clone()
    with no_warning():
        m_grouped_gemm_nt_contiguous(a, b, d, m_indices)
        with no_wait():
            m_grouped_gemm_nt_contiguous(a, b, d, m_indices)
    written = m_indices >= 0
    assert same_bits(d[~written], before[~written])
    weights = dense(b)[m_indices.long()[written]]
    want = torch.einsum("mk,mnk->mn", dense(a)[written], weights)
    if len(want):
        assert relative(d[written], want) <= 4e-3


@pytest.mark.parametrize("dtype", dict.fromkeys(NAMED_DTYPES.values()), ids=str)
@pytest.mark.parametrize("masked", [[70, 0, 1, 130], [0] * 4, [-3, 500, 130, 2]], ids=str)
def test_masked(masked: list[int], dtype: torch.dtype) -> None:
    most = 130
    a, b = pair(randn(4, most, D), dtype), pair(randn(4, H, D, seed=1), dtype)
    d = poisoned(4 * most, H, torch.bfloat16, "cuda")
    before = d.clone()
    masked_m = torch.tensor(masked, dtype=torch.int32, device="cuda")
    with no_warning():
        m_grouped_gemm_nt_masked(a, b, d.view(4, most, H), masked_m, 64)
        with no_wait():
            m_grouped_gemm_nt_masked(a, b, d.view(4, most, H), masked_m)
    written = (torch.arange(most, device="cuda") < masked_m[:, None]).flatten()
    assert same_bits(d[~written], before[~written])
    want = torch.einsum("emk,enk->emn", dense(a), dense(b)).view(-1, H)[written]
    if len(want):
        assert relative(d[written], want) <= 4e-3


def test_layouts_in_a_graph() -> None:
    a, b = randn(512, D), randn(4, H, D, seed=1)
    m_indices = contiguous_layout([100, 128, 1, 5])
    d = torch.zeros(512, H, dtype=torch.bfloat16, device="cuda")
    m_grouped_gemm_nt_contiguous(a, b, d, m_indices)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        m_grouped_gemm_nt_contiguous(a, b, d, m_indices)
    m_indices.copy_(contiguous_layout([3, 128, 90, 7]))
    d.zero_()
    graph.replay()
    want = torch.zeros_like(d)
    m_grouped_gemm_nt_contiguous(a, b, want, m_indices)
    assert same_bits(d, want) and want.any()
