"""Activations on float32 registers, by fast exponential and reciprocal: relative error 1e-6."""

from __future__ import annotations

import math

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from emitters.spec.epilogue import Activation, ActivationFunction

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


def activate_backward(
    node: Activation, numbers: tuple[Float32, ...], *columns: Float32
) -> tuple[Float32, ...]:
    """The value of `activate`, and its derivative by each column."""
    function, x = node.function, columns[0]
    if function is ActivationFunction.SWIGLU_OAI:
        limit, alpha, beta = numbers
        gate = cute.arch.fmin(x, limit, nan=True)
        up = cute.arch.fmin(columns[1], limit, nan=True)
        up = cute.arch.fmax(up, -limit, nan=True)
        sigmoid = _sigmoid(alpha, gate)
        active, factor = gate * sigmoid, up + beta
        slope = (sigmoid + alpha * active * (1.0 - sigmoid)) * factor
        zero = Float32(0.0)
        by_gate = cutlass.select_(x > limit, zero, slope)
        by_up = cutlass.select_(columns[1] > limit, zero, active)
        by_up = cutlass.select_(columns[1] < -limit, zero, by_up)
        return active * factor, Float32(by_gate), Float32(by_up)
    value, slope = _SLOPES[function](x)
    if function.gated:
        return value * columns[1], slope * columns[1], value
    return value, slope


def _sigmoid(slope: float | Float32, x: Float32) -> Float32:
    """1 / (1 + exp(-slope x))"""
    power = cute.math.exp2(x * (slope * (-1 / math.log(2))), fastmath=True)
    return cute.arch.rcp_approx(power + 1.0)


def _silu(x: Float32) -> Float32:
    return x * _sigmoid(1.0, x)


def _gelu(x: Float32) -> Float32:
    """x erfc(-x / sqrt 2) / 2 = relu(x) - |x| erfc(|x| / sqrt 2) / 2"""
    size, half, _ = _gelu_parts(x)
    return _relu(x) - size * half


def _gelu_parts(x: Float32) -> tuple[Float32, Float32, Float32]:
    """|x| or, where that is larger, a number whose erfc is 0; erfc(|x| / sqrt 2) / 2; and
    exp(-x^2 / 2)."""
    size = cute.arch.fmin(cute.arch.fmax(x, -x, nan=True), _ERFC_IS_0, nan=True)
    z = size * math.sqrt(0.5)
    t = cute.arch.rcp_approx(z * _ERFC_P + 1.0)
    sum_ = t * _ERFC[-1]
    for a in _ERFC[-2::-1]:
        sum_ = (sum_ + a) * t
    power = cute.math.exp2(z * z * (-1 / math.log(2)), fastmath=True)
    return size, sum_ * power * 0.5, power


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


def _silu_slope(x: Float32) -> tuple[Float32, Float32]:
    sigmoid = _sigmoid(1.0, x)
    value = x * sigmoid
    return value, sigmoid + value * (1.0 - sigmoid)


def _gelu_slope(x: Float32) -> tuple[Float32, Float32]:
    """cdf + x exp(-x^2 / 2) / sqrt(2 pi), where cdf = erfc(-x / sqrt 2) / 2"""
    size, half, power = _gelu_parts(x)
    cdf = Float32(cutlass.select_(x >= 0.0, 1.0 - half, half))
    return _relu(x) - size * half, cdf + x * power * math.sqrt(0.5 / math.pi)


def _gelu_tanh_slope(x: Float32) -> tuple[Float32, Float32]:
    """s + x s (1 - s) 2 y', where s = sigmoid(2 y); from |x| = 20 on, s is 0 or 1."""
    double = 2 * math.sqrt(2 / math.pi)
    near = cute.arch.fmax(cute.arch.fmin(x, 20.0, nan=True), -20.0, nan=True)
    square = near * near
    sigmoid = _sigmoid(double, near * (square * 0.044715 + 1.0))
    by_y = double * (square * (3 * 0.044715) + 1.0)
    return x * sigmoid, sigmoid + near * sigmoid * (1.0 - sigmoid) * by_y


def _relu_slope(x: Float32) -> tuple[Float32, Float32]:
    return _relu(x), Float32(cutlass.select_(x > 0.0, Float32(1.0), Float32(0.0)))


def _relu2_slope(x: Float32) -> tuple[Float32, Float32]:
    positive = _relu(x)
    return positive * positive, 2.0 * positive


_SLOPES = {
    ActivationFunction.SWIGLU: _silu_slope,
    ActivationFunction.SILU: _silu_slope,
    ActivationFunction.GEGLU: _gelu_slope,
    ActivationFunction.GELU: _gelu_slope,
    ActivationFunction.GEGLU_TANH: _gelu_tanh_slope,
    ActivationFunction.GELU_TANH: _gelu_tanh_slope,
    ActivationFunction.REGLU: _relu_slope,
    ActivationFunction.RELU: _relu_slope,
    ActivationFunction.RELU2: _relu2_slope,
}
