"""What the configs of products on SM90 have in common: a ring of stages, and sizes of its parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import gcd
from typing import Any, ClassVar

from emitters.spec.arch import SM90
from emitters.spec.dtypes import Name
from emitters.spec.gemm import GemmProblem
from emitters.spec.plain import to_plain

K_TILE_BYTES = 128  # bytes of K in a k-tile, for every dtype of x: one swizzle atom
SLICE_BYTES = 128  # the epilogue stores a tile in slices of this many bytes per row
SLICE_ROWS = 16  # rows of a slice that a warp stores: one box of a TMA store
WARPGROUP = 128


class Schedule(Name):
    """The rule by which clusters take units of work, in the order of the units' numbers."""

    STATIC = "static"  # cluster c takes the c-th of equal runs of neighbours
    TILE = "tile"  # cluster c takes units c, c + clusters, c + 2 clusters, ...
    DYNAMIC = "dynamic"  # as TILE for two rounds; then a free cluster takes the next, by a counter


@dataclass(frozen=True)
class StagedConfig:
    """The config of a product whose operands wait in a ring of stages in shared memory."""

    tile_m: int  # rows of an output tile
    tile_n: int  # columns of weights that an output tile takes
    # None: as many stages as shared memory holds, at most MAX_STAGES
    stages: int | None = field(default=None, kw_only=True)
    ctas_per_sm: int = field(default=1, kw_only=True)
    template: ClassVar[str]
    MAX_STAGES: ClassVar[int]
    MAX_CTAS: ClassVar[int] = 2  # per SM

    def to_json(self) -> dict[str, Any]:
        return {"template": self.template, **to_plain(self)}

    def stage_bytes(self, problem: Any) -> int:
        """Bytes of shared memory per stage."""
        raise NotImplementedError

    def fixed_smem_bytes(self, problem: Any) -> int:
        """Bytes of shared memory for everything except the stages."""
        raise NotImplementedError

    @property
    def smem_limit(self) -> int:
        """Bytes of shared memory that a CTA may have."""
        return SM90.smem_per_sm // self.ctas_per_sm - SM90.smem_reserved

    def pipeline_stages(self, problem: Any) -> int:
        if self.stages is not None:
            return self.stages
        fit = (self.smem_limit - self.fixed_smem_bytes(problem)) // self.stage_bytes(problem)
        return max(0, min(fit, self.MAX_STAGES))

    def smem_bytes(self, problem: Any) -> int:
        """Bytes of shared memory per CTA, padded so that exactly ctas_per_sm CTAs fit on an SM.

        Otherwise, under dependent launch, SMs that drain first would take more than their share.
        """
        needed = self.fixed_smem_bytes(problem) + self.pipeline_stages(problem) * self.stage_bytes(
            problem
        )
        too_many = SM90.smem_per_sm // (self.ctas_per_sm + 1) - SM90.smem_reserved
        return max(needed, too_many + SM90.smem_unit)

    def why_no_memory(self, problem: Any) -> str | None:
        """Why shared memory can't hold the stages and the rest, or None."""
        if not 1 <= self.ctas_per_sm <= self.MAX_CTAS:
            most = "1 or 2" if self.MAX_CTAS == 2 else f"1 to {self.MAX_CTAS}"
            return f"ctas_per_sm must be {most}, got {self.ctas_per_sm}"
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
class Sm90Config(StagedConfig):
    """The derived sizes that the configs of both templates of the grouped GEMM have in common."""

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
        return self.tile_n * K_TILE_BYTES  # weights that are not packed have x's dtype

    def tile_outputs(self, problem: GemmProblem) -> int:
        """Columns of the output in a tile."""
        return self.tile_n // 2 if problem.gated else self.tile_n

    def scale_columns(self, problem: GemmProblem) -> int:
        """Columns of the output, in a tile, that share a scale of the weights along K."""
        assert problem.block_rows is not None
        return gcd(self.tile_outputs(problem), problem.block_rows)

    def weight_scales(self, problem: GemmProblem) -> int:
        """The scales of a k-tile of a tile's columns of weights."""
        groups = self.tile_outputs(problem) // self.scale_columns(problem)
        return 2 * groups if problem.gated else groups

    @property
    def scaled_rows(self) -> int:
        """The rows of x whose scales along K are in shared memory with a tile."""
        return self.tile_m

    def scale_words(self, problem: GemmProblem) -> int:
        """The float32 of shared memory for the scales of one k-tile: of x and of the weights.

        Those of the weights are rounded up to a multiple of four, a vector.
        """
        if not problem.block_rows:
            return 0
        return self.scaled_rows + -(-self.weight_scales(problem) // 4) * 4
