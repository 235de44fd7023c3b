"""The config of the SM90 GEMM whose weights are packed 4-bit values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from emitters.spec.arch import SM90, why_no_registers
from emitters.spec.config_swap_sm90 import GemmSwapSm90Config
from emitters.spec.epilogue import Bias
from emitters.spec.gemm import GemmProblem, Granularity
from emitters.spec.packing import BLOCK_ROWS, Packing
from emitters.spec.staged_sm90 import SLICE_BYTES, WARPGROUP

# Registers per thread besides accumulators: fragments, packed words, addresses, epilogue.
_OTHERS = {Packing.INT4_G128: 56, Packing.INT4_G32: 48, Packing.MXFP4: 64}
MMA_ROWS = 8  # rows of the tiles whose products mma.sync makes, not WGMMA
_WGMMA_OTHERS = 56  # those of a WGMMA besides its accumulators, before registers are passed on


@dataclass(frozen=True)
class GemmPackedSm90Config(GemmSwapSm90Config):
    """The config of `GemmSwapSm90` for packed weights, which are multiplied from registers.

    Tiles of MMA_ROWS rows are multiplied by mma.sync, others by WGMMA. Each 64 columns of a tile
    have a consumer warpgroup; or k_groups of them, which take stages in turn and add their sums.
    mma.sync needs no warpgroup: with MMA_ROWS rows a tile may have 32 columns, for two warps.
    With `one_producer` a single warpgroup loads weights and rows of x, and passes on to the
    consumers the registers that it does not need; these then store by warpgroups, from room for a
    whole tile in shared memory.
    """

    k_boxes: int = 4  # of 64 of K; a block of packed weights has 128
    one_producer: bool = False
    k_groups: int = 1
    template: ClassVar[str] = "gemm_packed_sm90"

    MAX_CTAS: ClassVar[int] = 4

    @property
    def column_groups(self) -> int:
        return max(1, self.tile_n // 64)

    @property
    def consumers(self) -> int:
        return self.column_groups * self.k_groups

    @property
    def group_threads(self) -> int:
        return min(WARPGROUP, 2 * self.tile_n)  # a warp has 16 columns

    @property
    def k_shares(self) -> int:
        return self.split_k + self.k_groups - 1

    @property
    def gather_threads(self) -> int:
        return WARPGROUP if self.one_producer else super().gather_threads

    @property
    def weight_threads(self) -> int:
        return 0 if self.one_producer else super().weight_threads

    @property
    def producer_registers(self) -> int:
        """Registers per producer thread after `setmaxnreg`."""
        return 40 + -(-self.tile_m // 64) * 8  # two tokens per 16 rows, and 40 for addresses

    @property
    def consumer_registers(self) -> int:
        """Registers per consumer thread, after `setmaxnreg` where there is one producer."""
        if not self.one_producer:
            return self.registers
        pool = self.registers * (1 + self.consumers) - self.producer_registers
        return min(pool // self.consumers // 8 * 8, 240)

    @property
    def thread_registers(self) -> str:
        """Registers per thread, or of one producer / of the consumers, for people to read."""
        if not self.one_producer:
            return super().thread_registers
        return f"{self.producer_registers} / {self.consumer_registers}"

    @property
    def k_blocks(self) -> int:
        """Blocks of packed weights, of 128 of K each, per stage."""
        return self.k_boxes // 2

    @property
    def registers(self) -> int:
        """Registers per thread, at launch, with which ctas_per_sm CTAs fit on an SM.

        Each quarter of an SM has a quarter of its registers, for whole warps.
        """
        warps = -(-self.threads * self.ctas_per_sm // 32 // 4)  # per quarter
        return min(SM90.registers_per_sm // 4 // (32 * warps) // 8 * 8, 248)

    def pipeline_stages(self, problem: GemmProblem) -> int:
        """As of other configs; a multiple of k_groups, so that each stage has its group.

        A group that missed a fill of a stage could not tell the next one from it.
        """
        stages = super().pipeline_stages(problem)
        return stages if self.stages is not None else stages // self.k_groups * self.k_groups

    def weight_copies(self, problem: GemmProblem) -> int:
        return self.k_blocks

    def tail_blocks(self, problem: GemmProblem) -> int:
        """Blocks of K in a tile's last stage, if that is multiplied by itself to leave out others,
        which are empty; else 0.

        A loop and one stage more want a stage that is the last one of all its consumers, and
        registers that tiles of MMA_ROWS rows lack.
        """
        assert problem.weight.packing is not None
        if self.tile_m == MMA_ROWS or self.k_shares > 1 or self.k_stages(problem) == 1:
            return 0
        return problem.weight.packing.blocks(problem.n, problem.k)[1] % self.k_blocks

    def weight_bytes(self, problem: GemmProblem) -> int:
        """Bytes of shared memory for 128 of K of a tile's columns of weights."""
        assert problem.weight.packing is not None
        return self.tile_n // BLOCK_ROWS * problem.weight.packing.block_bytes

    def stage_bytes(self, problem: GemmProblem) -> int:
        return self.x_bytes(problem) * self.k_boxes + self.weight_bytes(problem) * self.k_blocks

    def slice_bytes(self, problem: GemmProblem) -> int:
        """Bytes of a row of what a warpgroup stores at a time; 0 if warps store by themselves."""
        columns = 4 * self.warp_columns(problem)
        return min(SLICE_BYTES, columns * problem.out.bytes) if self.one_producer else 0

    def staging_bytes(self, problem: GemmProblem) -> int:
        if not self.slice_bytes(problem):
            return super().staging_bytes(problem)
        columns = 4 * self.column_groups * self.warp_columns(problem)
        return self.parts * self.part_rows * columns * problem.out.bytes

    def accumulator_registers(self, problem: GemmProblem) -> int:
        """Accumulators per consumer thread."""
        return self.tile_m // 2

    @property
    def words(self) -> str:
        more = " one producer" if self.one_producer else ""
        more += f" {self.k_groups} in turn" if self.k_groups > 1 else ""
        return f"packed {super().words}{more}"

    def why_illegal(self, problem: GemmProblem) -> str | None:
        if problem.weight.packing is None:
            return f"weights must be packed for this config, got {problem.weight.dtype}"
        return (
            self._why_tile(problem) or self._why_registers(problem) or self.why_no_memory(problem)
        )

    def _why_registers(self, problem: GemmProblem) -> str | None:
        accumulators, others = self.accumulator_registers(problem), self._other_registers(problem)
        role = "consumer thread" if self.one_producer else "thread"
        return why_no_registers(
            self.tile_m // 2, _WGMMA_OTHERS, self.registers, "thread at launch"
        ) or why_no_registers(accumulators, others, self.consumer_registers, role)

    def _other_registers(self, problem: GemmProblem) -> int:
        """Registers per consumer thread besides accumulators with which no kernel spilled."""
        packing, accumulators = problem.weight.packing, self.accumulator_registers(problem)
        assert packing is not None
        per_channel = problem.weight_scale is Granularity.CHANNEL
        of_columns = per_channel or any(isinstance(node, Bias) for node in problem.epilogue)
        if self.tile_m == MMA_ROWS:
            two_blocks, in_turn = self.k_blocks > 1, self.k_groups > 1
            columns = {
                Packing.INT4_G128: 8 + 16 * two_blocks,
                Packing.INT4_G32: 16,
                Packing.MXFP4: 16 if two_blocks and in_turn else 8 * per_channel,
            }[packing]
            others = 64 + columns * of_columns
            if packing is Packing.INT4_G32:
                others += 24 * two_blocks + 8 * (in_turn and problem.gated)
            return others
        others = _OTHERS[packing]
        if packing is Packing.INT4_G128 and accumulators >= 16:
            others += 8 + 4 * problem.gated
        if of_columns and packing is Packing.INT4_G128:
            others += 8
        elif of_columns and packing is Packing.MXFP4 and accumulators <= 8:
            others += 4 + 4 * self.k_blocks
        if per_channel and (problem.epilogue or packing is Packing.INT4_G128):
            others += 20
        half_part = self.tile_m % self.part_rows != 0
        if half_part and of_columns and (problem.gated or packing is Packing.INT4_G128):
            others += 16
        return others

    def _why_tile(self, problem: GemmProblem) -> str | None:
        multiple = 8 if self.one_producer else 16
        if self.tile_m != 8 and (self.tile_m % multiple or not 16 <= self.tile_m <= 256):
            return (
                f"tile_m must be 8, or from 16 to 256 a multiple of {multiple} (WGMMA's N), "
                f"got {self.tile_m}"
            )
        narrow = self.tile_m == MMA_ROWS and self.tile_n == 32
        if not narrow and self.tile_n not in (64, 128, 192, 256):
            return (
                "tile_n must be 64, 128, 192 or 256 (64 columns per consumer warpgroup), or 32 "
                f"with tile_m {MMA_ROWS}, got {self.tile_n} with {self.tile_m}"
            )
        if self.k_boxes not in (2, 4):
            return (
                "k_boxes must be 2 or 4 for packed weights (one or two blocks of K), "
                f"got {self.k_boxes}"
            )
        if self.one_producer and self.tile_m < 16:
            return f"tile_m must be at least 16 with one_producer, got {self.tile_m}"
        return self._why_groups(problem) or self._why_split(problem)

    def _why_groups(self, problem: GemmProblem) -> str | None:
        if self.k_groups not in (1, 2, 4):
            return f"k_groups must be 1, 2 or 4, got {self.k_groups}"
        if self.k_groups == 1:
            return None
        if self.k_stages(problem) // self.split_k < self.k_groups:
            return (
                f"k_groups must be at most the stages that K = {problem.k} fills in each of "
                f"split_k {self.split_k} CTAs, got {self.k_groups}"
            )
        stages = self.pipeline_stages(problem)
        if stages < 2 * self.k_groups or stages % self.k_groups:
            return (
                f"stages must be a multiple of k_groups {self.k_groups} and at least twice as "
                f"many, got {stages}"
            )
        return None
