"""The config of the SM90 GEMM for many rows: choices that change its speed but not its numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from emitters.spec.arch import SM90, why_no_registers
from emitters.spec.dtypes import DType
from emitters.spec.epilogue import ActivationFunction
from emitters.spec.gemm import N_MAJOR_BLOCK, GemmProblem, Granularity, Major
from emitters.spec.staged_sm90 import SLICE_BYTES, SLICE_ROWS, WARPGROUP, Schedule, Sm90Config

SLOTS = 16  # posted units; more than MAX_STAGES + 3, see PostedUnits
SLOT_WORDS = 8  # int32 per posted unit
SCALE_SPAN = 4  # k-tiles whose scales of a row are 16 bytes, which one copy takes
SCALE_BOXES = 2 * SCALE_SPAN  # k-tiles whose scales are in shared memory where spans are copied
SPAN_STAGES = SCALE_SPAN + 1  # the most stages with two spans, see SpannedScales
_LEAST_STAGES = 3  # that are left where the slices of a whole tile are stored together
_TWO_LEVEL_OTHERS = 26  # registers per thread for addresses and the scales of a stage


def staged_slices(problem: GemmProblem) -> int:
    """The slices that a warp has staging rows for: one, or with an activation's gradient one of the
    output, of gates and of ups."""
    if problem.gradient is None:
        return 1
    return 3 if problem.gradient.function.gated else 2


@dataclass(frozen=True)
class GemmSm90Config(Sm90Config):
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
    # rows of x, which are in order, and their scales along K come by TMA; else by copies of 16
    # bytes and of 4
    tma_x: bool = False
    # k-tiles whose scales along K are copied at once: SCALE_SPAN, by copies of 16 bytes, or 1
    scale_span: int = 1
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
        # two tokens per 16 rows of the tile, and 32 for addresses
        return 32 + (0 if self.tma_x else self.tile_m // 8)

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

    @property
    def scaled_rows(self) -> int:
        # TMA reads from a multiple of 16 bytes on: up to three scales before the tile's
        return self.tile_m + (4 if self.tma_x else 0)

    def scale_words(self, problem: GemmProblem) -> int:
        words = super().scale_words(problem)
        return -(-words // 32) * 32 if self.tma_x else words  # TMA writes to multiples of 128 bytes

    def scale_boxes(self, problem: GemmProblem) -> int:
        """The k-tiles whose scales along K are in shared memory."""
        return SCALE_BOXES if self.scale_span > 1 else self.pipeline_stages(problem)

    def stage_bytes(self, problem: GemmProblem) -> int:
        scales = 4 * self.scale_words(problem) if self.scale_span == 1 else 0
        return self.x_bytes(problem) + self.weight_bytes(problem) + scales

    def table_words(self, problem: GemmProblem) -> int:
        """The int32 of the scheduler's table: three per expert, and the slots of posted units."""
        return 3 * self.table_entries(problem) + SLOTS * SLOT_WORDS

    def slices_together(self, problem: GemmProblem) -> int:
        """The slices of a tile that a warp sends together, each from memory of its own: 1 or all.

        All of them leave under the next tile's main loop, where else a warp waits for each one. In
        two-level sums of rows in order that is worth a stage, if three remain.
        """
        measured = problem.two_level and self.tma_x and self.ctas_per_sm == 1
        if not measured or not problem.sole_output:
            return 1
        slices = self.tile_outputs(problem) * problem.out.bytes // SLICE_BYTES
        stages = max(_LEAST_STAGES, self.stages or 0) * self.stage_bytes(problem)
        needed = self._slice_bytes(slices) + self._table_bytes(problem) + stages
        return slices if needed <= self.smem_limit else 1

    def _slice_bytes(self, count: int) -> int:
        """Bytes of shared memory for so many slices of each consumer warp."""
        return 4 * self.consumers * count * SLICE_ROWS * SLICE_BYTES

    def staging_bytes(self, problem: GemmProblem) -> int:
        """Bytes of staging memory: slices of each consumer warp, on their way to global memory."""
        return self._slice_bytes(self.slices_together(problem) * staged_slices(problem))

    def _table_bytes(self, problem: GemmProblem) -> int:
        """Bytes of shared memory for spans, the scheduler's table and barriers."""
        spans = 4 * self.scale_words(problem) * SCALE_BOXES if self.scale_span > 1 else 0
        barriers = 16 * self.MAX_STAGES + 8 * self.slice_barriers(problem)
        return spans + 4 * self.table_words(problem) + barriers

    def fixed_smem_bytes(self, problem: GemmProblem) -> int:
        return self.staging_bytes(problem) + self._table_bytes(problem)

    def slice_barriers(self, problem: GemmProblem) -> int:
        """The barriers on which warps wait for slices that they load: one each."""
        return 4 * self.consumers if problem.gradient else 0

    def parts(self, problem: GemmProblem) -> int:
        """The parts of a tile's columns that are multiplied one after the other.

        They are two where two-level accumulation has no registers for the products of all columns
        beside their sums.
        """
        free = self.consumer_registers - self._two_level_others
        return 2 if problem.two_level and self._accumulators(problem, 1) > free else 1

    def accumulator_registers(self, problem: GemmProblem) -> int:
        """Accumulators per consumer thread; two-level accumulation also keeps a part's products."""
        return self._accumulators(problem, self.parts(problem))

    def _accumulators(self, problem: GemmProblem, parts: int) -> int:
        sums = self.warpgroup_rows * self.tile_n // WARPGROUP
        return sums + (64 * self.tile_n // parts // WARPGROUP if problem.two_level else 0)

    @property
    def _two_level_others(self) -> int:
        """Registers per consumer thread beside the accumulators of two-level accumulation."""
        # with 192 rows by cp.async a tile has no scales along K
        return _TWO_LEVEL_OTHERS - 2 * (self.tile_m == 192 and not self.tma_x)

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
        loads = ["TMA x"] if self.tma_x else ["spans"] if self.scale_span > 1 else []
        return " ".join([tile, *pingpong, *cluster, *loads, group, f"{self.ctas_per_sm}/SM"])

    def why_illegal(self, problem: GemmProblem) -> str | None:
        """Why no kernel can be built with this config for a legal problem, or None."""
        return (
            self._why_tile(problem)
            or self._why_cluster(problem)
            or self.why_no_memory(problem)
            or self._why_span(problem)
            or self._why_registers(problem)
        )

    def _why_tile(self, problem: GemmProblem) -> str | None:
        if problem.weight.packing:
            return f"weights must not be packed for this config, got {problem.weight.dtype}"
        if self.tile_m not in (64, 128, 192):
            return (
                f"tile_m must be 64, 128 or 192 (64 rows per consumer warpgroup), got {self.tile_m}"
            )
        if self.tma_x and problem.gather:
            return "tma_x must be False for rows read through an index, got True"
        if problem.block_rows and self.tile_m > 128 and not self.tma_x:
            return (
                "tile_m must be at most 128 with scales that vary along K (a thread copies one "
                f"row's scale) unless tma_x is set, got {self.tile_m}"
            )
        multiple = SLICE_BYTES // DType.BF16.bytes
        if problem.gated and (problem.out is not DType.FP32 or problem.weight.major is Major.N):
            multiple *= 2  # a slice of outputs takes twice its columns; or a gate and an up box
        if problem.quantized_out:
            multiple *= 2  # a slice has 128 outputs, which share a scale
        if self.tile_n % multiple or not multiple <= self.tile_n <= 256:
            return (
                f"tile_n must be a multiple of {multiple} (the epilogue stores whole slices) up to "
                f"256 (WGMMA's largest N), got {self.tile_n}"
            )
        if self.pingpong and self.tile_m > 128:
            return f"tile_m must be at most 128 with pingpong, got {self.tile_m}"
        return None

    def _why_span(self, problem: GemmProblem) -> str | None:
        if self.scale_span == 1:
            return None
        if self.scale_span != SCALE_SPAN:
            return f"scale_span must be 1 or {SCALE_SPAN}, got {self.scale_span}"
        if not problem.block_rows or self.tma_x:
            return f"scale_span must be 1 unless threads copy scales along K, got {SCALE_SPAN}"
        if self.k_tiles(problem) % SCALE_SPAN:
            return (
                f"scale_span must be 1 unless a row has a multiple of {SCALE_SPAN} scales, got "
                f"{self.k_tiles(problem)}"
            )
        stages = self.pipeline_stages(problem)
        if stages > SPAN_STAGES:
            return f"stages must be at most {SPAN_STAGES} with scale_span, got {stages}"
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
        width = self.tile_n // self.parts(problem)
        needed = width // 2 + 26  # by one WGMMA, before setmaxnreg passes registers on
        if needed > self.launch_registers:
            return (
                f"one WGMMA needs about {needed} registers per thread, "
                f"the launch provides {self.launch_registers}"
            )
        others, activation = 80, problem.activation  # for addresses, scales and one slice to store
        kinds = {node.kind for node in problem.epilogue}
        tail = problem.n % self.tile_n  # a tail of N takes registers for predicates
        per_channel = problem.weight_scale is Granularity.CHANNEL
        if problem.two_level:  # the products' registers are free again when the epilogue starts
            others = self._two_level_others
            wide_out = self.tile_m == 192 and problem.out is DType.FP32
            if per_channel and (tail or self.warpgroup_rows > 64 or wide_out or problem.stored):
                others += 30
        elif per_channel and problem.stored:
            others = 120  # the parts of a slice stay until gates and ups are stored
        elif activation and activation.stored and activation.function is ActivationFunction.GEGLU:
            others = 100  # the error function takes some
        elif per_channel and "bias" in kinds:
            others = 112 if tail else 100 if problem.gated else 80
        accumulators = self.accumulator_registers(problem)
        return why_no_registers(accumulators, others, self.consumer_registers, "consumer thread")
