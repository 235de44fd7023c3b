"""The element types of operands and outputs, and the ways in which products are summed."""

from __future__ import annotations

import enum


class Name(str, enum.Enum):
    """An enum that prints and serialises as its value."""

    def __str__(self) -> str:
        return str(self.value)


class DType(Name):
    """Element types of operands and outputs."""

    E4M3 = "e4m3"
    E5M2 = "e5m2"
    INT8 = "int8"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    @property
    def bytes(self) -> int:
        return _BYTES[self]

    @property
    def quantized(self) -> bool:
        """Whether values need a scale: 8-bit types."""
        return self.bytes == 1


_BYTES = {
    DType.E4M3: 1,
    DType.E5M2: 1,
    DType.INT8: 1,
    DType.BF16: 2,
    DType.FP16: 2,
    DType.FP32: 4,
}


class Accumulation(Name):
    """The way in which products are summed along K."""

    FAST = "fast"  # fp8: in the tensor core, with about 14 bits
    TWO_LEVEL = "two_level"  # fp8: as FAST, but added to fp32 registers every 128 bytes of K
    FP32 = "fp32"  # bf16 and fp16
    INT32 = "int32"  # int8, exact


ACCUMULATIONS: dict[DType, tuple[Accumulation, ...]] = {  # the first is the default
    DType.E4M3: (Accumulation.FAST, Accumulation.TWO_LEVEL),
    DType.E5M2: (Accumulation.FAST, Accumulation.TWO_LEVEL),
    DType.INT8: (Accumulation.INT32,),
    DType.BF16: (Accumulation.FP32,),
    DType.FP16: (Accumulation.FP32,),
}


OUTPUTS = (DType.BF16, DType.FP16, DType.FP32)


# The largest magnitude in a row after quantisation.
LARGEST = {DType.E4M3: 448.0, DType.E5M2: 57344.0, DType.INT8: 127.0}
