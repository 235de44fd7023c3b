"""Packed 4-bit weights: the memory layout that kernels read, in numbers alone.

A packed tensor of experts' weights [E, N, K] is uint8 [E, N / 32, K / 128, block bytes]. A block
holds 32 rows x 128 of K as four units of 8 rows each, and a unit holds

  512 bytes                      values: 16 bytes for each lane of a warp, in the lanes' order
  8 rows x (128 / group) scales  bf16 or, for MXFP4, one byte each; a row's follow each other

Lane 4 g + t has row g of the unit. Its four little-endian words hold 32 elements of K each, the
t-th pairs of every 8: word i, of which `POSITIONS` says where the bits of each element lie, has

  pair p   elements 32 i + 8 p + 2 t and, in the word's upper 16 bits, the next one; p = 0 .. 3

which is the order in which WGMMA wants its A operand in registers. K is padded with zeros to whole
blocks.
"""

from __future__ import annotations

from emitters.spec.dtypes import Name

BLOCK_ROWS = 32
UNIT_ROWS = 8
BLOCK_K = 128
UNITS = BLOCK_ROWS // UNIT_ROWS
VALUE_BYTES = UNIT_ROWS * BLOCK_K // 2  # of a unit
LANE_BYTES = 16  # of a unit's values


class Packing(Name):
    """The formats of 4-bit weights: codes, and the elements of K that share a scale."""

    INT4_G128 = "int4_g128"  # code - 8, times a bf16 scale
    INT4_G32 = "int4_g32"
    MXFP4 = "mxfp4"  # E2M1, times a power of two (E8M0)

    @property
    def group(self) -> int:
        """The elements of K that share a scale."""
        return 128 if self is Packing.INT4_G128 else 32

    @property
    def groups(self) -> int:
        """The scales of a row in a block."""
        return BLOCK_K // self.group

    @property
    def scale_bytes(self) -> int:
        return 1 if self is Packing.MXFP4 else 2

    @property
    def unit_bytes(self) -> int:
        return VALUE_BYTES + UNIT_ROWS * self.groups * self.scale_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, which tell the formats apart: 2112, 2304 and 2176."""
        return UNITS * self.unit_bytes

    @property
    def positions(self) -> tuple[tuple[int, ...], ...]:
        """The bits that hold a code's bits 0 to 3, for each pair of a word.

        Of 16 for each element of the pair; from 16 on, of the other element's 16. An E2M1 is spread
        so that few shifts, one of them a rotation, and masks move its sign, exponent and mantissa
        to where bf16 has them: bits 15, 8, 7 and 6.
        """
        if self is Packing.MXFP4:
            return (4, 5, 6, 13), (0, 1, 2, 9), (10, 11, 12, 19), (14, 7, 8, 15)
        return tuple(tuple(range(4 * pair, 4 * pair + 4)) for pair in range(4))

    def blocks(self, n: int, k: int) -> tuple[int, int]:
        """The blocks along N and along K of weights [N, K]; N is a multiple of 32."""
        return n // BLOCK_ROWS, -(-k // BLOCK_K)


# Integers, with more than MMA_ROWS rows: the power of two of a scale is multiplied into the values,
# its mantissa into sums. Scales below 2^-126, subnormal bf16, count as 0.
INT4_LIMIT = 2.0**120  # of scales: 136 times their power of two must be finite
# MXFP4: values are converted to bf16 that are 2^32 times too small, and sums multiplied by 2^32, so
# that scales up to 2^33 have a finite factor. It turns an E2M1 in the places above, a bf16 2^126
# times too small, into such a value: a scale 2^(s - 127) is stored as s + 94, the factor's exponent
# field. The byte is rotated right by one bit: bf16 has the last bit of its exponent in another byte
# than the rest. Values below 2^-101, subnormal bf16 then, are rounded.
MXFP4_SHIFT = 32
E8M0_OFFSET = 126 - MXFP4_SHIFT
E8M0_LARGEST = 128 + MXFP4_SHIFT  # the largest s with a finite factor
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; with 8 added, negative
