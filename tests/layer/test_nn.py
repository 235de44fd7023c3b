"""The modules against the layer's reference, in float64 where nothing is quantised."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cutlass_moe as cm
from cutlass_moe.layer.reference import fused_moe_reference
from cutlass_moe.nn import GatedMoeFeedForward, MoeFeedForward, quantize_
from cutlass_moe.operands import FP8_BLOCK, QUANTS
from cutlass_moe.ops.quantize import quantize_per_channel
from cutlass_moe.ops.router import topk_router_reference
from cutlass_moe.runtime import fallback

D, H, E = 16, 24, 6
PADDED = 32  # H in quantised layers
LAYERS: dict[str, tuple[type[MoeFeedForward], dict[str, Any]]] = {
    "default": (MoeFeedForward, {}),
    "gated": (GatedMoeFeedForward, {}),
    "relu2": (MoeFeedForward, {"activation": "relu2", "top_k": 2, "bias": True}),
    "mixtral": (GatedMoeFeedForward, {"activation": "swiglu", "top_k": 2}),
    "gpt_oss": (
        GatedMoeFeedForward,
        {"activation": "swiglu_oai", "top_k": 4, "bias": True, "router_bias": True},
    ),
    "deepseek": (
        GatedMoeFeedForward,
        {
            "top_k": 3,
            "num_shared_experts": 1,
            "scoring": "sigmoid",
            "num_groups": 3,
            "topk_groups": 2,
            "correction_bias": True,
            "scale": 2.5,
        },
    ),
    "shared": (MoeFeedForward, {"top_k": 2, "num_shared_experts": 3, "bias": True}),
    "every_expert": (MoeFeedForward, {"top_k": E, "activation": "silu"}),
    "capacity": (GatedMoeFeedForward, {"top_k": 2, "capacity_factor": 0.5}),
    "threshold": (GatedMoeFeedForward, {"top_k": 3, "threshold": 0.2, "renormalize": False}),
}
each_layer = pytest.mark.parametrize("name", LAYERS)
each_quant = pytest.mark.parametrize("quant", QUANTS)


@pytest.fixture(autouse=True)
def _told_nothing_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUTLASS_MOE_STRICT", raising=False)
    fallback._warn_once.cache_clear()
    yield
    fallback._warn_once.cache_clear()


def make(name: str, dtype: torch.dtype = torch.float64, **more: Any) -> MoeFeedForward:
    """A layer with all parameters, biases too, at random."""
    form, options = LAYERS[name]
    torch.manual_seed(0)
    layer = form(D, H, E, dtype=dtype, **{**options, "use_grouped_gemm": False, **more})
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    if layer.correction_bias is not None:
        nn.init.normal_(layer.correction_bias)
    return layer


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def expected(
    layer: MoeFeedForward, x: Tensor, weights: dict[str, Any] | None = None, **options: Any
) -> Tensor:
    """float64 [T, D]: router, experts and shared experts written out."""
    state = {name: part.double() for name, part in layer.named_parameters()}
    logits = x.double() @ state["router.weight"].T + state.get("router.bias", 0.0)
    topk = topk_router_reference(
        logits.to(x.dtype),
        layer.top_k,
        correction_bias=layer.correction_bias,
        **layer.router_options,
    )
    shared = x.new_zeros(len(x), layer.embed_dim, dtype=torch.float64)
    one = x.new_ones(len(x), 1)
    every = torch.zeros(len(x), 1, dtype=torch.int32, device=x.device)
    for s in range(layer.num_shared_experts):
        shared = shared + fused_moe_reference(
            x.double(),
            state["shared_w1"][s : s + 1].transpose(1, 2),
            state["shared_w2"][s : s + 1].transpose(1, 2),
            one,
            every,
            activation=layer.activation,
            w13_bias=state["shared_b1"][s : s + 1] if "shared_b1" in state else None,
            w2_bias=state["shared_b2"][s : s + 1] if "shared_b2" in state else None,
            compute_dtype=torch.float64,
        )
    if weights is None:
        weights = {name: state[f"w{i}"].transpose(1, 2) for i, name in ((1, "w13"), (2, "w2"))}
        x = x.double()
    return fused_moe_reference(
        x,
        topk_weights=topk[0],
        topk_ids=topk[1],
        activation=layer.activation,
        w2_bias=state.get("b2"),
        capacity_factor=layer.capacity_factor,
        residual=shared,
        compute_dtype=torch.float64,
        **{"w13_bias": state.get("b1"), **weights},
        **options,
    )


@each_layer
@pytest.mark.parametrize("shape", [(11, D), (D,), (2, 3, D), (0, D), (4, 0, D)], ids=str)
def test_padded_path(name: str, shape: tuple[int, ...]) -> None:
    layer, x = make(name), tokens(*shape)
    out = layer(x)
    assert out.shape == shape and out.dtype == x.dtype
    want = expected(layer, x.reshape(-1, D))
    torch.testing.assert_close(out.reshape(-1, D), want, rtol=1e-9, atol=1e-9)


@each_layer
def test_gradients(name: str) -> None:
    layer, x = make(name), tokens(11, D).requires_grad_()
    parameters = dict(layer.named_parameters())
    grad = tokens(11, D).flip(0)
    found = torch.autograd.grad(layer(x), [x, *parameters.values()], grad)
    want = torch.autograd.grad(expected(layer, x), [x, *parameters.values()], grad)
    for part, mine, right in zip(["x", *parameters], found, want, strict=True):
        torch.testing.assert_close(
            mine, right, rtol=1e-8, atol=1e-8, msg=lambda m, p=part: f"{p}: {m}"
        )
        assert right.any() or part == "router.weight", part  # of one renormalised choice: zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gpt_oss", "shared"])
def test_narrower_dtypes(name: str, dtype: torch.dtype) -> None:
    layer, x = make(name, dtype), tokens(32, D, dtype=dtype)
    layer.router.float()  # else a rounded logit may choose another expert
    out = layer(x)
    assert out.dtype == dtype
    want = expected(layer, x.float())
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in layer.parameters())
    error = (out.double() - want).norm() / want.norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}[dtype]


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    layer = GatedMoeFeedForward(D, H, E, top_k=2, num_shared_experts=1)
    x, target = tokens(64, D).float(), tokens(64, D).float().flip(0)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_autocast_takes_float32_parameters_and_other_inputs() -> None:
    layer = make("shared", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(tokens(8, D, dtype=torch.bfloat16))
        assert out.dtype == torch.bfloat16
        wide = layer(tokens(8, D).float())
    wide.sum().backward()
    assert layer.w1.grad.dtype == torch.float32
    want = layer(tokens(8, D).float())
    assert (out - want).norm() / want.norm() < 5e-2
    assert 0 < (wide - want).norm() / want.norm() < 5e-2


# Kernels, imitated: fused_moe is called as it should be.


@pytest.mark.parametrize("quant", [None, *QUANTS])
@each_layer
def test_fused_path(name: str, quant: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(name, torch.bfloat16, use_grouped_gemm=True).eval()
    if quant:
        quantize_(layer, quant)
    x = tokens(11, D, dtype=torch.bfloat16)
    with torch.no_grad(), pytest.warns(UserWarning, match="must be on a GPU"):
        want = layer(x)
    seen: dict[str, Any] = {}

    def fused(hidden: Tensor, w13: Tensor, w2: Tensor, *rest: Any, **options: Any) -> Tensor:
        assert options.pop("recompute") is False and options.pop("grad_into") is None
        seen.update(options, w13=w13, w2=w2)
        return fused_moe_reference(hidden, w13, w2, *rest, **options).to(hidden.dtype)

    monkeypatch.setattr(cm, "fused_moe", fused, raising=False)
    monkeypatch.setattr(layer, "_why_no_kernel", lambda *_: None)
    with torch.no_grad():
        got = layer(x)
    assert seen["quant"] == quant
    for mine, parameter, stored in (("w13", "w1", "w1_quantized"), ("w2", "w2", "w2_quantized")):
        weight = getattr(layer, stored if quant else parameter)
        assert seen[mine].data_ptr() == weight.data_ptr()  # in place
        assert seen[mine].stride(2 if quant else 1) == 1
    assert (got.float() - want.float()).norm() / want.float().norm() < 1e-2


def test_warns_once() -> None:
    x = tokens(3, D).float()
    with torch.no_grad():
        with pytest.warns(
            UserWarning, match="slow torch path taken: tensors must be on a GPU, got cpu"
        ):
            make("default", torch.float32, use_grouped_gemm=True)(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make("gated", torch.float32, use_grouped_gemm=True)(x)
            make("gated", torch.float32)(x)


def test_training_tells_of_the_padded_path_too() -> None:
    layer = make("mixtral", torch.bfloat16, use_grouped_gemm=True)
    with pytest.warns(UserWarning, match="slow torch path taken: tensors must be on a GPU"):
        layer(tokens(3, D, dtype=torch.bfloat16)).sum().backward()


def test_strict_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    layer = make("default", torch.float32, use_grouped_gemm=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="must be on a GPU"):
        layer(tokens(3, D).float())


# Quantised layers.


@each_quant
@each_layer
def test_quantised(name: str, quant: str) -> None:
    layer, x = make(name, torch.float32), tokens(64, D).float()
    weights: dict[str, Any] = {}
    for i, part in ((1, "w13"), (2, "w2")):
        dense = getattr(layer, f"w{i}").detach().transpose(1, 2).contiguous()
        if quant == FP8_BLOCK:
            gated = i == 1 and isinstance(layer, GatedMoeFeedForward)
            weights[part], weights[f"{part}_scale"] = cm.quantize_per_block(dense, gated=gated)
        else:
            weights[part], weights[f"{part}_scale"] = quantize_per_channel(dense, QUANTS[quant])
    plain = layer(x).detach()
    weights["w13_bias"] = layer.b1  # before it is padded
    assert quantize_(layer, quant) is layer
    assert layer.w1 is None and layer.w2 is None and layer.quant == quant
    with torch.no_grad():
        out = layer(x)
    want = expected(layer, x, weights, quant=quant)
    # a value between two 8-bit ones may be rounded to the other
    assert (out.double() - want).norm() <= 2e-3 * want.norm()
    assert (
        1e-3
        < (out - plain).norm() / plain.norm()
        < {"fp8": 0.2, "int8": 0.1, FP8_BLOCK: 0.2}[quant]
    )


@each_quant
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek"])
def test_state_dicts_round_trip(name: str, quant: str | None) -> None:
    x = tokens(9, D).float()
    for kind in (None, quant):
        layer, other = make(name, torch.float32), make(name, torch.float32)
        for parameter in other.parameters():
            nn.init.zeros_(parameter)
        if kind:
            quantize_(nn.Sequential(layer, other), kind)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        assert other.load_state_dict(torch.load(file)).missing_keys == []
        with torch.no_grad():
            torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    names = set(layer.state_dict())
    assert {"w1_quantized", "w1_scale", "w2_quantized", "w2_scale"} <= names
    assert not {"w1", "w2"} & names


def test_names_and_shapes_of_state_dicts() -> None:
    def shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(part.shape) for name, part in layer.state_dict().items()}

    assert shapes(MoeFeedForward(D, H, E)) == {
        "w1": (E, D, H),
        "w2": (E, H, D),
        "router.weight": (E, D),
    }
    layer = GatedMoeFeedForward(
        D, H, E, num_shared_experts=2, bias=True, router_bias=True, correction_bias=True
    )
    assert shapes(layer) == {
        "w1": (E, D, 2 * H),
        "w2": (E, H, D),
        "b1": (E, 2 * H),
        "b2": (E, D),
        "shared_w1": (2, D, 2 * H),
        "shared_w2": (2, H, D),
        "shared_b1": (2, 2 * H),
        "shared_b2": (2, D),
        "router.weight": (E, D),
        "router.bias": (E,),
        "correction_bias": (E,),
    }
    assert shapes(quantize_(layer, "int8")) | {"w1": (), "w2": ()} == {
        **shapes(layer),
        "w1": (),
        "w2": (),
        "b1": (E, 2 * PADDED),
        "w1_quantized": (E, 2 * PADDED, D),
        "w1_scale": (E, 2 * PADDED),
        "w2_quantized": (E, D, PADDED),
        "w2_scale": (E, D),
    }


def test_state_dict_of_another_quantisation_is_refused() -> None:
    fp8, int8 = quantize_(make("default"), "fp8"), quantize_(make("default"), "int8")
    with pytest.raises(TypeError, match="w1_quantized must be torch.int8, got torch.float8_e4m3fn"):
        int8.load_state_dict(fp8.state_dict())
    with pytest.raises(RuntimeError, match="w1_quantized"):
        make("default").load_state_dict(fp8.state_dict())


@each_quant
def test_casts_and_copies_keep_quantised_weights(quant: str) -> None:
    layer = quantize_(make("deepseek", torch.float32), quant)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    copied = copy.deepcopy(layer).bfloat16().to("cpu", torch.float32).half().float()
    assert len(before) == 5
    for name, buffer in copied.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer.float(), before[name].float())
    assert layer.bfloat16().router.weight.dtype == torch.bfloat16
    assert layer(tokens(3, D, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.to("meta").w1_quantized.device.type == "meta"


def test_quantize_finds_all_layers_within() -> None:
    model = nn.Sequential(
        nn.Linear(D, D), nn.ModuleDict({"a": make("default"), "b": make("gated")})
    )
    quantize_(model, "int8")
    assert [layer.quant for layer in model[1].values()] == ["int8", "int8"]
    assert model[0].weight.requires_grad
    assert not any(p.requires_grad for p in model[1].parameters())


def test_quantised_layers_have_no_gradient() -> None:
    layer = quantize_(make("default", torch.float32), "fp8")
    x = tokens(3, D).float().requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient without kernels .* use_grouped_gemm"):
        layer(x)
    assert not layer(x.detach()).requires_grad
    with torch.no_grad():
        layer(x)


@pytest.mark.parametrize(
    ("module", "quant", "message"),
    [
        (nn.Linear(D, D), "fp8", "MoeFeedForward layers, got Linear"),
        (MoeFeedForward(D, H, E), "fp4", "must be 'fp8', .*'mxfp4', got 'fp4'"),
        (quantize_(MoeFeedForward(D, H, E), "fp8"), "int8", "got one that is fp8 already"),
    ],
)
def test_quantize_errors(module: nn.Module, quant: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_(module, quant)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 0}, "embed_dim must be a positive number, got 0"),
        ({"hidden_dim": -1}, "hidden_dim must be a positive number, got -1"),
        ({"num_experts": 0}, "num_experts must be a positive number, got 0"),
        ({"num_shared_experts": -1}, "num_shared_experts must be 0 or more, got -1"),
        ({"activation": "swiglu"}, "must be one of gelu, .*, got 'swiglu'"),
        ({"top_k": 7}, "k must be 1 to 6, .* got 7"),
        ({"num_groups": 4}, "must be a divisor of 6 experts, got 4"),
        ({"scoring": "none"}, "got 'none'"),
        ({"capacity_factor": -1.0}, "capacity_factor must be 0 or more and finite, got -1.0"),
        ({"capacity_factor": math.nan}, "capacity_factor must be 0 or more and finite, got nan"),
        ({"num_shared_experts": -1}, "num_shared_experts must be 0 or more, got -1"),
        ({"top_k": 0}, "k must be 1 to 6, .* got 0"),
        ({"scale": math.inf}, "scale must be a finite float32, got inf"),
        ({"threshold": math.nan}, "threshold must be a finite float32, got nan"),
    ],
)
def test_constructor_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoeFeedForward(**{"embed_dim": D, "hidden_dim": H, "num_experts": E, **options})
    with pytest.raises(ValueError, match="must be one of swiglu, .*, got 'gelu'"):
        GatedMoeFeedForward(D, H, E, "gelu")


def test_input_errors() -> None:
    layer = MoeFeedForward(D, H, E)
    with pytest.raises(ValueError, match=r"hidden must be \[\.\.\., 16\], got \[3, 8\]"):
        layer(torch.zeros(3, 8))
    with pytest.raises(TypeError, match="must be torch.float32 .*, got torch.bfloat16"):
        layer(torch.zeros(3, D).bfloat16())


def test_initial_weights_are_those_of_linear_layers() -> None:
    torch.manual_seed(0)
    layer = GatedMoeFeedForward(64, 256, 4, bias=True)
    for weight in (layer.w1, layer.w2):
        bound = 1 / math.sqrt(weight.shape[1])
        assert 0.95 * bound < weight.abs().max() <= bound
    assert not layer.b1.any() and not layer.b2.any()
    assert "num_experts=4" in repr(layer) and "quant=None" in repr(layer)
