"""Scales that vary along K: copied to a stage beside its operands, applied to its products."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, range_constexpr
from cutlass.experimental import primitives as prims

from emitters.device.gather import GatherIterator
from emitters.device.ordered import OrderedRows
from emitters.device.parameters import Scales
from emitters.spec.gemm import GemmProblem
from emitters.spec.registry import GemmConfig


class BlockScales:
    """Copies the scales of each 128 of K by cp.async of 4 bytes, and reads them in consumers.

    The threads that copy gathered rows of x copy their scales as well. Rows in order come by TMA,
    and two warps copy their scales. The first threads also copy the scales of the weights. A box
    (128 bytes of K of a stage) has these float32:

      0 ..         a scale per row of the tile; 0 for rows without a token
      tile_m ..    a scale per `columns` columns of the output; of a gated problem those of the
                   gates, then those of the ups; zeros up to a multiple of four

    Past the end of K scales are 0. The last block of N may be partial.
    """

    def __init__(self, problem: GemmProblem, config: GemmConfig):
        self.problem, self.tile_m = problem, config.tile_m
        self.columns = config.scale_columns(problem)
        self.count = config.weight_scales(problem)
        self.groups = self.count // 2 if problem.gated else self.count  # per gates or ups
        self.words = config.scale_words(problem)
        self.n_blocks, self.k_blocks = problem.scale_blocks

    def attach(self, boxes: cute.Pointer):
        """Binds the shared memory of all boxes; by producers and consumers."""
        self.boxes = boxes

    def attach_copies(self, scales: Scales, x: GatherIterator | OrderedRows, thread: Int32):
        """Binds the scales in global memory. x: its threads copy them; thread: its number there."""
        self.scales, self.x, self.thread = scales, x, thread
        self.rows = x.scaled_rows()
        self.tokens = cute.make_rmem_tensor((len(self.rows),), Int32)

    def advance(self):
        """Takes over the tokens whose scales this thread copies; after the rows' `advance`."""
        self.x.scaled_tokens(self.tokens)

    @cute.jit
    def copy(self, box: Int32, k_block: Int32, expert: Int32, column: Int32):
        """Issues the copies of a box. column: the tile's first column of N."""
        target = self.boxes + box * self.words
        for i in range_constexpr(len(self.rows)):
            if self.rows[i] < self.tile_m:
                token = self.tokens[i]
                size = Int32(4)
                if token < 0 or k_block >= self.k_blocks:
                    size = Int32(0)
                at = cutlass.max(token, Int32(0)) * self.scales.x_stride
                at = at + k_block * self.scales.x_k_stride
                self.copy_word(target + self.rows[i], self.scales.x + at, size)
        if self.thread < self.words - self.tile_m:
            size = Int32(4)
            if self.thread >= self.count or k_block >= self.k_blocks:
                size = Int32(0)
            block = self.block(column, self.thread)
            at = (expert * self.n_blocks + block) * self.k_blocks + k_block
            if size == 0:
                at = Int32(0)
            word = target + (self.tile_m + self.thread)
            self.copy_word(word, self.scales.weight + at, size)

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

    def read(self, box: Int32) -> cute.Tensor:
        """The float32 of a box, in shared memory."""
        return cute.make_tensor(self.boxes + box * self.words, cute.make_layout(self.words))
