"""The configs of the SM90 GEMMs: choices that change a kernel's speed but not its numbers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from emitters.spec.arch import SM90, why_no_registers
from emitters.spec.dtypes import Accumulation, DType, Name
from emitters.spec.gemm import N_MAJOR_BLOCK, GemmProblem, Granularity, Major
from emitters.spec.plain import to_plain

K_TILE_BYTES = 128  # bytes of K in a k-tile, for every dtype of x: one swizzle atom
SLICE_BYTES = 128  # the epilogue stores a tile in slices of this many bytes per row
SLICE_ROWS = 16  # rows of a slice that a warp stores: one box of a TMA store
SLOTS = 16  # posted units; more than MAX_STAGES + 3, see PostedUnits
SLOT_WORDS = 8  # int32 per posted unit
WARPGROUP = 128


class Schedule(Name):
    """The rule by which clusters take units of work, in the order of the units' numbers."""

    STATIC = "static"  # cluster c takes the c-th of equal runs of neighbours
    TILE = "tile"  # cluster c takes units c, c + clusters, c + 2 clusters, ...
    DYNAMIC = "dynamic"  # as TILE for two rounds; then a free cluster takes the next, by a counter


@dataclass(frozen=True)
class _Sm90Config:
    """The fields and derived sizes that the configs of both templates have in common."""

    tile_m: int  # rows of an output tile
    tile_n: int  # columns of weights that an output tile takes
    # None: as many stages as shared memory holds, at most MAX_STAGES
    stages: int | None = field(default=None, kw_only=True)
    ctas_per_sm: int = field(default=1, kw_only=True)
    template: ClassVar[str]
    MAX_STAGES: ClassVar[int]

    def to_json(self) -> dict[str, Any]:
        return {"template": self.template, **to_plain(self)}

    def k_tile(self, problem: GemmProblem) -> int:
        """Elements of K in a k-tile: in 128 bytes."""
        return K_TILE_BYTES // problem.x.bytes

    def n_tiles(self, problem: GemmProblem) -> int:
        return -(-problem.n // self.tile_n)

    def table_entries(self, problem: GemmProblem) -> int:
        """Entries of the scheduler's table: num_experts rounded up to a multiple of 32 lanes."""
        return -(-problem.num_experts // 32) * 32

    def x_bytes(self, problem: GemmProblem) -> int:
        """Bytes of shared memory for one k-tile of a tile's rows of x."""
        return self.tile_m * K_TILE_BYTES

    def weight_bytes(self, problem: GemmProblem) -> int:
        """Bytes of shared memory for one k-tile of a tile's columns of weights."""
        return self.tile_n * self.k_tile(problem) * problem.weight.dtype.bytes

    def stage_bytes(self, problem: GemmProblem) -> int:
        """Bytes of shared memory per stage."""
        raise NotImplementedError

    def fixed_smem_bytes(self, problem: GemmProblem) -> int:
        """Bytes of shared memory for everything except the stages."""
        raise NotImplementedError

    @property
    def smem_limit(self) -> int:
        """Bytes of shared memory that a CTA may have."""
        return SM90.smem_per_sm // self.ctas_per_sm - SM90.smem_reserved

    def pipeline_stages(self, problem: GemmProblem) -> int:
        if self.stages is not None:
            return self.stages
        fit = (self.smem_limit - self.fixed_smem_bytes(problem)) // self.stage_bytes(problem)
        return max(0, min(fit, self.MAX_STAGES))

    def smem_bytes(self, problem: GemmProblem) -> int:
        """Bytes of shared memory per CTA, padded so that exactly ctas_per_sm CTAs fit on an SM.

        Otherwise, under dependent launch, SMs that drain first would take more than their share.
        """
        needed = self.fixed_smem_bytes(problem) + self.pipeline_stages(problem) * self.stage_bytes(
            problem
        )
        too_many = SM90.smem_per_sm // (self.ctas_per_sm + 1) - SM90.smem_reserved
        return max(needed, too_many + SM90.smem_unit)

    def why_no_memory(self, problem: GemmProblem) -> str | None:
        """Why shared memory can't hold the stages and the rest, or None."""
        if self.ctas_per_sm not in (1, 2):
            return f"ctas_per_sm must be 1 or 2, got {self.ctas_per_sm}"
        stages, stage_bytes = self.pipeline_stages(problem), self.stage_bytes(problem)
        if not 2 <= stages <= self.MAX_STAGES:
            return (
                f"stages must be 2 to {self.MAX_STAGES}, got {stages} of {stage_bytes} bytes each "
                f"in {self.smem_limit} bytes of shared memory"
            )
        smem, limit = self.smem_bytes(problem), self.smem_limit
        if smem <= limit:
            return None
        return f"shared memory per CTA must be at most {limit} bytes, got {smem}"


@dataclass(frozen=True)
class GemmSm90Config(_Sm90Config):
    """The config of `GemmSm90`, the persistent grouped GEMM with one producer warpgroup.

    tile_m / 64 consumer warpgroups share a tile, 64 rows each. With pingpong, two consumers take
    whole tiles in turn, and the epilogue of one runs under the WGMMA of the other.
    """

    tile_m: int = 128
    tile_n: int = 256
    pingpong: bool = False
    cluster_m: int = 1  # CTAs per cluster; they take neighbouring M tiles and share weights
    schedule: Schedule = Schedule.TILE
    group_m: int = 8  # M tiles that use an N tile's weights before the next N tile starts
    template: ClassVar[str] = "gemm_sm90"

    MAX_STAGES: ClassVar[int] = 8
    l2_promotion: ClassVar[int] = 256  # bytes that a read of weights brings into L2

    @property
    def warpgroups_per_tile(self) -> int:
        return 1 if self.pingpong else self.tile_m // 64

    @property
    def consumers(self) -> int:
        """The number of consumer warpgroups, which run WGMMA."""
        return 2 if self.pingpong else self.tile_m // 64

    @property
    def warpgroup_rows(self) -> int:
        """The rows of a tile that one consumer warpgroup accumulates."""
        return self.tile_m // self.warpgroups_per_tile

    @property
    def threads(self) -> int:
        return WARPGROUP * (1 + self.consumers)

    @property
    def cluster(self) -> int:
        """CTAs per cluster."""
        return self.cluster_m

    @property
    def launch_registers(self) -> int:
        """Registers per thread at launch: a multiple of 8 with which ctas_per_sm CTAs fit."""
        return min(SM90.registers_per_sm // (self.threads * self.ctas_per_sm) // 8 * 8, 248)

    @property
    def producer_registers(self) -> int:
        return 32 + self.tile_m // 8  # two tokens per 16 rows of the tile, and 32 for addresses

    @property
    def thread_registers(self) -> str:
        """Registers per producer thread / per consumer thread, for people to read."""
        return f"{self.producer_registers} / {self.consumer_registers}"

    @property
    def consumer_registers(self) -> int:
        """Registers per consumer thread after `setmaxnreg` has passed on what producers gave up."""
        pool = self.launch_registers * (1 + self.consumers) - self.producer_registers
        return min(pool // self.consumers // 8 * 8, 240)

    def k_tiles(self, problem: GemmProblem) -> int:
        return -(-problem.k // self.k_tile(problem))

    def stage_bytes(self, problem: GemmProblem) -> int:
        return self.x_bytes(problem) + self.weight_bytes(problem)

    def table_words(self, problem: GemmProblem) -> int:
        """The int32 of the scheduler's table: three per expert, and the slots of posted units."""
        return 3 * self.table_entries(problem) + SLOTS * SLOT_WORDS

    @property
    def staging_bytes(self) -> int:
        """Bytes of staging memory: one slice per consumer warp, on its way to global memory."""
        return 4 * self.consumers * SLICE_ROWS * SLICE_BYTES

    def fixed_smem_bytes(self, problem: GemmProblem) -> int:
        """Bytes of shared memory except the stages: staging rows, scheduler table, barriers."""
        return self.staging_bytes + 4 * self.table_words(problem) + 16 * self.MAX_STAGES

    def accumulator_registers(self, problem: GemmProblem) -> int:
        """Accumulators per consumer thread; two-level accumulation keeps a second set of them."""
        levels = 2 if problem.accumulation is Accumulation.TWO_LEVEL else 1
        return levels * self.warpgroup_rows * self.tile_n // WARPGROUP

    @property
    def cluster_tiles(self) -> int:
        """Tiles that a cluster computes at a time."""
        return self.cluster_m

    def scheduled(self, schedule: Schedule) -> GemmSm90Config | None:
        """This config with another schedule; cluster_m becomes 1 for a dynamic one."""
        cluster_m = 1 if schedule is Schedule.DYNAMIC else self.cluster_m
        return replace(self, schedule=schedule, cluster_m=cluster_m)

    @property
    def words(self) -> str:
        """A short description, for lists that people read."""
        pingpong = ["ping-pong"] if self.pingpong else []
        cluster = [f"cluster {self.cluster_m}"] if self.cluster_m > 1 else []
        tile, group = f"{self.tile_m}x{self.tile_n}", f"group {self.group_m}"
        return " ".join([tile, *pingpong, *cluster, group, f"{self.ctas_per_sm}/SM"])

    def why_illegal(self, problem: GemmProblem) -> str | None:
        """Why no kernel can be built with this config for a legal problem, or None."""
        return (
            self._why_tile(problem)
            or self._why_cluster(problem)
            or self.why_no_memory(problem)
            or self._why_registers(problem)
        )

    def _why_tile(self, problem: GemmProblem) -> str | None:
        if self.tile_m not in (64, 128, 192):
            return (
                f"tile_m must be 64, 128 or 192 (64 rows per consumer warpgroup), got {self.tile_m}"
            )
        multiple = SLICE_BYTES // DType.BF16.bytes
        if problem.gated and (problem.out is not DType.FP32 or problem.weight.major is Major.N):
            multiple *= 2  # a slice of outputs takes twice its columns; or a gate and an up box
        if self.tile_n % multiple or not multiple <= self.tile_n <= 256:
            return (
                f"tile_n must be a multiple of {multiple} (the epilogue stores whole slices) up to "
                f"256 (WGMMA's largest N), got {self.tile_n}"
            )
        if self.pingpong and self.tile_m > 128:
            return f"tile_m must be at most 128 with pingpong, got {self.tile_m}"
        return None

    def _why_cluster(self, problem: GemmProblem) -> str | None:
        if self.cluster_m not in (1, 2):
            return f"cluster_m must be 1 or 2, got {self.cluster_m}"
        if self.cluster_m > 1 and self.schedule is Schedule.DYNAMIC:
            return f"cluster_m must be 1 with a dynamic schedule, got {self.cluster_m}"
        share = N_MAJOR_BLOCK * self.cluster_m
        if problem.weight.major is Major.N and self.tile_n % share:
            return (
                f"tile_n must be a multiple of {share} for N-major weights (boxes of "
                f"{N_MAJOR_BLOCK} columns per CTA of a cluster), got {self.tile_n}"
            )
        if self.group_m < 1 or self.group_m % self.cluster_m:
            return (
                f"group_m must be a positive multiple of cluster_m ({self.cluster_m}), "
                f"got {self.group_m}"
            )
        return None

    def _why_registers(self, problem: GemmProblem) -> str | None:
        needed = self.tile_n // 2 + 26  # by one WGMMA, before setmaxnreg passes registers on
        if needed > self.launch_registers:
            return (
                f"one WGMMA needs about {needed} registers per thread, "
                f"the launch provides {self.launch_registers}"
            )
        others = 80  # for addresses, scales and one slice to store
        kinds = {node.kind for node in problem.epilogue}
        if problem.weight_scale is Granularity.CHANNEL and "bias" in kinds:
            tail = problem.n % self.tile_n  # a tail of N takes registers for predicates
            others = 112 if tail else 100 if problem.gated else 80
        accumulators = self.accumulator_registers(problem)
        return why_no_registers(accumulators, others, self.consumer_registers, "consumer thread")


@dataclass(frozen=True)
class GemmSwapSm90Config(_Sm90Config):
    """The config of `GemmSwapSm90`, for few rows per expert: weights are WGMMA's M, rows its N."""

    tile_m: int = 8  # rows of an output tile, WGMMA's N
    tile_n: int = 64  # columns of weights that an output tile takes, WGMMA's M
    k_boxes: int = 1  # weight boxes, of 128 bytes of K, per stage
    split_k: int = 1  # CTAs of a cluster, which share a tile's K
    evict_first: bool = False  # whether weights leave L2 before older contents
    template: ClassVar[str] = "gemm_swap_sm90"

    MAX_STAGES: ClassVar[int] = 32
    l2_promotion: ClassVar[int] = 128  # bytes that a read of weights brings into L2

    @property
    def gather_threads(self) -> int:
        """Threads that copy x; each copies 16 of the 128 bytes of a row."""
        return min(WARPGROUP, self.tile_m * K_TILE_BYTES // 16)

    @property
    def threads(self) -> int:
        """Threads per CTA: a consumer warpgroup, the gather's warps, one warp for the weights."""
        return WARPGROUP + 32 + self.gather_threads

    @property
    def cluster(self) -> int:
        """CTAs per cluster."""
        return self.split_k

    def k_stages(self, problem: GemmProblem) -> int:
        """The number of times that a stage is filled for all of K."""
        return -(-problem.k // (self.k_tile(problem) * self.k_boxes))

    def stage_bytes(self, problem: GemmProblem) -> int:
        return (self.x_bytes(problem) + self.weight_bytes(problem)) * self.k_boxes

    def table_words(self, problem: GemmProblem) -> int:
        """The int32 of the scheduler's table: three per expert."""
        return 3 * self.table_entries(problem)

    def warp_columns(self, problem: GemmProblem) -> int:
        """Output columns per warp, of every 64 columns of weights in a tile."""
        return 8 if problem.gated else 16

    @property
    def part_rows(self) -> int:
        """Rows of a tile that the epilogue stages and stores at a time."""
        return min(self.tile_m, 16)

    def staging_pitch(self, problem: GemmProblem) -> int:
        """Bytes per staging row: a warp's columns; odd multiples of 16 avoid bank conflicts."""
        return (self.warp_columns(problem) * problem.out.bytes // 16 | 1) * 16

    def staging_bytes(self, problem: GemmProblem) -> int:
        """Bytes of staging memory of the four consumer warps."""
        return 4 * self.part_rows * self.staging_pitch(problem)

    @property
    def partial_bytes(self) -> int:
        """Bytes for the sums of a tile that a cluster's other CTAs send to its CTA 0."""
        return (self.split_k - 1) * self.tile_m * self.tile_n * 4

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
        """Accumulators per consumer thread; two-level accumulation keeps a second set of them."""
        levels = 2 if problem.accumulation is Accumulation.TWO_LEVEL else 1
        return levels * self.tile_m * self.tile_n // WARPGROUP

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
        if self.tile_m != 8 and (self.tile_m % 16 or not 16 <= self.tile_m <= 96):
            return f"tile_m must be 8 or a multiple of 16 up to 96 (WGMMA's N), got {self.tile_m}"
        if self.tile_n not in (64, 128):
            return f"tile_n must be 64 or 128 (blocks of 64 columns, WGMMA's M), got {self.tile_n}"
        by_blocks = problem.gated and problem.weight.major is Major.N
        if by_blocks and self.tile_n == N_MAJOR_BLOCK:
            return (
                "tile_n must be 128 for gated N-major weights (a box of gate and one of up "
                f"columns), got {self.tile_n}"
            )
        if self.k_boxes not in (1, 2, 4):
            return f"k_boxes must be 1, 2 or 4, got {self.k_boxes}"
        if self.split_k not in (1, 2, 4, 8):
            return f"split_k must be 1, 2, 4 or 8 (CTAs per cluster), got {self.split_k}"
        if self.split_k > self.k_stages(problem):
            return (
                f"split_k must be at most {self.k_stages(problem)}, the number of stages that "
                f"K = {problem.k} fills, got {self.split_k}"
            )
        return None
