"""Slices of a tile: 16 rows x 128 bytes in shared memory, between a warp's registers and TMA."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int16, Int32, range_constexpr
from cutlass.experimental import primitives as prims

from emitters.device.memory import CHUNK, ELEMENT, SMEM, vector
from emitters.device.rounding import narrow
from emitters.spec.dtypes import DType
from emitters.spec.staged_sm90 import SLICE_BYTES


class Slices:
    """Writes a warp's float32 values to a slice, in the dtype of the output.

    A slice starts at a multiple of 1024 bytes and has the 128-byte swizzle. WGMMA gives a thread
    rows lane / 4 and 8 more, and of every 8 columns two neighbours from lane % 4 * 2 on.
    """

    def __init__(self, out: DType):
        self.out, self.element = out, ELEMENT[out]
        writes = {1: self.write_bytes, 2: self.write_matrices, 4: self.write_words}
        self.write = writes[out.bytes]

    def attach(self, lane: Int32):
        self.lane = lane

    def chunk(self, slice_: cute.Pointer, row: Int32, chunk: Int32):
        """The address of 16 bytes of a slice."""
        return slice_ + (row * SLICE_BYTES + (chunk ^ (row % 8)) * CHUNK)

    def pair(self, slice_: cute.Pointer, first: int, block: int, half: int):
        """The thread's two neighbours of 8 columns, as words: the block-th after chunk `first`."""
        words = self.element.width // 16
        column = self.lane % 4 * (4 * words)  # in bytes
        chunk = first + block * words + column // CHUNK
        target = self.chunk(slice_, self.lane // 4 + 8 * half, chunk)
        return vector(target + column % CHUNK, Int32, words, SMEM)

    @cute.jit
    def write_matrices(self, slice_: cute.Pointer, values: cute.Tensor, first: cutlass.Constexpr):
        """Writes 16-bit outputs, from chunk `first` on.

        One stmatrix takes two blocks of 8 columns and both row halves.
        """
        for pair in range_constexpr(cute.size(values) // 8):
            part = cute.make_rmem_tensor((8,), Float32)
            packed = cute.make_rmem_tensor((8,), self.element)
            for i in range_constexpr(8):
                part[i] = values[8 * pair + i]
            packed.store(part.load().to(self.element))
            words = cute.recast_tensor(packed, Int32)
            target = self.chunk(slice_, self.lane % 16, first + 2 * pair + self.lane // 16)
            prims.stmatrix(
                target.to_llvm_ptr(),
                [words[0], words[1], words[2], words[3]],
                prims.MMALayout.ROW,
            )

    @cute.jit
    def write_words(self, slice_: cute.Pointer, values: cute.Tensor, first: cutlass.Constexpr):
        """Writes float32 outputs as `write_matrices` does, two neighbours of a thread at a time."""
        for block in range_constexpr(cute.size(values) // 4):
            for half in range_constexpr(2):
                pair = cute.make_rmem_tensor((2,), Float32)
                for c in range_constexpr(2):
                    pair[c] = values[4 * block + 2 * half + c]
                words = cute.recast_tensor(pair, Int32)
                cute.autovec_copy(words, self.pair(slice_, first, block, half))

    @cute.jit
    def write_bytes(self, slice_: cute.Pointer, values: cute.Tensor, first: cutlass.Constexpr):
        """Writes 8-bit outputs as `write_matrices` does, two neighbours of a thread at a time."""
        start = (self.chunk(slice_, self.lane // 4, 0) + self.lane % 4 * 2).toint()
        for chunk in range_constexpr(cute.size(values) // 8):
            part = cute.make_rmem_tensor((8,), Float32)
            for i in range_constexpr(8):
                part[i] = values[8 * chunk + i]
            pairs = cute.recast_tensor(narrow(part, self.out), Int16)
            # as `chunk` has it, by one operation on what does not change
            target = cute.make_ptr(Int16, start ^ ((first + chunk) * CHUNK), SMEM)
            for i in range_constexpr(4):
                offset = i % 2 * 8 * SLICE_BYTES // 2 + i // 2 * 4
                vector(target + offset, Int16, 1, SMEM)[0] = pairs[i]

    @cute.jit
    def add(self, slice_: cute.Pointer, values: cute.Tensor):
        """Adds values to a whole slice, in float32."""
        for block in range_constexpr(cute.size(values) // 4):
            for half in range_constexpr(2):
                place = self.pair(slice_, 0, block, half)
                pair = cute.make_rmem_tensor((2,), self.element)
                words = cute.recast_tensor(pair, Int32)
                cute.autovec_copy(place, words)
                sums = cute.make_rmem_tensor((2,), Float32)
                sums.store(pair.load().to(Float32))
                for c in range_constexpr(2):
                    sums[c] = sums[c] + values[4 * block + 2 * half + c]
                pair.store(sums.load().to(self.element))
                cute.autovec_copy(words, place)
