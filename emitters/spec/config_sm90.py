"""What is chosen: everything that changes a kernel's speed and none of its numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeVar

from emitters.spec.arch import _REGISTERS_PER_SM, _SMEM_PER_SM, _SMEM_RESERVED, _SMEM_UNIT
from emitters.spec.dtypes import Accumulation, Name
from emitters.spec.gemm import GemmProblem

K_TILE_BYTES = 128  # one swizzle atom of K; the tile of K in bytes, whatever the element
MAX_EXPERTS = 1024  # 32 lanes x 32 experts: the expert search is two ballots
SLICE_BYTES = 128  # the epilogue stores a tile in slices of so many bytes of each row
SLICE_ROWS = 16  # a warp's share of a slice: one box of a TMA store
SLOTS = 16  # posted units; more than MAX_STAGES + 3, see TileScheduler
SLOT_WORDS = 8  # int32 of a posted unit
WARPGROUP = 128


class Schedule(Name):
    """Which cluster computes which units of work, in the order of the scheduler's numbers."""

    STATIC = "static"  # equal shares, each a run of neighbours
    TILE = "tile"  # cluster c takes units c, c + clusters, c + 2 clusters, ...
    DYNAMIC = "dynamic"  # so for two rounds, then whoever is free takes the next: an atomic counter


_C = TypeVar("_C", bound="_Sm90Config")


@dataclass(frozen=True)
class _Sm90Config:
    """What the configs of both templates hold and derive alike."""

    # None: as many as shared memory holds, at most MAX_STAGES
    stages: int | None = field(default=None, kw_only=True)
    ctas_per_sm: int = field(default=1, kw_only=True)
    template: ClassVar[str]
    MAX_STAGES: ClassVar[int]

    def to_json(self) -> dict[str, Any]:
        return {"template": self.template, **asdict(self)}

    @classmethod
    def from_json(cls: type[_C], plain: dict[str, Any]) -> _C:
        """Inverse of `to_json`. Raises ValueError on an unknown template, field or value."""
        rest = dict(plain)
        if rest.pop("template", None) != cls.template:
            raise ValueError(
                f"expected a config of {cls.template!r}, got {plain.get('template')!r}"
            )
        try:
            if "schedule" in rest:
                rest["schedule"] = Schedule(rest["schedule"])
            return cls(**rest)
        except TypeError as error:
            raise ValueError(f"not a {cls.template} config: {error}") from error

    def k_tile(self, problem: GemmProblem) -> int:
        """Elements of K in 128 bytes, a box of weights."""
        return K_TILE_BYTES // problem.operand.bytes

    def table_entries(self, problem: GemmProblem) -> int:
        """Experts in the scheduler's table: num_experts rounded up to the warp's 32 lanes."""
        return -(-problem.num_experts // 32) * 32

    @property
    def stage_bytes(self) -> int:
        raise NotImplementedError

    def fixed_smem_bytes(self, problem: GemmProblem) -> int:
        """Shared memory besides the stages."""
        raise NotImplementedError

    @property
    def smem_limit(self) -> int:
        """Bytes of shared memory that a CTA may have."""
        return _SMEM_PER_SM // self.ctas_per_sm - _SMEM_RESERVED

    def pipeline_stages(self, problem: GemmProblem) -> int:
        if self.stages is not None:
            return self.stages
        fit = (self.smem_limit - self.fixed_smem_bytes(problem)) // self.stage_bytes
        return max(0, min(fit, self.MAX_STAGES))

    def smem_bytes(self, problem: GemmProblem) -> int:
        """So many at least that an SM holds ctas_per_sm CTAs and no more: in a dependent launch the
        SMs that the grid before leaves first would get more than their share."""
        needed = self.fixed_smem_bytes(problem) + self.pipeline_stages(problem) * self.stage_bytes
        too_many = _SMEM_PER_SM // (self.ctas_per_sm + 1) - _SMEM_RESERVED
        return max(needed, too_many + _SMEM_UNIT)


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
        return min(_REGISTERS_PER_SM // (self.threads * self.ctas_per_sm) // 8 * 8, 248)

    @property
    def producer_registers(self) -> int:
        return 32 + self.tile_m // 8  # for two tokens of every 16 rows, and addresses

    @property
    def consumer_registers(self) -> int:
        """What the producer gives back at `setmaxnreg`, shared out among the consumers."""
        pool = self.launch_registers * (1 + self.consumers) - self.producer_registers
        return min(pool // self.consumers // 8 * 8, 240)

    def k_tiles(self, problem: GemmProblem) -> int:
        return -(-problem.k // self.k_tile(problem))

    def n_tiles(self, problem: GemmProblem) -> int:
        return -(-problem.n // self.tile_n)

    @property
    def stage_bytes(self) -> int:
        return (self.tile_m + self.tile_n) * K_TILE_BYTES

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
    schedule: ClassVar[Schedule] = Schedule.TILE
    cluster_m: ClassVar[int] = 1
    group_m: ClassVar[int] = 8  # M tiles that share each N tile's weights
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

    def k_steps(self, problem: GemmProblem) -> int:
        """Stages that K takes."""
        return -(-problem.k // (self.k_tile(problem) * self.k_boxes))

    def n_tiles(self, problem: GemmProblem) -> int:
        return -(-problem.n // self.tile_n)

    @property
    def stage_bytes(self) -> int:
        return (self.tile_m + self.tile_n) * K_TILE_BYTES * self.k_boxes

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
        return min(_REGISTERS_PER_SM // (self.threads * self.ctas_per_sm) // 8 * 8, 248)

    def accumulator_registers(self, problem: GemmProblem) -> int:
        """Per consumer thread; two-level accumulation keeps a second accumulator."""
        levels = 2 if problem.accumulation is Accumulation.TWO_LEVEL else 1
        return levels * self.tile_m * self.tile_n // WARPGROUP
