"""The products of packed weights on SM90: unpacked in registers, from where WGMMA reads them."""

from __future__ import annotations

from collections.abc import Callable

import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import warpgroup

from emitters.device.memory import ELEMENT
from emitters.device.packed import PackedOperand
from emitters.spec.config_packed_sm90 import GemmPackedSm90Config
from emitters.spec.gemm import GemmProblem
from emitters.spec.packing import MXFP4_SHIFT, Packing

_STEPS = 2  # WGMMAs per word of packed weights: 16 of K each
_BOX_WORDS = 2  # words per box of x, which has 64 of K
_BLOCK_WORDS = 4
_FRAGMENTS = 2  # words that are unpacked or being multiplied
_READ_AHEAD = 2  # the word of a block after which the next one is read


class PackedProducts:
    """Multiplies the stages of a tile; its `sums` are complete after `finish`.

    While WGMMA works on a word's 32 of K, the next word is unpacked: two sets of fragments take
    turns. That goes on from stage to stage, so that a stage is released when the next has begun.

    The values of integers have their scales but for the scales' mantissas, from 1 to 2, which would
    not fit: so the sums are in units of the mantissa of the last group of K. Before the next group
    they are multiplied by the old unit over the new one, once its first word has been unpacked.

    Between the start of WGMMAs and the wait for them there must be no branch, and nothing may read
    any accumulators but after a wait for all WGMMAs: else the compiler makes them wait for each
    other.
    """

    def __init__(self, problem: GemmProblem, config: GemmPackedSm90Config):
        self.problem, self.config = problem, config
        self.operand = PackedOperand(problem, config, powers=True)
        packing = problem.weight.packing
        assert packing is not None
        self.scaled = packing is not Packing.MXFP4  # else scales are in the values, whole
        self.group_words = packing.group // 32

    def attach(self, weights: cute.Pointer, x: cute.Tensor, thread: Int32):
        """Binds the stages of weights and of x. thread: among those of all consumers."""
        k_major = cute.nvgpu.OperandMajorMode.K
        element, tile_m = ELEMENT[self.problem.x], self.config.tile_m
        self.mma = sm90.make_trivial_tiled_mma(
            element, element, k_major, k_major, Float32, (1, 1, 1),
            tiler_mn=(64, tile_m), a_source=sm90.OperandSource.RMEM,
        )  # fmt: skip
        self.mma.set(warpgroup.Field.ACCUMULATE, True)
        self.tCrB = self.mma.make_fragment_B(self.mma.get_slice(0).partition_B(x))
        part = self.mma.get_slice(thread % 128)
        shape = part.partition_C(cute.make_identity_tensor((64, tile_m))).shape
        self.sums = cute.make_rmem_tensor(shape, Float32)
        shape = self.mma.partition_shape_A((64, 32))
        self.fragments = [self.mma.make_fragment_A(shape) for _ in range(_FRAGMENTS)]
        self.behind = cute.make_rmem_tensor((1,), Int32)  # the stage that WGMMA still reads
        self.units = cute.make_rmem_tensor((2,), Float32)  # of the sums of a thread's two columns
        self.operand.attach(weights, thread // 32, thread % 32)

    def begin(self):
        """Starts a tile."""
        self.behind[0] = Int32(-1)
        self.units.fill(1)
        for i in range(cute.size(self.sums)):
            # no constant to the compiler, which would set it between WGMMA and the fence before it
            self.sums[i] = cute.arch.inline_ptx(
                "mov.b32 {$w0}, 0;", write_only_types=[Float32], read_only_args=[]
            )

    def add_stage(self, stage: Int32, blocks: int, release: Callable[[Int32], None]):
        """Starts the products of a stage's first blocks, and releases the stage before."""
        first = stage * self.config.k_blocks
        self.operand.read(first, 0)
        cute.arch.fence_view_async_shared()  # because cp.async wrote x through the generic proxy
        for word in range(blocks * _BLOCK_WORDS):  # of the stage
            block, of_block = divmod(word, _BLOCK_WORDS)
            self.operand.choose(block % 2)
            fragment = self.fragments[word % _FRAGMENTS]
            self.operand.unpack(of_block, cute.recast_tensor(fragment, Int32))
            if of_block == _READ_AHEAD and block + 1 < blocks:
                self.operand.read(first + block + 1, (block + 1) % 2)
            begins = self.scaled and of_block % self.group_words == 0
            if begins:
                self.change_units(of_block // self.group_words)
            self.issue(word, fragment, stage)
            if not begins:
                warpgroup.wait_group(_FRAGMENTS - 1)  # the next fragment is free
            if word == 0:
                release(self.behind[0])
        self.behind[0] = stage

    def issue(self, word: int, fragment: cute.Tensor, stage: Int32):
        """Starts the WGMMAs of a word."""
        warpgroup.fence()
        box = stage * self.config.k_boxes + word // _BOX_WORDS
        for step in range(_STEPS):
            b = self.tCrB[None, None, word % _BOX_WORDS * _STEPS + step, box]
            cute.gemm(self.mma, self.sums, fragment[None, None, step], b, self.sums)
        warpgroup.commit_group()

    def change_units(self, group: int):
        """Makes the mantissas of a group of the block the units of the sums."""
        factors = []
        for unit in range(2):
            mantissa = self.operand.scale(unit, group)
            factors.append(self.units[unit] * cute.arch.rcp_approx(mantissa))
            self.units[unit] = mantissa
        self.multiply(factors)

    def multiply(self, factors: list):
        """Waits for the products, and multiplies the sums of each of the two columns."""
        warpgroup.wait_group(0)
        for i in range(cute.size(self.sums)):
            self.sums[i] = self.sums[i] * factors[i // 2 % 2]

    def finish(self, release: Callable[[Int32], None]):
        """Completes the sums of a tile, and releases its last stage."""
        units = [self.units[unit] for unit in range(2)]
        self.multiply(units if self.scaled else [Float32(2.0**MXFP4_SHIFT)] * 2)
        release(self.behind[0])
