"""What is chosen on SM90: everything that changes a kernel's speed and none of its numbers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from emitters.spec.arch import SM90, why_no_registers
from emitters.spec.dtypes import Accumulation, DType, Name
from emitters.spec.gemm import N_MAJOR_BLOCK, GemmProblem, Granularity, Major
from emitters.spec.plain import to_plain

K_TILE_BYTES = 128  # one swizzle atom of K; the tile of K in bytes, whatever the element of x
SLICE_BYTES = 128  # the epilogue stores a tile in slices of so many bytes of each row
SLICE_ROWS = 16  # a warp's share of a slice: one box of a TMA store
SLOTS = 16  # posted units; more than MAX_STAGES + 3, see PostedUnits
SLOT_WORDS = 8  # int32 of a posted unit
WARPGROUP = 128


class Schedule(Name):
    """Which cluster computes which units of work, in the order of the scheduler's numbers."""

    STATIC = "static"  # equal shares, each a run of neighbours
    TILE = "tile"  # cluster c takes units c, c + clusters, c + 2 clusters, ...
    DYNAMIC = "dynamic"  # so for two rounds, then whoever is free takes the next: an atomic counter


@dataclass(frozen=True)
class _Sm90Config:
    """What the configs of both templates hold and derive alike."""

    tile_m: int  # rows of x, of a tile of the output
    tile_n: int  # columns of weights
    # None: as many as shared memory holds, at most MAX_STAGES
    stages: int | None = field(default=None, kw_only=True)
    ctas_per_sm: int = field(default=1, kw_only=True)
    template: ClassVar[str]
    MAX_STAGES: ClassVar[int]

    def to_json(self) -> dict[str, Any]:
        return {"template": self.template, **to_plain(self)}

    def k_tile(self, problem: GemmProblem) -> int:
        """Elements of K in 128 bytes, a box of weights."""
        return K_TILE_BYTES // problem.x.bytes

    def n_tiles(self, problem: GemmProblem) -> int:
        return -(-problem.n // self.tile_n)

    def table_entries(self, problem: GemmProblem) -> int:
        """Experts in the scheduler's table: num_experts rounded up to the warp's 32 lanes."""
        return -(-problem.num_experts // 32) * 32

    def x_bytes(self, problem: GemmProblem) -> int:
        """Shared memory of a tile's rows of x, one k-tile of them."""
        return self.tile_m * K_TILE_BYTES

    def weight_bytes(self, problem: GemmProblem) -> int:
        """Shared memory of a tile's columns of weights, one k-tile of them."""
        return self.tile_n * self.k_tile(problem) * problem.weight.dtype.bytes

    def stage_bytes(self, problem: GemmProblem) -> int:
        raise NotImplementedError

    def fixed_smem_bytes(self, problem: GemmProblem) -> int:
        """Shared memory besides the stages."""
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
        """Padded so that exactly ctas_per_sm CTAs fit on an SM.

        Otherwise, under dependent launch, SMs that drain first would take more than their share.
        """
        needed = self.fixed_smem_bytes(problem) + self.pipeline_stages(problem) * self.stage_bytes(
            problem
        )
        too_many = SM90.smem_per_sm // (self.ctas_per_sm + 1) - SM90.smem_reserved
        return max(needed, too_many + SM90.smem_unit)

    def why_no_memory(self, problem: GemmProblem) -> str | None:
        """None where shared memory holds the stages and the rest, else the reason in words."""
        if self.ctas_per_sm not in (1, 2):
            return f"ctas_per_sm must be 1 or 2, got {self.ctas_per_sm}"
        stages, stage_bytes = self.pipeline_stages(problem), self.stage_bytes(problem)
        if not 2 <= stages <= self.MAX_STAGES:
            return (
                f"there must be 2 to {self.MAX_STAGES} stages, "
                f"got {stages} of {stage_bytes} bytes each"
            )
        smem, limit = self.smem_bytes(problem), self.smem_limit
        return (
            None if smem <= limit else f"shared memory of a CTA must be at most {limit}, got {smem}"
        )


@dataclass(frozen=True)
class GemmSm90Config(_Sm90Config):
    """The persistent SM90 grouped GEMM: a producer warpgroup, and consumers that run WGMMA.

    Consumers share a tile, 64 rows each, or in ping-pong take whole tiles in turn: one's epilogue
    runs under the other's WGMMA.
    """

    tile_m: int = 128
    tile_n: int = 256
    pingpong: bool = False
    cluster_m: int = 1  # CTAs that take M tiles side by side and share their weights by multicast
    schedule: Schedule = Schedule.TILE
    group_m: int = 8  # M tiles that share each N tile's weights before the next N tile
    template: ClassVar[str] = "gemm_sm90"

    MAX_STAGES: ClassVar[int] = 8
    l2_promotion: ClassVar[int] = 256  # bytes that a read of weights brings into L2

    # What follows from a config and its problem, written once.

    @property
    def warpgroups_per_tile(self) -> int:
        return 1 if self.pingpong else self.tile_m // 64

    @property
    def consumers(self) -> int:
        """Warpgroups that run WGMMA."""
        return 2 if self.pingpong else self.tile_m // 64

    @property
    def warpgroup_rows(self) -> int:
        """Rows of a tile in a consumer's accumulators."""
        return self.tile_m // self.warpgroups_per_tile

    @property
    def threads(self) -> int:
        return WARPGROUP * (1 + self.consumers)

    @property
    def cluster(self) -> int:
        """CTAs of a cluster."""
        return self.cluster_m

    @property
    def launch_registers(self) -> int:
        """Registers a thread at launch: what the CTAs of an SM may have, in steps of 8."""
        return min(SM90.registers_per_sm // (self.threads * self.ctas_per_sm) // 8 * 8, 248)

    @property
    def producer_registers(self) -> int:
        return 32 + self.tile_m // 8  # for two tokens of every 16 rows, and addresses

    @property
    def thread_registers(self) -> str:
        """A producer's and a consumer's, for people."""
        return f"{self.producer_registers} / {self.consumer_registers}"

    @property
    def consumer_registers(self) -> int:
        """What the producer gives back at `setmaxnreg`, shared out among the consumers."""
        pool = self.launch_registers * (1 + self.consumers) - self.producer_registers
        return min(pool // self.consumers // 8 * 8, 240)

    def k_tiles(self, problem: GemmProblem) -> int:
        return -(-problem.k // self.k_tile(problem))

    def stage_bytes(self, problem: GemmProblem) -> int:
        return self.x_bytes(problem) + self.weight_bytes(problem)

    def table_words(self, problem: GemmProblem) -> int:
        """The scheduler's table: three int32 an expert; the units it has posted."""
        return 3 * self.table_entries(problem) + SLOTS * SLOT_WORDS

    @property
    def staging_bytes(self) -> int:
        """A slice on its way to global memory for each consumer warp."""
        return 4 * self.consumers * SLICE_ROWS * SLICE_BYTES

    def fixed_smem_bytes(self, problem: GemmProblem) -> int:
        """Shared memory besides the stages: staging rows, scheduler table, barriers."""
        return self.staging_bytes + 4 * self.table_words(problem) + 16 * self.MAX_STAGES

    def accumulator_registers(self, problem: GemmProblem) -> int:
        """Per consumer thread; two-level accumulation keeps a second accumulator."""
        levels = 2 if problem.accumulation is Accumulation.TWO_LEVEL else 1
        return levels * self.warpgroup_rows * self.tile_n // WARPGROUP

    @property
    def cluster_tiles(self) -> int:
        """Tiles that a cluster takes at a time."""
        return self.cluster_m

    def scheduled(self, schedule: Schedule) -> GemmSm90Config | None:
        """This config with another schedule; a dynamic one has no clusters."""
        cluster_m = 1 if schedule is Schedule.DYNAMIC else self.cluster_m
        return replace(self, schedule=schedule, cluster_m=cluster_m)

    @property
    def words(self) -> str:
        """For lists that people read."""
        pingpong = ["ping-pong"] if self.pingpong else []
        cluster = [f"cluster {self.cluster_m}"] if self.cluster_m > 1 else []
        tile, group = f"{self.tile_m}x{self.tile_n}", f"group {self.group_m}"
        return " ".join([tile, *pingpong, *cluster, group, f"{self.ctas_per_sm}/SM"])

    def why_illegal(self, problem: GemmProblem) -> str | None:
        """None where the kernel of a legal problem can be built so, else the reason in words."""
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
            multiple *= 2  # columns of weights for a slice of outputs, or boxes of gate and up
        if self.tile_n % multiple or not multiple <= self.tile_n <= 256:
            return (
                f"tile_n must be a multiple of {multiple} up to 256 (WGMMA's N, whole slices), "
                f"got {self.tile_n}"
            )
        if self.pingpong and self.tile_m > 128:
            return f"ping-pong tiles must have at most 128 rows, got {self.tile_m}"
        return None

    def _why_cluster(self, problem: GemmProblem) -> str | None:
        if self.cluster_m not in (1, 2):
            return f"cluster_m must be 1 or 2, got {self.cluster_m}"
        if self.cluster_m > 1 and self.schedule is Schedule.DYNAMIC:
            return "a dynamic schedule must have cluster_m 1, since its counter serves single CTAs"
        share = N_MAJOR_BLOCK * self.cluster_m
        if problem.weight.major is Major.N and self.tile_n % share:
            return (
                f"tile_n of N-major weights must be a multiple of {share}, boxes of "
                f"{N_MAJOR_BLOCK} columns for each CTA of a cluster, got {self.tile_n}"
            )
        if self.group_m < 1 or self.group_m % self.cluster_m:
            return (
                f"group_m must be a positive multiple of cluster_m ({self.cluster_m}), "
                f"got {self.group_m}"
            )
        return None

    def _why_registers(self, problem: GemmProblem) -> str | None:
        needed = self.tile_n // 2 + 26  # of one WGMMA, before registers change hands
        if needed > self.launch_registers:
            return (
                f"one WGMMA needs about {needed} registers per thread, "
                f"the launch provides {self.launch_registers}"
            )
        others = 80  # addresses, scales, one store slice
        kinds = {node.kind for node in problem.epilogue}
        if problem.weight_scale is Granularity.CHANNEL and "bias" in kinds:
            tail = problem.n % self.tile_n  # of N: predicates
            others = 112 if tail else 100 if problem.gated else 80
        accumulators = self.accumulator_registers(problem)
        return why_no_registers(accumulators, others, self.consumer_registers, "consumer thread")


@dataclass(frozen=True)
class GemmSwapSm90Config(_Sm90Config):
    """The SM90 grouped GEMM for few rows an expert: weights are WGMMA's M operand, rows its N."""

    tile_m: int = 8  # rows of the product, WGMMA's N
    tile_n: int = 64  # columns, WGMMA's M
    k_boxes: int = 1  # weight boxes of 128 bytes of K a stage
    split_k: int = 1  # CTAs of a cluster that share a tile's K
    evict_first: bool = False  # weights leave L2 before what was there
    template: ClassVar[str] = "gemm_swap_sm90"

    MAX_STAGES: ClassVar[int] = 32
    l2_promotion: ClassVar[int] = 128  # bytes that a read of weights brings into L2

    @property
    def gather_threads(self) -> int:
        """Of x: 16 bytes each of a row's 128."""
        return min(WARPGROUP, self.tile_m * K_TILE_BYTES // 16)

    @property
    def threads(self) -> int:
        """A consumer warpgroup, the gather's, a warp for the weights."""
        return WARPGROUP + 32 + self.gather_threads

    @property
    def cluster(self) -> int:
        """CTAs of a cluster."""
        return self.split_k

    def k_stages(self, problem: GemmProblem) -> int:
        """Stages that K takes."""
        return -(-problem.k // (self.k_tile(problem) * self.k_boxes))

    def stage_bytes(self, problem: GemmProblem) -> int:
        return (self.x_bytes(problem) + self.weight_bytes(problem)) * self.k_boxes

    def table_words(self, problem: GemmProblem) -> int:
        """The scheduler's table: three int32 an expert."""
        return 3 * self.table_entries(problem)

    def warp_columns(self, problem: GemmProblem) -> int:
        """Of the output, that a warp has of every 64 of the tile."""
        return 8 if problem.gated else 16

    @property
    def part_rows(self) -> int:
        """Rows of a tile that the epilogue stages at a time."""
        return min(self.tile_m, 16)

    def staging_pitch(self, problem: GemmProblem) -> int:
        """Bytes between staging rows: a warp's columns; odd multiples of 16 keep banks apart."""
        return (self.warp_columns(problem) * problem.out.bytes // 16 | 1) * 16

    def staging_bytes(self, problem: GemmProblem) -> int:
        return 4 * self.part_rows * self.staging_pitch(problem)

    @property
    def partial_bytes(self) -> int:
        """Sums of a tile that the other CTAs of a cluster send to its first."""
        return (self.split_k - 1) * self.tile_m * self.tile_n * 4

    def fixed_smem_bytes(self, problem: GemmProblem) -> int:
        """Shared memory besides the stages: staging, sums, table, number of tiles, barriers."""
        buffers = self.staging_bytes(problem) + self.partial_bytes
        barriers = 16 * (self.MAX_STAGES + 1)
        return buffers + 4 * self.table_words(problem) + 16 + barriers

    @property
    def registers(self) -> int:
        """A thread's, in steps of 8."""
        return min(SM90.registers_per_sm // (self.threads * self.ctas_per_sm) // 8 * 8, 248)

    @property
    def thread_registers(self) -> str:
        """Everyone's, for people."""
        return str(self.registers)

    def accumulator_registers(self, problem: GemmProblem) -> int:
        """Per consumer thread; two-level accumulation keeps a second accumulator."""
        levels = 2 if problem.accumulation is Accumulation.TWO_LEVEL else 1
        return levels * self.tile_m * self.tile_n // WARPGROUP

    @property
    def cluster_tiles(self) -> int:
        """Tiles that a cluster takes at a time."""
        return 1

    def scheduled(self, schedule: Schedule) -> GemmSwapSm90Config | None:
        """This config with another schedule, of which it has one alone; None for others."""
        return self if schedule is Schedule.TILE else None

    @property
    def words(self) -> str:
        """For lists that people read."""
        tile = f"{self.tile_m}x{self.tile_n}"
        return f"swap {tile} K/{self.split_k} {self.ctas_per_sm}/SM"

    def why_illegal(self, problem: GemmProblem) -> str | None:
        """None where the kernel of a legal problem can be built so, else the reason in words."""
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
                "tile_n of gated N-major weights must be 128, a box of gate and one of up, "
                f"got {self.tile_n}"
            )
        if self.k_boxes not in (1, 2, 4):
            return f"k_boxes must be 1, 2 or 4, got {self.k_boxes}"
        if self.split_k not in (1, 2, 4, 8):
            return f"split_k must be 1, 2, 4 or 8 CTAs of a cluster, got {self.split_k}"
        if self.split_k > self.k_stages(problem):
            return (
                f"split_k must be at most the {self.k_stages(problem)} stages that K {problem.k} "
                f"takes, got {self.split_k}"
            )
        return None
