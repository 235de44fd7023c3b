"""The modules trained by the ops that a GPU would run, here on the CPU's references."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cutlass_moe.nn import GatedMoeFeedForward, MoeFeedForward, quantize_
from tests.layer.test_nn import D, E, H, each_layer, make, tokens
from tests.support.training_cases import relative


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules call fused_moe on a CPU as well; a fallback would warn."""
    monkeypatch.setattr(MoeFeedForward, "_why_no_kernel", lambda *_: None)
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "0")
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no kernel")
        yield


def trained(name: str, dtype: torch.dtype = torch.bfloat16, **more: Any) -> MoeFeedForward:
    layer = make(name, dtype, use_grouped_gemm=True, **more)
    for parameter in layer.parameters():
        parameter.data *= 0.5
    layer.router.float()  # else a rounded logit may choose another expert
    return layer


def gradients(layer: MoeFeedForward, x: Tensor, call: Any = None) -> dict[str, Tensor]:
    """The output, and the gradients of the input and all parameters."""
    x = x.detach().requires_grad_()
    parameters = dict(layer.named_parameters())
    out = (layer if call is None else call)(x)
    generator = torch.Generator(out.device).manual_seed(4)
    grad = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
    found = torch.autograd.grad(out, [x, *parameters.values()], grad)
    return {"out": out, **dict(zip(["x", *parameters], found, strict=True))}


@pytest.mark.parametrize("recompute", [False, True])
@each_layer
def test_gradients(name: str, recompute: bool) -> None:
    layer = trained(name, recompute=recompute)
    x = tokens(2, 20, D, dtype=torch.bfloat16)
    found = gradients(layer, x)
    wide = copy.deepcopy(layer).double()
    wide.use_grouped_gemm = False
    for part, want in gradients(wide, x.double()).items():
        assert found[part].shape == want.shape
        if part == "router.weight" and layer.top_k == 1 and not want.any():
            assert not found[part].any()  # of one renormalised choice
        else:
            assert relative(found[part], want) < 2e-2, part


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek"])
def test_autocast(name: str) -> None:
    layer, x = trained(name, torch.float32), tokens(24, D).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(layer, x)
    layer.use_grouped_gemm = False
    want = gradients(layer, x)
    for part in found:
        assert found[part].dtype == torch.float32
        # a rounded logit may choose another expert
        assert relative(found[part], want[part].double()) < 0.15, part


@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
def test_compiled_in_one_graph(name: str) -> None:
    layer, x = trained(name), tokens(12, D, dtype=torch.bfloat16)
    want = gradients(layer, x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = gradients(layer, x, compiled)
    for part in want:
        torch.testing.assert_close(found[part], want[part], rtol=2e-2, atol=2e-3)


def test_checkpointed() -> None:
    layer, x = trained("deepseek"), tokens(12, D, dtype=torch.bfloat16)
    want = gradients(layer, x)
    found = gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=False))
    assert all(torch.equal(found[part], want[part]) for part in want)


def test_main_gradients() -> None:
    layer, x = trained("shared"), tokens(12, D, dtype=torch.bfloat16)
    want = gradients(layer, x)
    layer.accumulate_into_main_grad = True
    with pytest.raises(ValueError, match="w1.main_grad must be a tensor with accumulate_into"):
        layer(x)
    for parameter in (layer.w1, layer.w2):
        parameter.main_grad = torch.zeros(parameter.shape)
    layer.w2.grad_added_to_main_grad = False
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(x.dtype)
    for _ in range(2):
        layer(x).backward(grad)
    assert layer.w1.grad is None and layer.b1.grad is not None
    assert layer.w2.grad_added_to_main_grad is True and layer.w2.grad is not None
    for name in ("w1", "w2"):
        main = getattr(layer, name).main_grad
        assert relative(main, 2 * want[name].double()) < 1e-2
    layer.w1.requires_grad_(False)
    before = layer.w1.main_grad.clone()
    layer(x).backward(grad)
    assert torch.equal(layer.w1.main_grad, before)


def test_frozen_experts_beside_a_trained_router() -> None:
    layer, x = trained("mixtral"), tokens(12, D, dtype=torch.bfloat16)
    want = gradients(layer, x)
    for parameter in (layer.w1, layer.w2):
        parameter.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.w1.grad is None and layer.router.weight.grad is not None
    assert want["router.weight"].shape == layer.router.weight.grad.shape


@pytest.mark.parametrize("quant", ["fp8", "int8"])
def test_past_quantised_experts(quant: str) -> None:
    """Gradients of the input and of what is not quantised, close to those of the layer before."""
    layer, x = trained("shared"), tokens(24, D, dtype=torch.bfloat16)
    want = gradients(layer, x)
    quantize_(layer, quant).requires_grad_()
    for part, found in gradients(layer, x).items():
        if part != "b1":  # is padded now
            assert relative(found, want[part].double()) < {"fp8": 0.15, "int8": 0.08}[quant], part


class Toy(nn.Module):
    """A residual layer and a linear head."""

    def __init__(self, dtype: torch.dtype, use_grouped_gemm: bool) -> None:
        super().__init__()
        self.layer = GatedMoeFeedForward(
            D, 2 * H, E, top_k=2, num_shared_experts=1, use_grouped_gemm=use_grouped_gemm
        ).to(dtype)
        self.head = nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.to(self.layer.w1.dtype)
        return self.head((x + self.layer(hidden).float()).tanh())[:, 0]


def losses(
    dtype: torch.dtype, use_grouped_gemm: bool, backend: str | None = None, device: str = "cpu"
) -> list[float]:
    """Fifty steps of AdamW on float32 weights, which the model reads in dtype.

    backend: of torch.compile, or None.
    """
    torch.manual_seed(0)
    master = Toy(torch.float32, False).to(device)
    model = Toy(dtype, use_grouped_gemm).to(device)
    model.load_state_dict(master.state_dict())
    step = torch.compile(model, fullgraph=True, backend=backend) if backend else model
    optimizer = torch.optim.AdamW(master.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(256, D, generator=generator).to(device)
    target = (x[:, 0] * x[:, 1]).sin() + x[:, 2:5].abs().sum(1)
    found = []
    for _ in range(50):
        loss = (step(x) - target).square().mean()
        model.zero_grad()
        loss.backward()
        for wide, narrow in zip(master.parameters(), model.parameters(), strict=True):
            wide.grad = narrow.grad.float()
        optimizer.step()
        model.load_state_dict(master.state_dict())
        found.append(loss.item())
    return found


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_fine_tuning_follows_float32(backend: str | None) -> None:
    check_losses(losses(torch.bfloat16, True, backend), losses(torch.float32, False))


def check_losses(found: list[float], want: list[float]) -> None:
    assert want[-1] < 0.3 * want[0]
    for mine, right in zip(found, want, strict=True):
        assert abs(mine - right) < 0.05 * right + 0.01
