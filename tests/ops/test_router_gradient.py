"""The gradient of topk_router against autograd of its reference, and the losses of routers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cutlass_moe as cm
from tests.support.topk_cases import OPTIONS, Case

CASES = {
    **{name: Case(9, 16, 4, options=options) for name, options in OPTIONS.items()},
    "sigmoid_as_is": Case(9, 16, 4, options={"scoring": "sigmoid", "renormalize": False}),
    "sqrtsoftplus_as_is": Case(9, 16, 4, options={"scoring": "sqrtsoftplus", "renormalize": False}),
    "softmax_threshold_as_is": Case(
        9, 16, 4, options={"threshold": 0.1, "renormalize": False, "scale": 3.0}
    ),
    "all_experts": Case(5, 8, 8),
    "one_choice": Case(5, 8, 1),
    "one_choice_as_is": Case(5, 8, 1, options={"renormalize": False}),
    "no_tokens": Case(0, 8, 2),
    "scale_0": Case(5, 8, 2, options={"scale": 0.0}),
}


def gradient(function: Any, logits: Tensor, k: int, options: dict[str, Any]) -> Tensor:
    logits = logits.detach().requires_grad_()
    weights, _ = function(logits, k, **options)
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(weights.shape, generator=generator).to(weights.dtype)
    (found,) = torch.autograd.grad(weights, logits, grad)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_as_autograd_of_the_reference(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    logits, options = case.make()
    logits = logits.to(dtype)
    found = gradient(cm.topk_router, logits, case.k, options)
    want = gradient(cm.topk_router_reference, logits, case.k, options)
    assert found.dtype == dtype and found.shape == logits.shape
    loose = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found, want, rtol=loose, atol=loose)


@pytest.mark.parametrize("name", OPTIONS)
def test_numbers_that_are_not_finite_have_none(name: str) -> None:
    case = replace(CASES[name], tokens=40, how="special")
    logits, options = case.make()
    found = gradient(cm.topk_router, logits, case.k, options)
    assert found.isfinite().all() and not found[~logits.isfinite()].any()


@pytest.mark.parametrize("name", [name for name in CASES if name != "no_tokens"])
def test_gradcheck(name: str) -> None:
    case = CASES[name]
    logits, options = case.make()

    def weights(values: Tensor) -> Tensor:
        return cm.topk_router(values, case.k, **options)[0]

    assert torch.autograd.gradcheck(weights, logits.double().requires_grad_(), eps=1e-7)


def test_ids_have_no_gradient_and_correction_bias_only_chooses() -> None:
    logits, options = CASES["deepseek"].make()
    options["correction_bias"].requires_grad_()
    weights, ids = cm.topk_router(logits.requires_grad_(), 4, **options)
    assert weights.requires_grad and not ids.requires_grad
    weights.sum().backward()
    assert options["correction_bias"].grad is None and logits.grad is not None


def test_route_logits_and_compile() -> None:
    logits, options = CASES["deepseek"].make()
    want = gradient(cm.topk_router, logits, 4, options)

    def routed(logits: Tensor, k: int, **options: Any) -> tuple[Tensor, Tensor]:
        _, weights, ids = cm.route_logits(logits, k, **options)
        return weights, ids

    assert torch.equal(gradient(routed, logits, 4, options), want)
    compiled = torch.compile(cm.topk_router, fullgraph=True, backend="aot_eager")
    assert torch.equal(gradient(compiled, logits, 4, options), want)


# Losses.


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_load_balancing_loss(scoring: str, masked: bool) -> None:
    """Against its formula written out with one-hot vectors, in float64."""
    logits = Case(11, 6, 2).make()[0].double().requires_grad_()
    _, ids = cm.topk_router(logits, 2, scoring=scoring)
    ids[::3, 1] = -1
    ids[1, 0] = 6
    mask = torch.arange(11) % 3 != 0 if masked else None
    found = cm.load_balancing_loss(logits, ids, scoring=scoring, mask=mask)
    counted = torch.arange(11)[slice(None) if mask is None else mask]
    scores = {
        "softmax": lambda x: x.softmax(-1),
        "sigmoid": torch.sigmoid,
        "sqrtsoftplus": lambda x: torch.nn.functional.softplus(x).sqrt(),
    }[scoring](logits[counted])
    shares = scores / scores.sum(-1, keepdim=True)
    one_hot = (ids[counted, :, None] == torch.arange(6)).double()
    want = 6 / 2 * (one_hot.sum(1).mean(0) * shares.mean(0)).sum()
    torch.testing.assert_close(found, want)
    (by_logits,) = torch.autograd.grad(found, logits, retain_graph=True)
    torch.testing.assert_close(by_logits, torch.autograd.grad(want, logits)[0])


def test_a_balanced_router_has_a_load_balancing_loss_of_one() -> None:
    ids = torch.arange(24).view(12, 2) % 8
    loss = cm.load_balancing_loss(torch.zeros(12, 8), ids)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(1)
    crowded = torch.zeros(12, 8)
    crowded[:, 3] = 50.0
    assert cm.load_balancing_loss(crowded, torch.full((12, 1), 3)).item() == pytest.approx(8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_router_z_loss(dtype: torch.dtype) -> None:
    logits = Case(11, 6, 2).make()[0].to(dtype).requires_grad_()
    mask = torch.arange(11) < 4
    for given, rows in ((None, logits), (mask, logits[:4])):
        found = cm.router_z_loss(logits, mask=given)
        wide = rows.to(torch.promote_types(dtype, torch.float32))
        want = wide.exp().sum(-1).log().square().mean()
        torch.testing.assert_close(found, want)
        assert torch.autograd.grad(found, logits)[0].isfinite().all()


def test_no_token_counts() -> None:
    nobody = torch.zeros(4, dtype=torch.bool)
    for logits, ids, mask in (
        (torch.zeros(0, 6), torch.zeros(0, 2, dtype=torch.int32), None),
        (torch.ones(4, 6), torch.zeros(4, 2, dtype=torch.int32), nobody),
    ):
        assert cm.load_balancing_loss(logits, ids, mask=mask) == 0
        assert cm.router_z_loss(logits, mask=mask) == 0


def test_losses_compile_as_one_graph() -> None:
    logits, _ = CASES["softmax"].make()

    def losses(logits: Tensor) -> Tensor:
        weights, ids = cm.topk_router(logits, 2)
        return cm.load_balancing_loss(logits, ids) + cm.router_z_loss(logits) + weights.sum()

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (losses, compiled):
        leaf = logits.clone().requires_grad_()
        function(leaf).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


X, IDS = torch.zeros(4, 6), torch.zeros(4, 2, dtype=torch.int32)
ERRORS = {
    "int": ((X.int(), IDS), {}, TypeError, "logits must have a floating-point dtype"),
    "shape": ((X[0], IDS), {}, ValueError, r"logits must be \[T, E > 0\], got \[6\]"),
    "ids": ((X, IDS.float()), {}, TypeError, "topk_ids must be int32 or int64, got torch.float32"),
    "tokens": ((X, IDS[1:]), {}, ValueError, r"topk_ids must be \[4, k\], got \[3, 2\]"),
    "scoring": ((X, IDS), {"scoring": "tanh"}, ValueError, "scoring must be one of .* got 'tanh'"),
    "mask": ((X, IDS), {"mask": IDS[:, 0]}, TypeError, "mask must be torch.bool, got torch.int32"),
    "masked": ((X, IDS), {"mask": X[0] > 0}, ValueError, r"mask must be \[4\], got \[6\]"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    arguments, options, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        cm.load_balancing_loss(*arguments, **options)
