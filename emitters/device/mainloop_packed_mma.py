"""The products of packed weights with eight rows: unpacked in registers, for mma.sync."""

from __future__ import annotations

from collections.abc import Callable

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint8
from cutlass.experimental import primitives as prims

from emitters.device.packed import PackedOperand
from emitters.spec.config_packed_sm90 import GemmPackedSm90Config
from emitters.spec.gemm import GemmProblem
from emitters.spec.packing import MXFP4_SHIFT, Packing
from emitters.spec.staged_sm90 import K_TILE_BYTES

_STEPS = 2  # products per word of packed weights: 16 of K each
_BOX_WORDS = 2  # words per box of x, which has 64 of K
_BLOCK_WORDS = 4
_CHUNK = 16  # bytes of a row of an 8 x 8 matrix


class RowProducts:
    """Multiplies the stages of a tile of eight rows; its `sums` are those of `PackedProducts`.

    With so few rows WGMMA takes less time than the waits around it, and than the fence that it
    needs before it reads rows that cp.async wrote. An mma.sync is an instruction like others: while
    it runs, the compiler has the warp unpack the next words.
    """

    def __init__(self, problem: GemmProblem, config: GemmPackedSm90Config):
        self.config = config
        self.operand = PackedOperand(problem, config, powers=False)
        packing = problem.weight.packing
        assert packing is not None
        self.scaled = packing is not Packing.MXFP4  # else scales are in the values
        self.group_words = packing.group // 32
        self.x_bytes = config.x_bytes(problem)  # per box

    def attach(self, weights: cute.Pointer, x: cute.Tensor, thread: Int32):
        """Binds the stages of weights and of x. thread: among those of all consumers."""
        lane = thread % 32
        row, chunk = lane % 8, lane // 8
        self.x = cute.make_ptr(Uint8, x.iterator.toint(), cute.AddressSpace.smem, assumed_align=16)
        self.places = [  # in a box, of this lane's row of a matrix, for either word
            row * K_TILE_BYTES + ((chunk + 4 * word) ^ row) * _CHUNK for word in range(_BOX_WORDS)
        ]
        self.sums = cute.make_rmem_tensor((4,), Float32)
        # products that are added up wait for each other; of groups of a word there are many anyway
        chains = 1 if self.group_words == 1 and self.scaled else _STEPS
        self.products = [cute.make_rmem_tensor((4,), Float32) for _ in range(chains)]
        self.fragment = cute.make_rmem_tensor((4 * _STEPS,), Int32)
        self.operand.attach(weights, thread // 32, lane)

    def begin(self):
        """Starts a tile."""
        self.sums.fill(0)
        for products in self.products:
            products.fill(0)

    def add_stage(self, stage: Int32, blocks: int, release: Callable[[Int32], None]):
        """Adds the products of a stage's first blocks, and releases it."""
        for block in range(blocks):
            self.operand.read(stage * self.config.k_blocks + block, block % 2)
            self.operand.choose(block % 2)
            for word in range(_BLOCK_WORDS):
                rows = self.read_rows(stage, block * _BLOCK_WORDS + word)
                self.operand.unpack(word, self.fragment)
                for step in range(_STEPS):
                    self.multiply(step, rows)
                if self.scaled and (word + 1) % self.group_words == 0:
                    self.add_group(word // self.group_words)
        release(stage)

    def read_rows(self, stage: Int32, word: int):
        """The rows of x for a word of a stage: four 8 x 8 matrices, 8 of K each."""
        box = stage * self.config.k_boxes + word // _BOX_WORDS
        at = self.x + (box * self.x_bytes + self.places[word % _BOX_WORDS])
        return prims.ldmatrix(at.to_llvm_ptr(), 4, prims.MMALayout.ROW)

    def multiply(self, step: int, rows):
        """Adds the products of 16 of K."""
        products = self.products[step % len(self.products)]
        a = [self.fragment[4 * step + i] for i in range(4)]
        b = [rows[2 * step + i] for i in range(2)]
        results = cute.arch.inline_ptx(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{ {$w0}, {$w1}, {$w2}, {$w3} }, { {$r0}, {$r1}, {$r2}, {$r3} }, "
            "{ {$r4}, {$r5} }, { {$r6}, {$r7}, {$r8}, {$r9} };",
            write_only_types=[Float32] * 4,
            read_only_args=[*a, *b, *(products[i] for i in range(4))],
        )
        for i in range(4):
            products[i] = results[i]

    def add_group(self, group: int):
        """Adds the products of a group of K to the sums, times its scale."""
        for i in range(4):
            scale = self.operand.scale(i // 2, group)
            self.sums[i] = self.sums[i] + self.total(i) * scale
        for products in self.products:
            products.fill(0)

    def finish(self, release: Callable[[Int32], None]):
        """Completes the sums of a tile; all stages are released."""
        if not self.scaled:
            for i in range(4):
                self.sums[i] = self.total(i) * Float32(2.0**MXFP4_SHIFT)

    def total(self, i: int) -> Float32:
        """The products of both chains, or of the only one."""
        return sum((products[i] for products in self.products[1:]), self.products[0][i])
