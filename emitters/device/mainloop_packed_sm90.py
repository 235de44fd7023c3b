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
    turns. If scales vary along K, the products of a group are added to the sums, times its scale,
    once the next group's first word has been unpacked. Both go on from stage to stage, so that a
    stage is released when the next has begun.

    Between the start of WGMMAs and the wait for them there must be no branch, and nothing may read
    any accumulators but after a wait for all WGMMAs: else the compiler makes them wait for each
    other.
    """

    def __init__(self, problem: GemmProblem, config: GemmPackedSm90Config):
        self.problem, self.config = problem, config
        self.operand = PackedOperand(problem, config)
        packing = problem.weight.packing
        assert packing is not None
        self.scaled = packing is not Packing.MXFP4  # else scales are in the values
        self.group_words = packing.group // 32

    def attach(self, weights: cute.Pointer, x: cute.Tensor, thread: Int32):
        """Binds the stages of weights and of x. thread: among those of all consumers."""
        k_major = cute.nvgpu.OperandMajorMode.K
        element, tile_m = ELEMENT[self.problem.x], self.config.tile_m
        self.fresh, self.mma = (
            sm90.make_trivial_tiled_mma(
                element, element, k_major, k_major, Float32, (1, 1, 1),
                tiler_mn=(64, tile_m), a_source=sm90.OperandSource.RMEM,
            )
            for _ in range(2)
        )  # fmt: skip
        self.fresh.set(warpgroup.Field.ACCUMULATE, False)
        self.mma.set(warpgroup.Field.ACCUMULATE, True)
        self.tCrB = self.mma.make_fragment_B(self.mma.get_slice(0).partition_B(x))
        part = self.mma.get_slice(thread % 128)
        shape = part.partition_C(cute.make_identity_tensor((64, tile_m))).shape
        self.acc = self.sums = cute.make_rmem_tensor(shape, Float32)
        shape = self.mma.partition_shape_A((64, 32))
        self.fragments = [self.mma.make_fragment_A(shape) for _ in range(_FRAGMENTS)]
        if self.scaled:
            self.sums = cute.make_rmem_tensor((tile_m // 2,), Float32)
            self.scales = cute.make_rmem_tensor((2,), Float32)  # of the products in acc
        self.operand.attach(weights, thread // 32, thread % 32)

    def begin(self):
        """Starts a tile."""
        if self.scaled:  # the first stage adds what is in acc: nothing
            self.sums.fill(0)
            self.scales.fill(0)
        for i in range(cute.size(self.acc)):
            # no constant to the compiler, which would set it between WGMMA and the fence before it
            self.acc[i] = cute.arch.inline_ptx(
                "mov.b32 {$w0}, 0;", write_only_types=[Float32], read_only_args=[]
            )

    def add_stage(self, stage: Int32, released: Callable[[], None]):
        """Starts the products of a stage. released: called when the stage before is free."""
        blocks = self.config.k_blocks
        self.operand.read(stage * blocks, 0)
        cute.arch.fence_view_async_shared()  # because cp.async wrote x through the generic proxy
        for word in range(blocks * _BLOCK_WORDS):  # of the stage
            block, of_block = divmod(word, _BLOCK_WORDS)
            self.operand.choose(block % 2)
            fragment = self.fragments[word % _FRAGMENTS]
            self.operand.unpack(of_block, cute.recast_tensor(fragment, Int32))
            if of_block == _READ_AHEAD and block + 1 < blocks:
                self.operand.read(stage * blocks + block + 1, (block + 1) % 2)
            begins = self.scaled and of_block % self.group_words == 0
            if begins:
                self.add_group()
                for unit in range(2):
                    self.scales[unit] = self.operand.scale(unit, of_block // self.group_words)
            self.issue(word, begins, fragment, stage)
            if not begins:
                warpgroup.wait_group(_FRAGMENTS - 1)  # the next fragment is free
            if word == 0:
                released()

    def issue(self, word: int, begins: bool, fragment: cute.Tensor, stage: Int32):
        """Starts the WGMMAs of a word. begins: they do not add to the products before."""
        warpgroup.fence()
        box = stage * self.config.k_boxes + word // _BOX_WORDS
        for step in range(_STEPS):
            mma = self.fresh if begins and step == 0 else self.mma
            b = self.tCrB[None, None, word % _BOX_WORDS * _STEPS + step, box]
            cute.gemm(mma, self.acc, fragment[None, None, step], b, self.acc)
        warpgroup.commit_group()

    def add_group(self):
        """Adds the products of a group to the sums, times its scale, when they are there."""
        warpgroup.wait_group(0)
        for i in range(cute.size(self.acc)):
            self.sums[i] = self.sums[i] + self.acc[i] * self.scales[i // 2 % 2]

    def finish(self):
        """Waits for the last products of a tile."""
        if self.scaled:
            self.add_group()
        else:
            warpgroup.wait_group(0)
            for i in range(cute.size(self.acc)):
                self.acc[i] = self.acc[i] * Float32(2.0**MXFP4_SHIFT)
