"""Padded experts and rows by kernels: of ranks whose rows are no multiple of 16 bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import cutlass_moe as cm
from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.layer.checks import problems_of
from cutlass_moe.nn import GatedMoeFeedForward, quantize_
from cutlass_moe.operands import DTYPES, QUANTS, Experts, LayerOperands, LayerOptions
from cutlass_moe.runtime import fallback
from emitters.spec.layer_steps import QuantizeProblem
from emitters.spec.registry import Config, Problem
from tests.support.layer_cases import LIMITS, SMALL, LayerCase, tokens, weights
from tests.support.numerics import same_bits

pytestmark = pytest.mark.gpu
INTERS = (232, 360, 88, 40)
CASES = [
    *((inter, quant, "swiglu") for inter in INTERS for quant in ("int8", "fp8")),
    *((40, quant, act) for quant in ("int8", "fp8") for act in ("swiglu_oai", "relu2")),
    (180, None, "swiglu"),
]
each_case = pytest.mark.parametrize(("inter", "quant", "activation"), CASES)
N, K, EXPERTS = 500, 1025, 4
D, TOP_K = 256, 3  # of modules


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No torch path in a kernel's place."""
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    yield


def arguments(
    inter: int, quant: str | None, activation: str, device: str, count: int = 70
) -> dict[str, Any]:
    """Of fused_moe, as weights come; of relu2 w13 has I rows."""
    case = LayerCase(replace(SMALL.shape, inter=inter, bias=activation == "swiglu_oai"), activation)
    given = {**tokens(case, count, device), **weights(case, quant, device), "quant": quant}
    if activation == "relu2":
        for name in ("w13", "w13_scale"):
            given[name] = given[name][:, :inter].contiguous()
    return given


def pad(given: dict[str, Any]) -> dict[str, Any]:
    found = cm.pad_experts(**{name: given.get(name) for name in Experts._fields})
    return given | {name: value for name, value in found._asdict().items() if value is not None}


def module(quant: str, device: str) -> GatedMoeFeedForward:
    torch.manual_seed(0)
    layer = GatedMoeFeedForward(
        D, 40, 9, top_k=TOP_K, bias=True, dtype=torch.bfloat16, device=device
    )
    quantize_(layer, quant)
    return layer


def product(dtype: torch.dtype, device: str, pad_to: int = 16) -> dict[str, Any]:
    """K 1025 and N 500, padded as `why_not` says."""
    generator = torch.Generator(device).manual_seed(0)
    dense = torch.randn(EXPERTS, N, K, generator=generator, device=device)
    x = torch.randn(60, K, generator=generator, device=device).bfloat16()
    q, x_scale = cm.quantize_per_token(x, dtype, pad_to=pad_to)
    weight, scale = cm.quantize_per_channel(dense, dtype, pad_to=pad_to)
    if pad_to > 1:
        weight, scale = functional.pad(weight, (0, 0, 0, 4)), functional.pad(scale, (0, 4))
    ends = torch.tensor([10, 10, 45, 60], dtype=torch.int32, device=device)
    return {
        **{"x": q, "weight": weight, "offsets": ends},
        **{"per_token_scale": x_scale, "scale": scale},
    }


def images() -> set[tuple[Problem, Config]]:
    problems: set[Problem] = set()
    asked = [pad(arguments(*case, "cpu", 5)) for case in CASES]
    for quant in QUANTS:
        x = torch.empty(5, D, dtype=torch.bfloat16)
        ids = torch.zeros(5, TOP_K, dtype=torch.int32)
        asked.append(module(quant, "cpu")._fused(x, torch.ones(5, TOP_K), ids, None))
    for given in asked:
        options = LayerOptions(**{n: given[n] for n in LayerOptions._fields if n in given})
        layer = LayerOperands(**{n: given.get(n) for n in LayerOperands._fields})
        problems |= {problem for problem in problems_of(layer, options) if problem}
    for dtype in (torch.float8_e4m3fn, torch.int8):
        problems.add(cm.grouped_matmul_problem(**product(dtype, "cpu")))
        for source in (torch.bfloat16, torch.float32):
            for k in (1040, D, 40, 48):  # of products, and of modules' weights
                problems.add(QuantizeProblem(DTYPES[source], DTYPES[dtype], k))
    return {(problem, config) for problem in problems for config in every_config(problem)}


def error(out: Tensor, given: dict[str, Any]) -> float:
    expected = cm.fused_moe_reference(**given, compute_dtype=torch.float64)
    return float((out.double() - expected).norm() / expected.norm())


@each_case
def test_padded_layers_by_kernels(inter: int, quant: str | None, activation: str) -> None:
    """Against the reference on experts as they came; also in a graph."""
    for count in (1, 70):
        given = arguments(inter, quant, activation, "cuda", count)
        wide = pad(given)
        assert cm.why_not(**wide) is None and "pad_experts" in str(cm.why_not(**given))
        out = cm.fused_moe(**wide)
        assert error(out, given) <= 1.5 * LIMITS[quant, None]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = cm.fused_moe(**wide)
        graph.replay()
        assert same_bits(again, out)


def test_layers_that_are_not_padded_say_what_pads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(40, "int8", "swiglu", "cuda")
    with pytest.raises(RuntimeError, match="cutlass_moe.pad_experts .* to 48, once at load"):
        cm.fused_moe(**given)
    monkeypatch.delenv("CUTLASS_MOE_STRICT")
    fallback._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"cutlass_moe\.pad_experts"):
        cm.fused_moe(**given)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_padded_products_by_kernels(dtype: torch.dtype) -> None:
    given, plain = product(dtype, "cuda"), product(dtype, "cpu", pad_to=1)
    for name, value in plain.items():  # the same numbers, without what pads them
        plain[name] = given[name][tuple(map(slice, value.shape))]
    plain["x"], plain["weight"] = plain["x"].contiguous(), plain["weight"].contiguous()
    want = cm.grouped_matmul_reference(**plain).double()
    got = cm.grouped_matmul(**given)[:, :N].double()
    assert (got - want).norm() <= 4e-3 * want.norm()
    with pytest.raises(RuntimeError, match=r"pad K to 1040 .*, and pad N to 504 with zeros"):
        cm.grouped_matmul(**{**plain, "scale": plain["scale"].contiguous()})


@pytest.mark.parametrize("quant", QUANTS)
def test_quantised_modules_by_kernels(quant: str) -> None:
    layer = module(quant, "cuda")
    x = torch.randn(60, D, device="cuda").bfloat16()
    with torch.no_grad():
        out = layer(x).double()
        layer.use_grouped_gemm = False
        want = layer(x).double()
    assert (out - want).norm() <= 3e-2 * want.norm()
