"""Correctly rounded quantisation of a few values at a time.

q = x / scale is rounded correctly, without a division per element (Markstein, 1990):

  s = scale * p, y = x * p     p: the power of two that brings the scale near 1
  r = 1 / s, rounded           one division per scale
  q = y * r                    at most two units in the last place off
  q = q - (q * s - y) * r      at most one unit off
  q = q - (q * s - y) * r      the correctly rounded quotient

This also keeps the sign of zeros.
"""

from __future__ import annotations

from collections.abc import Iterable

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.math import fma

from emitters.device.memory import ELEMENT
from emitters.spec.dtypes import DType

_MAGIC = 12582912.0  # 1.5 * 2^23: adding it puts the rounded integer in a float32's low bits


class Divisor:
    """A positive scale to divide by."""

    def __init__(self, scale: Float32):
        self.power = _power_towards_one(scale)
        self.near = scale * self.power
        self.inverse = 1.0 / self.near

    def divide(self, elements: cute.Tensor):
        """Replaces float32 elements by the rounded quotients."""
        for j in range(cute.size(elements)):
            y = elements[j] * self.power
            quotient = y * self.inverse
            for _ in range(2):
                quotient = fma(-fma(quotient, self.near, -y), self.inverse, quotient)
            elements[j] = quotient


def largest_magnitude(values: Iterable[Float32], distances: Iterable[int]) -> Float32:
    """The largest magnitude of some lanes' values, or NaN if they have one.

    values: this lane's. distances: the powers of two by which the numbers of these lanes differ.
    """
    largest = Float32(0.0)
    for value in values:
        largest = cute.arch.fmax(largest, cute.math.absf(value), nan=True)
    for distance in distances:
        other = cute.arch.shuffle_sync_bfly(largest, distance)
        largest = cute.arch.fmax(largest, other, nan=True)
    return largest


def narrow(elements: cute.Tensor, target: DType) -> cute.Tensor:
    """Rounds eight float32 to 8-bit values, ties to even: two words. Overwrites the elements."""
    count = cute.size(elements)
    words = cute.make_rmem_tensor((count // 4,), Int32)
    if target is DType.INT8:
        for j in range(count):
            elements[j] = elements[j] + _MAGIC
        bits = cute.recast_tensor(elements, Int32)
        for j in range(count // 4):
            low = cute.arch.prmt(bits[4 * j], bits[4 * j + 1], 0x0040)
            high = cute.arch.prmt(bits[4 * j + 2], bits[4 * j + 3], 0x0040)
            words[j] = Int32(cute.arch.prmt(low, high, 0x5410))
    else:
        cute.recast_tensor(words, ELEMENT[target]).store(elements.load().to(ELEMENT[target]))
    return words


def round_up_to_power_of_two(value: Float32) -> Float32:
    """The least power of two from a positive value up; infinity and NaN stay."""
    bits = _bits(value)
    rounded = (bits + 0x7FFFFF) & 0x7F800000
    return _float(Int32(cutlass.select_(bits >= 0x7F800000, bits, rounded)))


def _power_towards_one(value: Float32) -> Float32:
    """The power of two that brings a normal number into [1, 2), a subnormal one into [2^-22, 2)."""
    return _float((254 - (_bits(value) >> 23)) << 23)


def _bits(value: Float32) -> Int32:
    word = cute.make_rmem_tensor((1,), Float32)
    word[0] = value
    return cute.recast_tensor(word, Int32)[0]


def _float(bits: Int32) -> Float32:
    word = cute.make_rmem_tensor((1,), Int32)
    word[0] = bits
    return cute.recast_tensor(word, Float32)[0]
