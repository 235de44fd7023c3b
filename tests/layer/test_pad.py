"""Experts that are padded once give what the experts as they were give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from cutlass_moe.nn import GatedMoeFeedForward, MoeFeedForward, quantize_
from cutlass_moe.operands import DTYPES, QUANTS, Experts, Numbers, padded
from cutlass_moe.ops.activations import ACTIVATIONS, GATED, activate
from tests.support.layer_cases import SMALL, LayerCase, tokens, weights

INTERS = (232, 360, 88, 40, 4)
each_inter = pytest.mark.parametrize("inter", INTERS)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def arguments(
    inter: int, quant: str | None, activation: str = "swiglu", interleaved: bool = False
) -> dict[str, Any]:
    """Of fused_moe, with biases; of a plain activation w13 has I rows."""
    shape = replace(SMALL.shape, hidden=64, inter=inter, bias=True)
    case = LayerCase(shape, activation, interleaved)
    given = {**tokens(case, 20, "cpu"), **weights(case, quant, "cpu"), "quant": quant}
    if activation not in GATED:
        for name in ("w13", "w13_scale", "w13_bias"):
            if name in given:
                given[name] = given[name][:, :inter].contiguous()
    return given


def pad(given: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with padded experts."""
    experts = {name: given.get(name) for name in Experts._fields}
    found = cm.pad_experts(**experts, interleaved=given["interleaved"])
    return given | {name: value for name, value in found._asdict().items() if value is not None}


def close(got: Tensor, want: Tensor, limit: float) -> bool:
    return bool((got - want).norm() <= limit * want.norm())


def activate_by_columns(x: Tensor, *how: Any) -> Tensor:
    """`activate` with equal bits wherever a value is in its row.

    On the CPU torch computes most of a row with vectors and the rest of it one by one, and the two
    round exp, erf and tanh differently. Here columns are dense, and full vectors.
    """
    rows = x.shape[1]
    dense = x.new_zeros(x.shape[0], x.shape[2], -(-rows // 64) * 64)
    dense[..., :rows] = x.mT
    return activate(dense.mT, *how)[:, :rows]


@each_inter
@each_activation
def test_int8_layers_keep_their_bits(
    inter: int, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if activation not in ("relu", "relu2", "reglu"):
        monkeypatch.setattr("cutlass_moe.layer.padded.activate", activate_by_columns)
    for interleaved in {False, activation in GATED}:
        given = arguments(inter, "int8", activation, interleaved)
        wide = pad(given)
        assert wide["w2"].shape[2] == padded(inter, DTYPES[torch.int8]) == -(-inter // 16) * 16
        assert cm.why_not(**wide) is None and "pad_experts" in str(cm.why_not(**given))
        got, want = cm.fused_moe_reference(**wide), cm.fused_moe_reference(**given)
        assert torch.equal(got, want)
        assert torch.equal(cm.fused_moe(**wide), cm.fused_moe(**given))


@each_inter
@each_activation
@pytest.mark.parametrize("quant", [None, "int8", "fp8"])
def test_layers_keep_their_results(inter: int, activation: str, quant: str | None) -> None:
    for interleaved in {False, activation in GATED}:
        given = arguments(inter, quant, activation, interleaved)
        wide = pad(given)
        assert cm.why_not(**wide) is None
        got, want = (cm.fused_moe_reference(**one) for one in (wide, given))
        assert close(got, want, 1e-5 if quant is None else 5e-3)  # some 8-bit values turn over


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("beta", [0.0, 3.0])
def test_every_activation_of_zero_is_zero(activation: str, beta: float) -> None:
    numbers = Numbers(0.5, 2.0, beta) if activation in ("swiglu", "swiglu_oai") else None
    assert not activate(torch.zeros(2, 8), activation, numbers=numbers).any()


def test_gates_and_ups_are_padded_each() -> None:
    w13 = torch.arange(1.0, 7).view(1, 6, 1).bfloat16()  # gates 1 to 3, ups 4 to 6
    w2 = torch.ones(1, 1, 3, dtype=torch.bfloat16)
    apart = cm.pad_experts(w13, w2, w13_bias=w13[..., 0])
    assert apart.w13[0, :, 0].tolist() == [1, 2, 3, *[0] * 5, 4, 5, 6, *[0] * 5]
    assert torch.equal(apart.w13_bias, apart.w13[..., 0])
    assert apart.w2[0, 0].tolist() == [1, 1, 1, *[0] * 5]
    pairs = cm.pad_experts(w13, w2, interleaved=True, w13_bias=w13[..., 0])
    assert pairs.w13[0, :, 0].tolist() == [1, 2, 3, 4, 5, 6, *[0] * 10]


@pytest.mark.parametrize("shape", [(9, 80), (9, 80, 1), (9,), (9, 1), (9, 2), (1,)], ids=str)
def test_scales_of_every_shape(shape: tuple[int, ...]) -> None:
    given = arguments(40, "int8")
    given["w13_scale"] = torch.rand(shape) + 0.5
    wide = pad(given)
    assert (wide["w13_scale"] is given["w13_scale"]) == (shape[1:2] != (80,))
    assert torch.equal(cm.fused_moe_reference(**wide), cm.fused_moe_reference(**given))


def test_layouts_stay_and_what_needs_no_padding_is_not_copied() -> None:
    w13, w2 = torch.ones(2, 16, 8), torch.ones(2, 8, 16)
    assert cm.pad_experts(w13.int(), w2.to(torch.int8)).w2.shape == (2, 8, 16)
    given = arguments(20, None)
    for name in ("w13", "w2"):
        given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    wide = pad(given)
    assert wide["w13"].stride(1) == wide["w2"].stride(1) == 1  # N-major as before
    assert close(cm.fused_moe_reference(**wide), cm.fused_moe_reference(**given), 1e-5)
    again = pad(wide)
    assert all(again[name] is wide[name] for name in Experts._fields if name in wide)


def test_meta_tensors_and_parameters() -> None:
    given = {n: t.to("meta") for n, t in arguments(40, "fp8").items() if isinstance(t, Tensor)}
    experts = cm.pad_experts(**{name: given.get(name) for name in Experts._fields})
    assert experts.w13.is_meta and experts.w13.shape == (9, 96, 64)
    weight = torch.nn.Parameter(torch.ones(2, 12, 8, dtype=torch.bfloat16))
    assert not cm.pad_experts(weight, weight.mT).w13.requires_grad


@pytest.mark.parametrize(
    ("w13", "w2", "error", "message"),
    [
        ((2, 6, 8), (2, 8, 5), ValueError, r"w13 must be \[E, 2I or I, H\] .* got \(2, 6, 8\)"),
        ((6, 8), (2, 8, 6), ValueError, r"w13 must be \[E, 2I or I, H\]"),
        ((2, 6, 8), None, TypeError, "w2 must be a tensor, got None"),
    ],
)
def test_errors(w13: Any, w2: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cm.pad_experts(torch.ones(w13), None if w2 is None else torch.ones(w2))
    with pytest.raises(TypeError, match="w2 must be one of torch.float8_e4m3fn, .*got torch.int32"):
        cm.pad_experts(torch.ones(2, 6, 8), torch.ones(2, 8, 6).int())


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("form", [MoeFeedForward, GatedMoeFeedForward])
@pytest.mark.parametrize("inter", [40, 232])
def test_modules_pad_what_they_quantise(quant: str, form: Any, inter: int) -> None:
    torch.manual_seed(0)
    layer = form(64, inter, 4, top_k=2, bias=True, dtype=torch.bfloat16, use_grouped_gemm=False)
    for bias in (layer.b1, layer.b2):
        torch.nn.init.normal_(bias)
    x = torch.randn(20, 64).bfloat16()
    plain = layer(x).detach()
    with torch.no_grad():
        assert cm.why_not(**call_of(quantize_(layer, quant), x)) is None
        out = layer(x)
    assert close(out.float(), plain.float(), 0.1)
    loaded = quantize_(form(64, inter, 4, top_k=2, bias=True, dtype=torch.bfloat16), quant)
    loaded.load_state_dict(layer.state_dict())
    loaded.use_grouped_gemm = False
    assert torch.equal(loaded(x), out)


def call_of(layer: MoeFeedForward, x: Tensor) -> dict[str, Any]:
    ids = torch.zeros(len(x), 2, dtype=torch.int32)
    return layer._fused(x, torch.ones(len(x), 2), ids, None)
