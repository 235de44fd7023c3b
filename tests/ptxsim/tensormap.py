"""Tensor maps with the driver's rules: boxes, strides, swizzles, zeros out of bounds.

The 128 bytes of a CUtensorMap are opaque; here they hold the fields in an order of our own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from tests.ptxsim.memory import Access, GlobalMemory
from tests.ptxsim.ptx import Fault

_MAGIC = 0x70616D74
_LAYOUT = struct.Struct("<IHBBQ5Q4Q5H")


@dataclass(frozen=True)
class TensorMap:
    """dims and box in elements, the innermost first; strides in bytes, of all dims but the first.

    swizzle: 0, 32, 64 or 128 bytes.
    """

    pointer: int
    element_bytes: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    def __post_init__(self) -> None:
        inner = self.box[0] * self.element_bytes
        rules = {
            "pointer must be a multiple of 16": self.pointer % 16 == 0,
            "1 to 5 dims": 1 <= len(self.dims) <= 5,
            "as many boxes as dims": len(self.box) == len(self.dims),
            "dims from 1 to 2^32": all(1 <= d <= 2**32 for d in self.dims),
            "a stride for each outer dim": len(self.strides) == len(self.dims) - 1,
            "strides must be multiples of 16 below 2^40": all(
                s % 16 == 0 and 0 < s < 2**40 for s in self.strides
            ),
            "boxes from 1 to 256": all(1 <= b <= 256 for b in self.box),
            "inner box a multiple of 16 bytes": inner % 16 == 0,
            "inner box within the swizzle": self.swizzle == 0 or inner <= self.swizzle,
            "a known swizzle": self.swizzle in (0, 32, 64, 128),
        }
        broken = [rule for rule, kept in rules.items() if not kept]
        if broken:
            raise ValueError(f"{self}: {'; '.join(broken)}")

    @property
    def box_bytes(self) -> int:
        return int(np.prod(self.box)) * self.element_bytes

    def encode(self) -> bytes:
        rank = len(self.dims)
        pad = [0] * (5 - rank)
        head = (_MAGIC, self.swizzle, rank, self.element_bytes, self.pointer)
        packed = _LAYOUT.pack(*head, *self.dims, *pad, *self.strides, *pad, *self.box, *pad)
        return packed.ljust(128, b"\0")

    @classmethod
    def decode(cls, data: bytes) -> TensorMap:
        magic, swizzle, rank, element_bytes, pointer, *rest = _LAYOUT.unpack_from(data)
        if magic != _MAGIC:
            raise Fault("a copy through something that is no tensor map")
        dims, strides, box = rest[:rank], rest[5 : 4 + rank], rest[9 : 9 + rank]
        return cls(pointer, element_bytes, tuple(dims), tuple(strides), tuple(box), swizzle)

    def _inside(self, corner: list[int]) -> tuple[np.ndarray, slice, np.ndarray]:
        """Of the box at `corner`: which of its rows lie inside, which of their bytes, and the
        addresses of those parts."""
        inside = [
            (c + np.arange(b) >= 0) & (c + np.arange(b) < d)
            for c, b, d in zip(corner, self.box, self.dims, strict=True)
        ]
        row_inside, start = np.ones(1, np.bool_), np.zeros(1, np.int64)
        for i in range(len(self.box) - 1, 0, -1):
            step = (corner[i] + np.arange(self.box[i])) * self.strides[i - 1]
            start = (start[:, None] + step).ravel()
            row_inside = (row_inside[:, None] & inside[i]).ravel()
        columns = np.flatnonzero(inside[0])
        if not len(columns) or not row_inside.any():
            return np.zeros(len(start), np.bool_), slice(0, 0), np.zeros(0, np.int64)
        first, size = int(columns[0]), self.element_bytes
        part = slice(first * size, (first + len(columns)) * size)
        return row_inside, part, self.pointer + start[row_inside] + (corner[0] + first) * size

    def read_box(self, memory: GlobalMemory, by: Access, corner: list[int]) -> np.ndarray:
        """The box at `corner` (may lie outside), uint8 [chunks, 16], zeros out of bounds."""
        row_inside, part, addresses = self._inside(corner)
        rows = np.zeros((len(row_inside), self.box[0] * self.element_bytes), np.uint8)
        if len(addresses):
            rows[row_inside, part] = memory.read_bytes(by, addresses, part.stop - part.start)
        return rows.reshape(-1, 16)

    def write_box(
        self, memory: GlobalMemory, by: Access, corner: list[int], chunks: np.ndarray
    ) -> None:
        """chunks: as `read_box` returns them; what lies out of bounds is dropped."""
        row_inside, part, addresses = self._inside(corner)
        if len(addresses):
            memory.write_bytes(by, addresses, chunks.reshape(len(row_inside), -1)[row_inside, part])

    def targets(self, address: int) -> np.ndarray:
        """Shared addresses of the box's 16-byte chunks, [chunks]."""
        linear = address + 16 * np.arange(self.box_bytes // 16)
        return swizzled(linear, self.swizzle)


def swizzled(addresses: np.ndarray, span: int) -> np.ndarray:
    """16-byte chunks within `span` bytes are permuted by the number of the 128-byte row."""
    mask = span // 16 - 1 if span else 0
    return addresses ^ ((addresses >> 7 & mask) << 4)
