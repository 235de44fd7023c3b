"""The gather iterator: copies rows of x, named by the index table, to a stage of shared memory."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, Uint32, const_expr, range_constexpr

from emitters.device.memory import CHUNK, VECTOR, copy_chunk
from emitters.device.parameters import Gathered
from emitters.spec.staged_sm90 import K_TILE_BYTES, WARPGROUP

ROW_THREADS = K_TILE_BYTES // CHUNK  # that copy a row
ROWS_PER_PASS = WARPGROUP // ROW_THREADS  # of copies, a thread's next row being that much further


class GatherIterator:
    """Copies 128 bytes of each of some gathered rows to a stage, by cp.async of 16 bytes.

    Eight threads copy a row. A thread copies the same 16 of every 128 bytes of the same rows
    (every 16th), so it reads the index once for all that is copied of them. Rows past the expert's
    end, rows with an index outside [0, T), and bytes past the end of a row become zeros; nothing is
    read for them. Stages have the 128-byte swizzle that WGMMA reads.

    gather: whether rows are read through an index; row_bytes: of x; rows: to copy at a time.
    """

    def __init__(self, gather: bool, row_bytes: int, rows: int):
        self.gather, self.row_bytes = gather, row_bytes
        self.rows, self.passes = rows, -(-rows // ROWS_PER_PASS)

    def attach(self, gathered: Gathered, thread: Int32):
        """Binds x and its index, and finds this thread's rows. thread: 0 .. 127, in its role."""
        self.x, self.index, self.num_tokens, self.x_stride = gathered
        self.row, self.lane = thread // ROW_THREADS, thread % ROW_THREADS
        self.column = self.lane * CHUNK
        # a thread's rows are 16 apart, so its chunk has the same swizzle in all of them
        self.target = self.row * K_TILE_BYTES + (self.column ^ (self.row % 8 * CHUNK))
        self.tokens = cute.make_rmem_tensor((self.passes,), Int32)
        self.sources = cute.make_rmem_tensor((self.passes,), Int64)
        self.sizes = cute.make_rmem_tensor((self.passes,), Int32)
        self.next_tokens = cute.make_rmem_tensor((self.passes,), Int32)

    @cute.jit
    def fetch(self, first_row: Int32, rows: Int32):
        """Starts reading the index entries of the rows after these; -1 marks a row of zeros."""
        for i in range_constexpr(self.passes):
            row = self.row + i * ROWS_PER_PASS
            token = Int32(-1)
            if row < rows:
                token = first_row + row
                if const_expr(self.gather):
                    token = cute.make_tensor(self.index, cute.make_layout(VECTOR))[first_row + row]
            self.next_tokens[i] = token

    @cute.jit
    def advance(self):
        """Makes the fetched rows the current ones."""
        for i in range_constexpr(self.passes):
            token = self.next_tokens[i]
            if token >= self.num_tokens:
                token = Int32(-1)
            self.tokens[i] = token

    @cute.jit
    def copy(self, stage: cute.Pointer, block: Int32):
        """Issues the copies of the block-th 128 bytes; the caller arrives on a full barrier."""
        column = block * K_TILE_BYTES + self.column
        for i in range_constexpr(self.passes):
            token = self.tokens[i]
            end = Int32(self.row_bytes)
            if token < 0:
                end = Int32(0)
            size = Int32(CHUNK)
            if column >= end:
                size = Int32(0)
            # in 32 bits: as a 64-bit factor the stride costs a register that the widest tiles lack
            chunks = Uint32(cutlass.max(token, Int32(0))) * Uint32(self.x_stride)
            source = self.x + (Int64(chunks) * CHUNK + column)
            target = stage + (self.target + i * (ROWS_PER_PASS * K_TILE_BYTES))
            if const_expr(i > 0 and self.rows < (i + 1) * ROWS_PER_PASS):
                if self.row + i * ROWS_PER_PASS < self.rows:
                    copy_chunk(target, source, size)
            else:
                copy_chunk(target, source, size)

    def scaled_row(self) -> Int32:
        """The row of the tile whose scale this thread copies.

        Of the eight threads that copy a row, thread i copies the scale of the row i passes on.
        """
        return self.row + self.lane * ROWS_PER_PASS

    def scaled_token(self) -> Int32:
        """The row of x whose scale this thread copies; -1 if the tile's row has none."""
        token = self.tokens[0]
        for i in range(1, self.passes):
            token = cutlass.select_(self.lane == i, self.tokens[i], token)
        return token

    @cute.jit
    def locate(self, column: Int32):
        """Makes the fetched rows the current ones, for `copy_blocks` from byte `column` on."""
        for i in range_constexpr(self.passes):
            token = self.next_tokens[i]
            size = Int32(CHUNK)
            if token < 0 or token >= self.num_tokens:
                token, size = Int32(0), Int32(0)
            chunks = Int64(Uint32(token) * Uint32(self.x_stride))
            self.sources[i] = (self.x + (chunks * CHUNK + column + self.column)).toint()
            self.sizes[i] = size

    @cute.jit
    def copy_blocks(self, stage: cute.Pointer, column: Int32, blocks: cutlass.Constexpr):
        """Issues the copies of several times 128 bytes of the rows; as `copy`, after `locate`.

        Each 128 bytes of all rows lie together in the stage. An address is that of its row and a
        constant: computing each anew takes longer than a WGMMA leaves.
        """
        for b in range_constexpr(blocks):
            skipped = b * K_TILE_BYTES
            for i in range_constexpr(self.passes):
                size = self.sizes[i]
                if const_expr(self.row_bytes % (blocks * K_TILE_BYTES) != 0):  # rows have a tail
                    size = self.cut(size, column + (self.column + skipped))
                source = cute.make_ptr(
                    Uint8, self.sources[i] + skipped, cute.AddressSpace.gmem, assumed_align=CHUNK
                )
                target = self.target + (b * self.passes + i) * (ROWS_PER_PASS * K_TILE_BYTES)
                copy_chunk(stage + target, source, size)

    @cute.jit
    def cut(self, size: Int32, column: Int32):
        """The bytes to copy from byte `column` of a row on: none past its end."""
        if column >= self.row_bytes:
            size = Int32(0)
        return size
