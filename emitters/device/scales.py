"""Scales that vary along K: copied to a stage beside its operands, applied to its products."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.experimental import primitives as prims

from emitters.device.gather import GatherIterator
from emitters.device.memory import CHUNK, copy_chunk, tensor_map_address
from emitters.device.parameters import Scales
from emitters.spec.config_sm90 import SCALE_BOXES, SCALE_SPAN
from emitters.spec.gemm import GemmProblem
from emitters.spec.registry import GemmConfig


class BlockScales:
    """Copies the scales of each 128 of K to shared memory, and reads them in consumers.

    The threads that copy gathered rows of x copy their scales as well, by cp.async of 4 bytes. The
    scales of rows in order are copied by TMA, from memory where those of neighbouring tokens are
    neighbours. Those of the weights always come by cp.async. A box (128 bytes of K of a stage) has
    these float32:

      0 ..            a scale per row of the tile; 0 for rows without a token. TMA can only begin
                      at a multiple of four rows of x, so up to three scales come before; and rows
                      past the expert's end have the next expert's
      scaled_rows ..  a scale per `columns` columns of the output; of a gated problem those of the
                      gates, then those of the ups; zeros up to a multiple of four

    Past the end of K scales are 0. The last block of N may be partial.
    """

    def __init__(self, problem: GemmProblem, config: GemmConfig):
        self.problem, self.tile_m = problem, config.tile_m
        self.columns = config.scale_columns(problem)
        self.count = config.weight_scales(problem)
        self.groups = self.count // 2 if problem.gated else self.count  # per gates or ups
        self.scaled_rows, self.words = config.scaled_rows, config.scale_words(problem)
        self.x_bytes = 4 * self.scaled_rows  # that TMA copies to a box
        self.n_blocks, self.k_blocks = problem.scale_blocks

    def attach(self, boxes: cute.Pointer):
        """Binds the shared memory of all boxes; by producers and consumers."""
        self.boxes = boxes

    def attach_copies(self, scales: Scales, thread: Int32, gather: GatherIterator | None = None):
        """Binds the scales in global memory. thread: its number among those that copy scales.

        gather: of the rows, whose threads copy the scales of x; None where TMA does.
        """
        self.scales, self.gather, self.thread = scales, gather, thread
        self.token = cute.make_rmem_tensor((1,), Int32)

    def advance(self):
        """Takes over the token whose scale this thread copies; after the gather's `advance`."""
        self.token[0] = self.gather.scaled_token()

    @cute.jit
    def copy(self, box: Int32, k_block: Int32, expert: Int32, column: Int32):
        """Issues the copies of a box. column: the tile's first column of N."""
        row = self.gather.scaled_row()
        if row < self.tile_m:
            token = self.token[0]
            size = Int32(4)
            if token < 0 or k_block >= self.k_blocks:
                size = Int32(0)
            at = cutlass.max(token, Int32(0)) * self.scales.x_stride
            at = at + k_block * self.scales.x_k_stride
            self.copy_word(self.box(box) + row, self.scales.x + at, size)
        self.copy_weights(box, k_block, expert, column)

    @cute.jit
    def copy_weights(self, box: Int32, k_block: Int32, expert: Int32, column: Int32):
        """Issues the copies of the weights' scales of a box."""
        if self.thread < -(-self.count // 4) * 4:
            size = Int32(4)
            if self.thread >= self.count or k_block >= self.k_blocks:
                size = Int32(0)
            block = self.block(column, self.thread)
            at = (expert * self.n_blocks + block) * self.k_blocks + k_block
            if size == 0:
                at = Int32(0)
            word = self.box(box) + (self.scaled_rows + self.thread)
            self.copy_word(word, self.scales.weight + at, size)

    def load_x(self, box: Int32, k_block: Int32, first_row: Int32, barrier: cute.Pointer):
        """Starts TMA's copy of a box's scales of x; by one thread. first_row: of the tile, in x."""
        prims.cp_async_bulk_tensor_shared_cluster_global(
            self.box(box).to_llvm_ptr(),
            tensor_map_address(self.scales.x).to_llvm_ptr(),
            [first_row & -4, k_block],
            barrier.to_llvm_ptr(),
            [],
        )

    def block(self, column: Int32, i: Int32):
        """The block of N of the tile's i-th scale of weights."""
        rows = self.problem.block_rows
        if not self.problem.gated:
            return cutlass.min((column + i * self.columns) // rows, Int32(self.n_blocks - 1))
        half = self.n_blocks // 2
        first = (column // 2 + i % self.groups * self.columns) // rows
        return cutlass.min(first, Int32(half - 1)) + i // self.groups * half

    def copy_word(self, target, source, size: Int32):
        prims.cp_async_shared_global(
            target.to_llvm_ptr(), source.to_llvm_ptr(), 4, prims.LoadCacheModifier.CA, cp_size=size
        )

    def box(self, number: Int32) -> cute.Pointer:
        return self.boxes + number * self.words

    def read(self, box: Int32, skipped: Int32 | int = 0) -> tuple[cute.Tensor, cute.Tensor]:
        """The scales of the tile's rows, and those of the weights, in shared memory.

        skipped: the scales before those of the tile's rows.
        """
        of_rows, of_weights = self.box(box) + skipped, self.box(box) + self.scaled_rows
        return (
            cute.make_tensor(of_rows, cute.make_layout(self.tile_m)),
            cute.make_tensor(of_weights, cute.make_layout(self.count)),
        )


class SpannedScales(BlockScales):
    """The same, but a thread copies a row's scales of SCALE_SPAN k-tiles, a span, at once.

    In memory they are neighbours: 16 bytes, where reading 4 of them takes as long. Two spans have
    memory of their own. A k-tile's place in them is its number, counted over all tiles, modulo
    SCALE_BOXES:

      SCALE_BOXES float32 per row of the tile, then as many per scale of the weights

    Tiles have whole spans. When a stage is filled with a span's first k-tile, consumers may still
    read the k-tiles in the other stages, which with SPAN_STAGES are as many as a span, the one
    before. So the places of the new span are free.
    """

    @cute.jit
    def copy(self, number: Int32, k_block: Int32, expert: Int32, column: Int32):
        """Issues the copies of a span, if it starts here. number: of the k-tile, over all tiles;
        k_block: in its tile."""
        if k_block % SCALE_SPAN == 0:
            row = self.gather.scaled_row()
            if row < self.tile_m:
                token = self.token[0]
                size = Int32(CHUNK)
                if token < 0:
                    size = Int32(0)
                at = cutlass.max(token, Int32(0)) * self.scales.x_stride + k_block
                copy_chunk(self.place(row, number), self.scales.x + at, size)
            if self.thread < self.count * SCALE_SPAN:
                i, k = self.thread // SCALE_SPAN, self.thread % SCALE_SPAN
                block = expert * self.n_blocks + self.block(column, i)
                source = self.scales.weight + (block * self.k_blocks + k_block + k)
                self.copy_word(self.place(self.tile_m + i, number) + k, source, Int32(4))

    def place(self, row: Int32 | int, number: Int32) -> cute.Pointer:
        """The place of a k-tile's scale of a row, or of one of the weights, after all rows."""
        return self.boxes + (row * SCALE_BOXES + (number & (SCALE_BOXES - 1)))

    def read(self, number: Int32, skipped: int = 0) -> tuple[cute.Tensor, cute.Tensor]:
        of_rows, of_weights = (self.place(row, number) for row in (0, self.tile_m))
        return (
            cute.make_tensor(of_rows, cute.make_layout(self.tile_m, stride=SCALE_BOXES)),
            cute.make_tensor(of_weights, cute.make_layout(self.count, stride=SCALE_BOXES)),
        )
