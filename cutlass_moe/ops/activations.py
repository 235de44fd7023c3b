"""The activations between a layer's two products, and their gradients, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cutlass_moe.operands import Numbers
from emitters.spec.epilogue import ActivationFunction

GATED = tuple(str(function) for function in ActivationFunction if function.gated)
NOT_GATED = tuple(str(function) for function in ActivationFunction if not function.gated)
ACTIVATIONS = GATED + NOT_GATED


def is_gated(activation: str | None) -> bool:
    """Whether an activation multiplies a gate with an up value, so that it halves the columns."""
    return activation is not None and ActivationFunction(activation).gated


def activate(
    x: Tensor, activation: str, interleaved: bool = False, numbers: Numbers | None = None
) -> Tensor:
    """Applies an activation: x [..., N] -> [..., N], or [..., N / 2] if it is gated.

    The columns of a gated one are [gate | up], or gate, up, gate, up, ... if interleaved.
    numbers: of a clamped SwiGLU, as `clamped_numbers` gives them. Raises ValueError for an unknown
    activation.
    """
    if activation not in ACTIVATIONS:
        expected = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation must be one of {expected}, got {activation!r}")
    function = ActivationFunction(activation)
    if not function.gated:
        return _ungated(x, function)
    gate, up = _gate_and_up(x, interleaved)
    numbers = numbers or _default_numbers(function)
    if numbers:
        limit, alpha, beta = numbers
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + beta)
    return _ungated(gate, function) * up


def activate_backward(
    grad: Tensor,
    x: Tensor,
    activation: str,
    interleaved: bool = False,
    numbers: Numbers | None = None,
) -> Tensor:
    """The gradient of `activate` with respect to x. grad: the gradient of its result."""
    function = ActivationFunction(activation)
    if not function.gated:
        return grad * _slope(x, function)
    result = torch.empty_like(x)
    gate, up = _gate_and_up(x, interleaved)
    gate_grad, up_grad = _gate_and_up(result, interleaved)
    numbers = numbers or _default_numbers(function)
    if numbers:
        limit, alpha, beta = numbers
        below, inside = gate <= limit, up.abs() <= limit
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        sigmoid = torch.sigmoid(alpha * gate)
        slope = sigmoid * (1 + alpha * gate * (1 - sigmoid))
        gate_grad.copy_(grad * (up + beta) * slope * below)
        up_grad.copy_(grad * gate * sigmoid * inside)
    else:
        gate_grad.copy_(grad * up * _slope(gate, function))
        up_grad.copy_(grad * _ungated(gate, function))
    return result


def _default_numbers(function: ActivationFunction) -> Numbers | None:
    return Numbers() if function is ActivationFunction.SWIGLU_OAI else None


def in_halves(values: Tensor, dim: int = 0) -> Tensor:
    """Values of gate, up, gate, up, ... along `dim`, in the order of all gates, then all ups."""
    first, second = (values[(slice(None),) * dim + (slice(start, None, 2),)] for start in (0, 1))
    return torch.cat([first, second], dim)


def _gate_and_up(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    gate, up = x.chunk(2, -1)
    return gate, up


def _ungated(x: Tensor, function: ActivationFunction) -> Tensor:
    if function in (ActivationFunction.SILU, ActivationFunction.SWIGLU):
        return functional.silu(x)
    if function in (ActivationFunction.GELU, ActivationFunction.GEGLU):
        return functional.gelu(x)
    if function in (ActivationFunction.GELU_TANH, ActivationFunction.GEGLU_TANH):
        return functional.gelu(x, approximate="tanh")
    positive = x.relu()
    return positive.square() if function is ActivationFunction.RELU2 else positive


def _slope(x: Tensor, function: ActivationFunction) -> Tensor:
    """The derivative of `_ungated` at x."""
    ones = torch.ones_like(x)
    if function in (ActivationFunction.SILU, ActivationFunction.SWIGLU):
        return torch.ops.aten.silu_backward(ones, x)
    if function in (ActivationFunction.GELU, ActivationFunction.GEGLU):
        return torch.ops.aten.gelu_backward(ones, x)
    if function in (ActivationFunction.GELU_TANH, ActivationFunction.GEGLU_TANH):
        return torch.ops.aten.gelu_backward(ones, x, approximate="tanh")
    return 2 * x.relu() if function is ActivationFunction.RELU2 else (x > 0).to(x.dtype)
