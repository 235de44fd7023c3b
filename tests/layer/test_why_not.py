"""Why layers and products have no kernel: the words, which padding they name, and who asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import cutlass_moe as cm
from cutlass_moe.layer.chain import find_chain
from cutlass_moe.nn import GatedMoeFeedForward
from cutlass_moe.operands import LayerOperands, LayerOptions, split_product
from cutlass_moe.ops import dispatch
from cutlass_moe.ops._checks import check
from cutlass_moe.runtime import fallback, library
from emitters.spec.gemm import GemmProblem

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def product(n: int, k: int, dtype: torch.dtype = BF16, **others: Any) -> dict[str, Any]:
    scales: dict[str, Any] = {}
    if dtype.itemsize == 1:
        scales["per_token_scale"] = meta(8, dtype=torch.float32)
        scales["scale"] = meta(4, n, dtype=torch.float32)
    ends = meta(4, dtype=torch.int32)
    x, weight = meta(8, k, dtype=dtype), meta(4, n, k, dtype=dtype)
    return {"x": x, "weight": weight, "offsets": ends, **scales, **others}


def layer(
    experts: int = 8,
    k: int = 2,
    width: int = 64,
    inter: int = 16,
    *,
    weight: torch.dtype = BF16,
    **others: Any,
) -> dict[str, Any]:
    given = {
        "hidden": meta(8, width),
        "w13": meta(experts, 2 * inter, width, dtype=weight),
        "w2": meta(experts, width, inter, dtype=weight),
        "topk_weights": meta(8, k, dtype=torch.float32),
        "topk_ids": meta(8, k, dtype=torch.int32),
    }
    if weight.itemsize == 1:
        given["w13_scale"] = meta(experts, 2 * inter, dtype=torch.float32)
        given["w2_scale"] = meta(experts, width, dtype=torch.float32)
        given["quant"] = "int8" if weight == torch.int8 else "fp8"
    return given | others


PADDED_K = "pad K to 1040 with quantize_per_token(x, dtype, pad_to=16) and quantize_per_channel("
PADDED_N = "pad N to 504 with zeros in weight, scale and bias, and drop the last 4 columns"
PRODUCTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "served": (product(512, 1024, FP8), ()),
    "k_1025": (product(512, 1025, FP8), ("K must be a multiple of 16", "got 1025", PADDED_K)),
    "n_500": (product(500, 1024, torch.int8), ("N must be a multiple of 8", PADDED_N)),
    "k_and_n": (product(500, 1025, torch.int8), (PADDED_K, ", and ", PADDED_N)),
    "n_500_float32": (product(500, 1024, torch.int8, out_dtype=torch.float32), ()),
    "k_100": (product(512, 100), ("got 100; pad K to 104 with zeros in x and weight",)),
    "n_major": (
        product(500, 64, weight=meta(4, 64, 500).mT, out_dtype=torch.float32),
        ("pad N to 504",),
    ),
    "gated": (
        product(500, 64, activation="swiglu"),
        ("got 500; pad gates and ups to 256 each with", "drop the last 6 columns"),
    ),
    "sm_80": (product(512, 1025, FP8, arch="sm_80"), ("arch must be sm_90a", "got sm_80")),
    "refused": (product(512, 64, offsets=meta(3, dtype=torch.int32)), ("offsets must have shape",)),
}
TO_32 = "cutlass_moe.pad_experts pads the experts' inner size to 32, once at load"
LAYERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "bf16": (layer(), ()),
    "fp16_hidden": (layer(weight=torch.int8, hidden=meta(8, 64).half()), ()),
    "fp8": (layer(inter=32, weight=FP8), ()),
    "float32": (layer(hidden=meta(8, 64).float()), ("hidden must be torch.bfloat16 or",)),
    "autocast": (layer(w13=meta(8, 32, 64).half()), ("w13 must be torch.bfloat16, got",)),
    "bias": (layer(w2_bias=meta(8, 64).double()), ("w2_bias must be", "got torch.float64")),
    "hidden_68": (layer(width=68), ("K must be a multiple of 8", "got 68")),
    "inter_12": (layer(inter=12), ("a multiple of 16", "inner size to 16, once")),
    "inter_24": (layer(inter=24, weight=torch.int8), ("a multiple of 16", TO_32)),
    "inter_24_bf16": (layer(inter=24), ()),
    "inter_24_and_hidden_68": (layer(width=68, inter=24, weight=FP8), ("got 68",)),
    "5000_experts": (layer(experts=5000), ("got 5000",)),
    "33_choices": (layer(experts=64, k=33), ("top_k must be 1 to 32, got 33",)),
    "sm_80": (layer(arch="sm_80"), ("arch must be sm_90a", "got sm_80")),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    given, words = PRODUCTS[name]
    reason = cm.why_not(**given)
    assert (reason is None) == (words == ())
    assert all(part in str(reason) for part in words), reason
    others = {n: value for n, value in given.items() if n not in ("x", "weight")}
    assert cm.why_not(given["x"], given["weight"], **others) == reason
    assert cm.why_not(given["x"], weight=given["weight"], **others) == reason


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    given, words = LAYERS[name]
    reason = cm.why_not(**given)
    assert (reason is None) == (words == ())
    assert all(part in str(reason) for part in words), reason
    if reason is None:
        assert "got sm_80" in str(cm.why_not(**given, arch="sm_80"))
    tensors = [given[field] for field in LayerOperands._fields[:5]]
    others = {n: value for n, value in given.items() if n not in LayerOperands._fields[:5]}
    assert cm.why_not(*tensors, **others) == reason


def test_the_named_padding_mends_products() -> None:
    """Of K and of N, as the words say; the product is that of the plain numbers."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(4, 500, 1025, generator=generator)
    x, ends = torch.randn(8, 1025, generator=generator), torch.tensor([2, 2, 5, 8]).int()
    results = []
    for pad_to in (1, 16):
        q, x_scale = cm.quantize_per_token(x, torch.int8, pad_to=pad_to)
        weight, scale = cm.quantize_per_channel(dense, torch.int8, pad_to=pad_to)
        if pad_to > 1:
            weight, scale = functional.pad(weight, (0, 0, 0, 4)), functional.pad(scale, (0, 4))
        given = {"offsets": ends, "per_token_scale": x_scale, "scale": scale}
        assert (cm.why_not(q, weight, **given) is None) == (pad_to > 1)
        results.append(cm.grouped_matmul(q, weight, **given)[:, :500])
    assert torch.equal(*results)


def test_a_gradient_that_would_be_lost_is_a_reason() -> None:
    given = layer(weight=FP8, hidden=meta(8, 64).requires_grad_(), reduce="none")
    assert "no gradient here and an argument requires one: reduce" in str(cm.why_not(**given))
    with torch.no_grad():
        assert cm.why_not(**given) is None
    assert cm.why_not(**layer(hidden=meta(8, 64).requires_grad_())) is None
    narrow = layer(inter=12, hidden=meta(8, 64).requires_grad_())
    assert "pad_experts" in str(cm.why_not(**narrow))
    assert cm.why_not(**product(64, 64, x=meta(8, 64).requires_grad_())) is None


WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "nothing": ((), {}, "x, weight or hidden, .* must be given, got 0 by position"),
    "one": ((meta(1),), {}, "must be given, got 1 by position$"),
    "three": ((meta(1),) * 3, {}, "must be given, got 3 by position$"),
    "six": ((meta(1),) * 6, {}, "must be given, got 6 by position$"),
    "twice": ((meta(1), meta(1)), {"x": meta(1)}, "a keyword argument must be one of .* got 'x'"),
    "unknown": ((), layer(colour="red"), "a keyword argument must be one of .* got 'colour'"),
    "offsets": ((meta(1), meta(1)), {}, "'offsets' must be given"),
    "text": ((), product(8, 8, x="text"), "x must be a tensor, got 'text'"),
    "list": ((), layer(w2=[1]), "w2 must be a tensor, got a list"),
    "bool": ((), layer(interleaved="yes"), "interleaved must be a bool, got 'yes'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_errors(name: str) -> None:
    tensors, arguments, message = WRONG[name]
    with pytest.raises(TypeError, match=message):
        cm.why_not(*tensors, **arguments)


def test_asks_once_per_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [product(8, 24, FP8), layer(inter=88, weight=FP8)]
    first = [cm.why_not(**given) for given in asked]
    monkeypatch.setattr(GemmProblem, "why_illegal", lambda self: pytest.fail("asked again"))
    assert [cm.why_not(**given) for given in asked] == first != [None, None]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes arguments whose tensors say that they are on a GPU."""
    monkeypatch.delenv("CUTLASS_MOE_STRICT", raising=False)
    monkeypatch.setattr(library, "device_arch", lambda device: "sm_90a")
    fallback._warn_once.cache_clear()
    with FakeTensorMode():
        yield lambda given: {
            n: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
            if isinstance(t, Tensor)
            else t
            for n, t in given.items()
        }
    fallback._warn_once.cache_clear()


def test_fallbacks_say_the_same(gpu: Any) -> None:
    given = product(500, 1025, FP8)
    operands, options = split_product(**split(gpu(given)))
    with pytest.warns(UserWarning) as told:
        assert dispatch._choose(operands, check(operands, options), options) is None
    assert str(told[0].message).endswith(f"slow torch path taken: {cm.why_not(**given)}")
    given = layer(inter=24, weight=FP8)
    operands = gpu(given)
    tensors = LayerOperands(**{n: t for n, t in operands.items() if isinstance(t, Tensor)})
    found = find_chain(tensors, LayerOptions("fp8"), torch.empty_like(tensors.hidden))
    assert found.why_not == cm.why_not(**given) == cm.why_not(**operands) != None  # noqa: E711


def split(given: dict[str, Any]) -> dict[str, Any]:
    rest = {n: value for n, value in given.items() if n not in ("x", "weight")}
    return {"x": given["x"], "weight": given["weight"], "arguments": rest}


def test_modules_ask_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = GatedMoeFeedForward(64, 12, 4, dtype=BF16)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(cm, "why_not", lambda hidden, **call: f"no {sorted(call)}")
    call = module._fused(torch.ones(8, 64).bfloat16(), meta(8, 1), meta(8, 1), None)
    assert module._why_no_kernel(call) == f"no {sorted({*call} - {'hidden'})}"
