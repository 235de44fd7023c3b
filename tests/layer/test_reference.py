"""Router, combine and layer references against definitions written out token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cutlass_moe.layer.reference import fused_moe_reference
from cutlass_moe.ops.activations import GATED, NOT_GATED
from cutlass_moe.ops.combine import combine_reference
from cutlass_moe.ops.quantize import quantize_per_channel, quantize_per_token
from cutlass_moe.ops.router import topk_router_reference

NAN, INF = math.nan, math.inf


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The router, by published formulas.


def test_mixtral_and_qwen3() -> None:
    logits = randn(50, 16)
    found, ids = topk_router_reference(logits, 4)
    assert ids.dtype == torch.int32 and found.dtype == torch.float64
    for row, token_ids, token_weights in zip(logits.tolist(), ids.tolist(), found, strict=True):
        best = sorted(range(16), key=lambda e: -row[e])[:4]
        assert token_ids == best
        share = [math.exp(row[e]) for e in best]
        want = torch.tensor([s / sum(share) for s in share], dtype=torch.float64)
        torch.testing.assert_close(token_weights, want)


def test_gpt_oss_takes_the_softmax_of_the_chosen() -> None:
    logits = randn(50, 32)
    top, best = logits.topk(4)
    found, ids = topk_router_reference(logits, 4)
    torch.testing.assert_close(found, top.softmax(1))
    assert torch.equal(ids, best.int())


def test_deepseek_v3() -> None:
    """Bias for the choice alone; groups by the sum of their two best; weights renormalised."""
    logits, bias = randn(50, 32), randn(32, seed=1) / 4
    found, ids = topk_router_reference(
        logits, 6, scoring="sigmoid", num_groups=8, topk_groups=4, correction_bias=bias, scale=2.5
    )
    for row, token_ids, token_weights in zip(logits.tolist(), ids.tolist(), found, strict=True):
        score = [1 / (1 + math.exp(-x)) for x in row]
        choice = [s + b for s, b in zip(score, bias.tolist(), strict=True)]
        runs = [range(4 * g, 4 * g + 4) for g in range(8)]
        runs.sort(key=lambda run: -sum(sorted(choice[e] for e in run)[-2:]))
        best = sorted((e for run in runs[:4] for e in run), key=lambda e: -choice[e])[:6]
        assert token_ids == best
        total = sum(score[e] for e in best)
        want = torch.tensor([2.5 * score[e] / total for e in best], dtype=torch.float64)
        torch.testing.assert_close(token_weights, want)


def test_without_renormalisation() -> None:
    logits = randn(9, 8)
    found, ids = topk_router_reference(logits, 3, renormalize=False)
    torch.testing.assert_close(found, logits.softmax(1).gather(1, ids.long()))
    found, ids = topk_router_reference(logits, 3, renormalize=False, scoring="sigmoid", scale=2)
    torch.testing.assert_close(found, 2 * logits.sigmoid().gather(1, ids.long()))


def test_threshold_drops_all_but_the_first() -> None:
    logits = torch.tensor(
        [[0.5, 0.3, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]]
    )
    logits = logits.double().log()
    found, ids = topk_router_reference(logits, 3, threshold=0.26)
    assert ids.tolist() == [[0, 1, -1], [0, -1, -1], [0, -1, -1]]
    want = torch.tensor([[0.625, 0.375, 0], [1, 0, 0], [1, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(found, want)
    found, _ = topk_router_reference(logits, 3, threshold=0.26, renormalize=False)
    assert found[:, 0].tolist() == pytest.approx([0.5, 0.25, 0.97])


ROWS: dict[str, tuple[list[float], list[int], list[float]]] = {  # of 3 experts, renormalised
    "ties": ([1, 2, 2, 2], [1, 2, 3], [1 / 3] * 3),
    "nan": ([NAN, 0, NAN, 0], [1, 3, 0], [0.5, 0.5, 0]),
    "nan_after_minus_infinity": ([NAN, -INF, 0, NAN], [2, 1, 0], [1, 0, 0]),
    "all_nan": ([NAN] * 4, [0, 1, 2], [0, 0, 0]),
    "infinity": ([0, INF, 0, INF], [1, 3, 0], [0.5, 0.5, 0]),
    "all_minus_infinity": ([-INF] * 4, [0, 1, 2], [1 / 3] * 3),
    "vanishing": ([0, -900, -800, -700], [0, 3, 2], [1, 0, 0]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("row", "ids", "weights"), ROWS.values(), ids=ROWS.keys())
def test_softmax_of_odd_rows(
    row: list[float], ids: list[int], weights: list[float], dtype: torch.dtype
) -> None:
    found, chosen = topk_router_reference(torch.tensor([row], dtype=dtype), 3)
    assert chosen.tolist() == [ids]
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert found[0].tolist() == pytest.approx(weights)


GRID = st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0, NAN, INF, -INF])


@settings(max_examples=200, deadline=None)
@given(
    row=st.lists(GRID, min_size=8, max_size=8),
    bias=st.none() | st.lists(st.sampled_from([0.0, 0.125, -0.25, 1.0]), min_size=8, max_size=8),
    groups=st.sampled_from([(1, 1), (2, 1), (4, 1), (4, 3), (8, 5)]),
    k=st.integers(1, 8),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
)
def test_choice_against_a_sort(
    row: list[float], bias: list[float] | None, groups: tuple[int, int], k: int, scoring: str
) -> None:
    num_groups, topk_groups = groups
    size = 8 // num_groups
    k = min(k, size * topk_groups)
    logits = torch.tensor([row], dtype=torch.float64)
    found, ids = topk_router_reference(
        logits,
        k,
        scoring=scoring,
        num_groups=num_groups,
        topk_groups=topk_groups,
        correction_bias=None if bias is None else torch.tensor(bias, dtype=torch.float64),
        renormalize=False,
    )
    top = torch.finfo(torch.float64).max
    numbers = logits.nan_to_num(nan=-INF, posinf=top, neginf=-top)
    score = (numbers.sigmoid() if scoring == "sigmoid" else numbers.softmax(1))[0].tolist()
    if bias is None and num_groups == 1:
        choice = row
    else:
        choice = [s + b for s, b in zip(score, bias or [0.0] * 8, strict=True)]

    def key(e: int) -> tuple[Any, ...]:
        return (math.isnan(row[e]), 0 if math.isnan(row[e]) else -choice[e], e)

    def group_key(g: int) -> tuple[Any, ...]:
        two = sorted(range(g * size, g * size + size), key=key)[:2]
        missing = sum(math.isnan(row[e]) for e in two)
        return (missing, 0 if missing else -sum(choice[e] for e in two), g)

    kept = sorted(range(num_groups), key=group_key)[:topk_groups]
    want = sorted((e for g in kept for e in range(g * size, g * size + size)), key=key)[:k]
    assert ids.tolist() == [want]
    expected = [0.0 if math.isnan(row[e]) else score[e] for e in want]
    assert found[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("missing", [False, True], ids=["numbers", "nan"])
def test_router_gradients(scoring: str, missing: bool) -> None:
    logits = randn(5, 6)
    if missing:
        logits[1, 2] = logits[3] = NAN
    held = logits.isnan()

    def weights(values: Tensor) -> Tensor:
        return topk_router_reference(values.masked_fill(held, NAN), 3, scoring=scoring, scale=1.5)[
            0
        ]

    logits = logits.nan_to_num().requires_grad_()
    assert torch.autograd.gradcheck(weights, (logits,))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": torch.zeros(2, 8, dtype=torch.int32)}, TypeError, "got torch.int32"),
        ({"logits": torch.zeros(8)}, ValueError, r"must be \[T, E > 0\], got \[8\]"),
        ({"logits": torch.zeros(2, 0)}, ValueError, r"got \[2, 0\]"),
        ({"k": 0}, ValueError, "k must be 1 to 8, .* got 0"),
        ({"k": 9}, ValueError, "k must be 1 to 8, .* got 9"),
        ({"k": 5, "num_groups": 4, "topk_groups": 2}, ValueError, "must be 1 to 4, .* got 5"),
        ({"num_groups": 3}, ValueError, "must be a divisor of 8 experts, got 3"),
        ({"num_groups": 0}, ValueError, "must be a divisor of 8 experts, got 0"),
        ({"num_groups": 4, "topk_groups": 5}, ValueError, "must be 1 to num_groups 4, got 5"),
        (
            {"scoring": "relu"},
            ValueError,
            "sqrtsoftplus, got 'relu'",
        ),
        ({"correction_bias": torch.zeros(7)}, ValueError, r"must be \[8\], got \[7\]"),
    ],
)
def test_router_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"logits": torch.zeros(2, 8), "k": 2, **arguments}
    with pytest.raises(error, match=message):
        topk_router_reference(**call)


# combine


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("tokens", [0, 7])
def test_combine(dtype: torch.dtype, with_residual: bool, tokens: int) -> None:
    rows, weights = randn(10, 6).to(dtype), randn(tokens, 3, seed=1)
    rows[9] = NAN
    inverse = torch.randint(-1, 9, (tokens, 3), dtype=torch.int32)
    residual = randn(tokens, 6, seed=2).to(dtype) if with_residual else None
    got = combine_reference(rows, weights, inverse, residual=residual)
    want = torch.zeros(tokens, 6, dtype=torch.float64) if residual is None else residual.double()
    for t in range(tokens):
        for j in range(3):
            if inverse[t, j] >= 0:
                want[t] += weights[t, j] * rows[inverse[t, j]].double()
    assert got.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype))


def test_pairs_without_a_row_add_nothing_and_have_no_gradient() -> None:
    rows = torch.full((2, 3), NAN, requires_grad=True)
    weights = torch.full((4, 2), INF, requires_grad=True)
    inverse = torch.full((4, 2), -1)
    out = combine_reference(rows, weights, inverse)
    out.sum().backward()
    assert rows.grad is not None and weights.grad is not None
    assert not out.any() and not rows.grad.any() and not weights.grad.any()
    none = combine_reference(torch.empty(0, 3), torch.ones(4, 2), inverse)
    assert none.shape == (4, 3) and not none.any()


def test_combine_into_out_of_another_dtype() -> None:
    rows = torch.tensor([[1 + 2**-10]], dtype=torch.float64)
    out = torch.full((1, 1), NAN, dtype=torch.bfloat16)
    got = combine_reference(rows, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32), out=out)
    assert got is out and out.item() == 1


# The layer.


@dataclass(frozen=True)
class Layer:
    tokens: int = 9
    experts: int = 4
    top_k: int = 2
    hidden: int = 16
    inter: int = 8
    activation: str = "swiglu"
    quant: str | None = None
    interleaved: bool = False
    bias: bool = False
    residual: bool = False
    expert_scale: bool = False  # [E] instead of [E, N]
    sentinels: bool = False
    expert_map: bool = False
    capacity_factor: float | None = None


LAYERS = {
    "no_tokens": Layer(tokens=0),
    "one_token": Layer(tokens=1, top_k=1),
    "empty_experts": Layer(tokens=2, experts=9),
    "sentinels": Layer(sentinels=True),
    "expert_map": Layer(expert_map=True),
    "capacity": Layer(capacity_factor=0.5),
    "capacity_and_map": Layer(capacity_factor=0.3, expert_map=True, bias=True),
    "residual": Layer(residual=True, sentinels=True),
    "gpt_oss": Layer(activation="swiglu_oai", interleaved=True, bias=True),
    "fp8": Layer(quant="fp8"),
    "fp8_gpt_oss": Layer(quant="fp8", activation="swiglu_oai", interleaved=True, bias=True),
    "int8": Layer(quant="int8", residual=True),
    "int8_expert_scale": Layer(quant="int8", expert_scale=True, activation="relu2"),
    **{name: Layer(activation=name, bias=True) for name in GATED + NOT_GATED},
}


def arguments_of(layer: Layer) -> dict[str, Any]:
    e, h, i = layer.experts, layer.hidden, layer.inter
    width = 2 * i if layer.activation in GATED else i
    generator = torch.Generator().manual_seed(5)
    ids = torch.rand(layer.tokens, max(e, layer.top_k), generator=generator).argsort(1)
    ids = ids[:, : layer.top_k].int()
    if layer.sentinels:
        ids[::2, 0], ids[1::3, 1] = -1, e
    given: dict[str, Any] = {
        "hidden": randn(layer.tokens, h),
        "w13": randn(e, width, h, seed=1) / 2,
        "w2": randn(e, h, i, seed=2) / 2,
        "topk_weights": randn(layer.tokens, layer.top_k, seed=3).abs(),
        "topk_ids": ids,
        "activation": layer.activation,
        "interleaved": layer.interleaved,
        "capacity_factor": layer.capacity_factor,
    }
    if layer.expert_map:  # of 7 experts in all; 5 and 9 are ids of none
        given["expert_map"] = torch.tensor([2, -1, 0, 3, -1, -1, 1], dtype=torch.int32)
        given["topk_ids"] = torch.randint(-1, 10, ids.shape, generator=generator)
    if layer.bias:
        given["w13_bias"], given["w2_bias"] = randn(e, width, seed=6), randn(e, h, seed=7)
    if layer.residual:
        given["residual"] = randn(layer.tokens, h, seed=8)
    if layer.quant:
        dtype = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}[layer.quant]
        given["hidden"] = given["hidden"].bfloat16()
        given["quant"] = layer.quant
        for name in ("w13", "w2"):
            given[name], scale = quantize_per_channel(given[name].float(), dtype)
            given[f"{name}_scale"] = scale[:, 0].contiguous() if layer.expert_scale else scale
    return given


def activation_of(x: Tensor, layer: Layer) -> Tensor:
    """The definitions, an element at a time."""
    half = len(x) // 2
    pairs = [(x[2 * i], x[2 * i + 1]) for i in range(half)]
    if not layer.interleaved:
        pairs = [(x[i], x[i + half]) for i in range(half)]
    values = {
        "swiglu": lambda: [g / (1 + (-g).exp()) * u for g, u in pairs],
        "geglu": lambda: [g / 2 * (1 + torch.erf(g / 2**0.5)) * u for g, u in pairs],
        "geglu_tanh": lambda: [gelu_tanh(g) * u for g, u in pairs],
        "gelu_tanh": lambda: [gelu_tanh(g) for g in x],
        "reglu": lambda: [max(g, g * 0) * u for g, u in pairs],
        "swiglu_oai": lambda: [
            min(g, g * 0 + 7)
            / (1 + (-1.702 * min(g, g * 0 + 7)).exp())
            * (max(min(u, u * 0 + 7), u * 0 - 7) + 1)
            for g, u in pairs
        ],
        "gelu": lambda: [g / 2 * (1 + torch.erf(g / 2**0.5)) for g in x],
        "silu": lambda: [g / (1 + (-g).exp()) for g in x],
        "relu": lambda: [max(g, g * 0) for g in x],
        "relu2": lambda: [max(g, g * 0) ** 2 for g in x],
    }[layer.activation]()
    return torch.stack(values)


def gelu_tanh(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What the 8-bit form of a row stands for."""
    if dtype is None:
        return x.double()
    q, scale = quantize_per_token(x.float()[None], dtype)
    return (q.double() * scale.double()[:, None])[0]


def definition(layer: Layer, given: dict[str, Any]) -> Tensor:
    """The layer in float64, pair by pair."""
    hidden, ids, weights = given["hidden"], given["topk_ids"], given["topk_weights"]
    dtype = given["w13"].dtype if layer.quant else None
    dense = {}
    for name in ("w13", "w2"):
        scale = given.get(f"{name}_scale", torch.ones(layer.experts)).double()
        dense[name] = given[name].double() * scale.view(layer.experts, -1, 1)
    limit = math.inf
    if layer.capacity_factor is not None:
        experts = 7 if layer.expert_map else layer.experts
        limit = math.ceil(ids.numel() / experts * layer.capacity_factor)
    out = given.get("residual", torch.zeros(hidden.shape, dtype=torch.float64)).clone()
    seen = [0] * layer.experts
    for t in range(layer.tokens):
        for j in range(layer.top_k):
            e = int(ids[t, j])
            if layer.expert_map:
                e = int(given["expert_map"][e]) if 0 <= e < 7 else -1
            if not 0 <= e < layer.experts or seen[e] >= limit:
                continue
            seen[e] += 1
            up = dense["w13"][e] @ rounded(hidden[t], dtype)
            if layer.bias:
                up = up + given["w13_bias"][e]
            active = activation_of(up, layer)
            active = active.bfloat16() if layer.quant else active
            down = dense["w2"][e] @ rounded(active, dtype)
            if layer.bias:
                down = down + given["w2_bias"][e]
            out[t] += weights[t, j] * down
    return out


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_layer_is_the_definition(layer: Layer) -> None:
    given = arguments_of(layer)
    want = definition(layer, given)
    got = fused_moe_reference(**given, compute_dtype=torch.float64)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    # In float32 a value between two 8-bit ones may be rounded to the other.
    close = 2e-2 if layer.quant else 1e-5
    narrow = fused_moe_reference(**given)
    assert narrow.dtype == torch.float32
    assert (narrow.double() - want).norm() <= close * want.norm()


def test_layer_into_out() -> None:
    given = arguments_of(Layer())
    out = torch.full((9, 16), NAN, dtype=torch.bfloat16)
    assert fused_moe_reference(**given, out=out) is out
    torch.testing.assert_close(out, fused_moe_reference(**given).bfloat16(), rtol=0, atol=0)


def test_weights_of_experts_without_rows_are_not_used() -> None:
    given = arguments_of(Layer(tokens=2, experts=9))
    idle = sorted(set(range(9)) - set(given["topk_ids"].flatten().tolist()))
    given["w13"][idle] = given["w2"][idle] = NAN
    assert fused_moe_reference(**given).isfinite().all()


def test_layer_gradients() -> None:
    given = arguments_of(Layer(tokens=4, hidden=5, inter=3, bias=True, sentinels=True))
    names = ("hidden", "w13", "w2", "topk_weights", "w13_bias", "w2_bias")

    def layer(*tensors: Tensor) -> Tensor:
        named = dict(zip(names, tensors, strict=True))
        return fused_moe_reference(**{**given, **named}, compute_dtype=torch.float64)

    assert torch.autograd.gradcheck(layer, [given[name].requires_grad_() for name in names])


def test_expert_map_of_no_experts() -> None:
    given = arguments_of(Layer(residual=True))
    given["expert_map"] = torch.empty(0, dtype=torch.int32)
    out = fused_moe_reference(**given, compute_dtype=torch.float64)
    assert torch.equal(out, given["residual"])


def test_unknown_activation() -> None:
    given = arguments_of(Layer())
    given["activation"] = "tanh"
    with pytest.raises(ValueError, match="activation must be one of swiglu, .* got 'tanh'"):
        fused_moe_reference(**given)
