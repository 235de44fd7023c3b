"""Activations on float32 registers, by fast exponential and reciprocal: relative error 1e-6."""

from __future__ import annotations

import math

import cutlass.cute as cute
from cutlass import Float32

from emitters.spec.gemm import Activation, ActivationFunction

# Abramowitz and Stegun 7.1.26: erfc(z) = t (a1 + t (a2 + ...)) exp(-z^2) for z >= 0, where
# t = 1 / (1 + p z), within 1.5e-7
_ERFC_P = 0.3275911
_ERFC_IS_0 = 20.0  # / sqrt 2, in float32
_ERFC = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def activate(node: Activation, numbers: tuple[Float32, ...], *columns: Float32) -> Float32:
    """Applies the function to gate and up, or to the one column.

    numbers: the values of `node.numbers`. A NaN makes a NaN; so does silu(-inf), as torch's.
    """
    function, x = node.function, columns[0]
    if function is ActivationFunction.SWIGLU_OAI:
        limit, alpha, beta = numbers
        gate = cute.arch.fmin(x, limit, nan=True)
        up = cute.arch.fmin(columns[1], limit, nan=True)
        up = cute.arch.fmax(up, -limit, nan=True)
        value = gate * _sigmoid(alpha, gate) * (up + beta)
    else:
        value = _UNGATED[function](x)
        if function.gated:
            value = value * columns[1]
    return value


def _sigmoid(slope: float | Float32, x: Float32) -> Float32:
    """1 / (1 + exp(-slope x))"""
    power = cute.math.exp2(x * (slope * (-1 / math.log(2))), fastmath=True)
    return cute.arch.rcp_approx(power + 1.0)


def _silu(x: Float32) -> Float32:
    return x * _sigmoid(1.0, x)


def _gelu(x: Float32) -> Float32:
    """x erfc(-x / sqrt 2) / 2 = relu(x) - |x| erfc(|x| / sqrt 2) / 2"""
    size = cute.arch.fmin(cute.arch.fmax(x, -x, nan=True), _ERFC_IS_0, nan=True)
    z = size * math.sqrt(0.5)
    t = cute.arch.rcp_approx(z * _ERFC_P + 1.0)
    sum_ = t * _ERFC[-1]
    for a in _ERFC[-2::-1]:
        sum_ = (sum_ + a) * t
    half = sum_ * cute.math.exp2(z * z * (-1 / math.log(2)), fastmath=True) * 0.5
    return _relu(x) - size * half


def _gelu_tanh(x: Float32) -> Float32:
    """x * sigmoid(2 y), where y = sqrt(2 / pi) * (x + 0.044715 x^3): (1 + tanh y) / 2"""
    return x * _sigmoid(2 * math.sqrt(2 / math.pi), x * (x * x * 0.044715 + 1.0))


def _relu(x: Float32) -> Float32:
    return cute.arch.fmax(x, 0.0, nan=True)


def _relu2(x: Float32) -> Float32:
    positive = _relu(x)
    return positive * positive


_UNGATED = {
    ActivationFunction.SWIGLU: _silu,
    ActivationFunction.SILU: _silu,
    ActivationFunction.GEGLU: _gelu,
    ActivationFunction.GELU: _gelu,
    ActivationFunction.GEGLU_TANH: _gelu_tanh,
    ActivationFunction.GELU_TANH: _gelu_tanh,
    ActivationFunction.REGLU: _relu,
    ActivationFunction.RELU: _relu,
    ActivationFunction.RELU2: _relu2,
}
