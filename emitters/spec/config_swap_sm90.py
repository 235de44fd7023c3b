"""The config of the SM90 GEMM for few rows per expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from emitters.spec.arch import SM90, why_no_registers
from emitters.spec.gemm import N_MAJOR_BLOCK, GemmProblem, Major
from emitters.spec.staged_sm90 import K_TILE_BYTES, WARPGROUP, Schedule, Sm90Config


@dataclass(frozen=True)
class GemmSwapSm90Config(Sm90Config):
    """The config of `GemmSwapSm90`, for few rows per expert: weights are WGMMA's M, rows its N."""

    tile_m: int = 8  # rows of an output tile, WGMMA's N
    tile_n: int = 64  # columns of weights that an output tile takes, WGMMA's M
    k_boxes: int = 1  # weight boxes, of 128 bytes of K, per stage
    split_k: int = 1  # CTAs of a cluster, which share a tile's K
    evict_first: bool = False  # whether weights leave L2 before older contents
    template: ClassVar[str] = "gemm_swap_sm90"

    MAX_STAGES: ClassVar[int] = 32
    MAX_CTAS: ClassVar[int] = 3
    l2_promotion: ClassVar[int] = 128  # bytes that a read of weights brings into L2

    @property
    def gather_threads(self) -> int:
        """Threads that copy x; each copies 16 of the 128 bytes of a row."""
        return min(WARPGROUP, self.tile_m * K_TILE_BYTES // 16)

    @property
    def column_groups(self) -> int:
        """The number of groups of consumers with columns of their own."""
        return 1

    @property
    def consumers(self) -> int:
        """The number of groups of consumers, which multiply: warpgroups, for WGMMA."""
        return self.column_groups

    @property
    def group_threads(self) -> int:
        """Threads of a group of consumers."""
        return WARPGROUP

    @property
    def weight_threads(self) -> int:
        """Threads that copy weights alone: a warp; none if the gather's first warp does that."""
        return 32

    @property
    def threads(self) -> int:
        """Threads per CTA: the consumers, those of the gather, those of the weights."""
        consumer_threads = self.group_threads * self.consumers
        return consumer_threads + self.gather_threads + self.weight_threads

    def weight_copies(self, problem: GemmProblem) -> int:
        """The parts of K in which a stage's weights are copied."""
        return self.k_boxes

    @property
    def cluster(self) -> int:
        """CTAs per cluster."""
        return self.split_k

    def k_stages(self, problem: GemmProblem) -> int:
        """The number of times that a stage is filled for all of K."""
        return -(-problem.k // (self.k_tile(problem) * self.k_boxes))

    def stage_bytes(self, problem: GemmProblem) -> int:
        scales = 4 * self.scale_words(problem)
        return (self.x_bytes(problem) + self.weight_bytes(problem) + scales) * self.k_boxes

    def table_words(self, problem: GemmProblem) -> int:
        """The int32 of the scheduler's table: three per expert."""
        return 3 * self.table_entries(problem)

    def warp_columns(self, problem: GemmProblem) -> int:
        """Output columns per warp, of every 64 columns of weights in a tile (or the tile's 32)."""
        return 8 if problem.gated else 16

    @property
    def column_warps(self) -> int:
        """Warps that store a tile: of all consumers, or of the first of k_groups."""
        return self.group_threads // 32 * self.column_groups

    @property
    def part_rows(self) -> int:
        """Rows of a tile that the epilogue stages and stores at a time."""
        return min(self.tile_m, 16)

    @property
    def parts(self) -> int:
        """Such parts of a tile; the last one may go on after it."""
        return -(-self.tile_m // self.part_rows)

    def staging_pitch(self, problem: GemmProblem) -> int:
        """Bytes per staging row: a warp's columns; odd multiples of 16 avoid bank conflicts."""
        return (self.warp_columns(problem) * problem.out.bytes // 16 | 1) * 16

    def staging_bytes(self, problem: GemmProblem) -> int:
        """Bytes of staging memory of the warps that store columns."""
        return self.column_warps * self.part_rows * self.staging_pitch(problem)

    @property
    def k_shares(self) -> int:
        """The shares of K whose sums meet in a CTA: its own and those of its cluster's others."""
        return self.split_k

    @property
    def partial_bytes(self) -> int:
        """Bytes for the sums of a tile that come from others: of a cluster, to its CTA 0."""
        return (self.k_shares - 1) * self.tile_m * self.tile_n * 4

    def fixed_smem_bytes(self, problem: GemmProblem) -> int:
        """Bytes of shared memory for staging rows, sums, table, number of tiles and barriers."""
        buffers = self.staging_bytes(problem) + self.partial_bytes
        barriers = 16 * (self.MAX_STAGES + 1)
        return buffers + 4 * self.table_words(problem) + 16 + barriers

    @property
    def registers(self) -> int:
        """Registers per thread: a multiple of 8 with which ctas_per_sm CTAs fit on an SM."""
        return min(SM90.registers_per_sm // (self.threads * self.ctas_per_sm) // 8 * 8, 248)

    @property
    def thread_registers(self) -> str:
        """Registers per thread, for people to read."""
        return str(self.registers)

    def accumulator_registers(self, problem: GemmProblem) -> int:
        """Accumulators per consumer thread; two-level accumulation also keeps products."""
        products = 64 * self.tile_m // WARPGROUP if problem.two_level else 0
        return self.tile_m * self.tile_n // WARPGROUP + products

    @property
    def cluster_tiles(self) -> int:
        """Tiles that a cluster computes at a time."""
        return 1

    def scheduled(self, schedule: Schedule) -> GemmSwapSm90Config | None:
        """This config if the schedule is TILE, the only one it has; else None."""
        return self if schedule is Schedule.TILE else None

    @property
    def words(self) -> str:
        """A short description, for lists that people read."""
        tile = f"{self.tile_m}x{self.tile_n}"
        return f"swap {tile} K/{self.split_k} {self.ctas_per_sm}/SM"

    def why_illegal(self, problem: GemmProblem) -> str | None:
        """Why no kernel can be built with this config for a legal problem, or None."""
        return (
            self._why_tile(problem)
            or why_no_registers(self.accumulator_registers(problem), 64, self.registers, "thread")
            or self.why_no_memory(problem)
        )

    def _why_tile(self, problem: GemmProblem) -> str | None:
        if problem.weight.packing:
            return f"weights must not be packed for this config, got {problem.weight.dtype}"
        if not problem.sole_output:
            return "the output must be the only one for this config"
        if problem.quantized_out:
            return "the output must not be quantised for this config (a tile has too few columns)"
        if self.tile_m != 8 and (self.tile_m % 16 or not 16 <= self.tile_m <= 96):
            return f"tile_m must be 8 or a multiple of 16 up to 96 (WGMMA's N), got {self.tile_m}"
        if self.tile_n not in (64, 128):
            return f"tile_n must be 64 or 128 (blocks of 64 columns, WGMMA's M), got {self.tile_n}"
        by_blocks = problem.gated and problem.weight.major is Major.N and not problem.alternating
        if by_blocks and self.tile_n == N_MAJOR_BLOCK:
            return (
                "tile_n must be 128 for gated N-major weights (a box of gate and one of up "
                f"columns), got {self.tile_n}"
            )
        if self.k_boxes not in (1, 2, 4):
            return f"k_boxes must be 1, 2 or 4, got {self.k_boxes}"
        return self._why_split(problem)

    def _why_split(self, problem: GemmProblem) -> str | None:
        if self.split_k not in (1, 2, 4, 8):
            return f"split_k must be 1, 2, 4 or 8 (CTAs per cluster), got {self.split_k}"
        if self.split_k > self.k_stages(problem):
            return (
                f"split_k must be at most {self.k_stages(problem)}, the number of stages that "
                f"K = {problem.k} fills, got {self.split_k}"
            )
        return None
