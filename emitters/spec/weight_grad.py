"""The problem and the config of a grouped weight gradient, a product that sums over rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from emitters.spec.arch import SM90, why_no_registers
from emitters.spec.dtypes import DType, Name
from emitters.spec.gemm import MAX_EXPERTS
from emitters.spec.layer_steps import Step
from emitters.spec.staged_sm90 import SLICE_BYTES, SLICE_ROWS, WARPGROUP, StagedConfig

STEP_ROWS = 64  # rows of both operands in a stage
BLOCK = 64  # columns of an operand, 128 bytes of 16 bits, that lie together in a stage
RAGGED_ROWS = 1 << 30


class Side(Name):
    """One of the two operands."""

    LEFT = "left"
    RIGHT = "right"


@dataclass(frozen=True)
class WeightGradProblem(Step):
    """Sums, for each expert, the products of its rows of two operands.

      out[e] = sum over the rows r of expert e of left[r].T @ right[r]

    left is [., M], right [., N], out [E, M, N]. Sums are float32, in the order of rows. The number
    of rows and the routing are not part of a problem.
    """

    operand: DType
    out: DType
    m: int
    n: int
    num_experts: int
    gathered: Side | None = None  # the operand whose rows are read through an index
    accumulate: bool = False  # whether sums are added to what out holds
    op: ClassVar[str] = "weight_grad"

    @property
    def words(self) -> str:
        size = f"E {self.num_experts} M {self.m} N {self.n}"
        gather = [f"gather {self.gathered}"] if self.gathered else []
        add = ["accumulate"] if self.accumulate else []
        return " ".join([self.op, f"{self.operand} > {self.out}", size, *gather, *add])

    @property
    def gathered_columns(self) -> int:
        return self.m if self.gathered is Side.LEFT else self.n

    @property
    def shared(self) -> Side:
        """The operand that the CTAs of a cluster share: one that is read in order."""
        return Side.LEFT if self.gathered is Side.RIGHT else Side.RIGHT

    def why_illegal(self) -> str | None:
        if self.operand not in (DType.BF16, DType.FP16):
            return f"operands must be bf16 or fp16, got {self.operand}"
        if self.out not in (self.operand, DType.FP32):
            return f"the output must be {self.operand} like the operands or fp32, got {self.out}"
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            return f"the number of experts must be 1 to {MAX_EXPERTS}, got {self.num_experts}"
        for name, columns in (("M", self.m), ("N", self.n)):
            if columns < 1 or columns % 8:
                return f"{name} must be a positive multiple of 8 (16 bytes), got {columns}"
        return None


@dataclass(frozen=True)
class WeightGradSm90Config(StagedConfig):
    """The config of `WeightGradSm90`: two consumer warpgroups and a producer.

    The consumers share a tile or, with pingpong, take whole tiles in turn. The CTAs of a cluster
    take neighbouring tiles and share the columns of one operand, see `WeightGradProblem.shared`.
    """

    tile_m: int = 128
    tile_n: int = 256
    pingpong: bool = False
    cluster: int = 1  # CTAs
    group_m: int = 16  # units along M that use the same columns of right before the next ones
    template: ClassVar[str] = "weight_grad_sm90"

    MAX_STAGES: ClassVar[int] = 8
    threads: ClassVar[int] = 3 * WARPGROUP
    l2_promotion: ClassVar[int] = 256  # bytes that a read of an operand in order brings into L2

    @property
    def launch_registers(self) -> int:
        return SM90.registers_per_sm // self.threads // 8 * 8

    @property
    def producer_registers(self) -> int:
        return 40 if self.accumulators > 128 else 56

    @property
    def consumer_registers(self) -> int:
        """Registers per consumer thread after `setmaxnreg` has passed on what producers gave up."""
        return (3 * self.launch_registers - self.producer_registers) // 2 // 8 * 8

    @property
    def warpgroups_per_tile(self) -> int:
        return 1 if self.pingpong else 2

    @property
    def m_blocks(self) -> int:
        """The blocks of 64 rows of a tile that one consumer accumulates."""
        return self.tile_m // (64 * self.warpgroups_per_tile)

    @property
    def accumulators(self) -> int:
        """Registers of a consumer thread that hold sums."""
        return self.m_blocks * self.tile_n // 2

    def slices(self, problem: WeightGradProblem) -> int:
        """The slices of 16 rows x 128 bytes that a consumer warp has of a tile."""
        return self.m_blocks * self.tile_n * problem.out.bytes // SLICE_BYTES

    def buffers(self, problem: WeightGradProblem) -> int:
        """The slices per consumer warp that are in shared memory, on their way to or from out.

        They are a divisor of `slices`. Sums that are added wait for what they are added to, so
        that more of it must be under way.
        """
        most = 4 if problem.accumulate else 2
        return max(b for b in range(1, most + 1) if self.slices(problem) % b == 0)

    def units(self, problem: WeightGradProblem) -> int:
        """The units of work of all experts; a cluster computes one at a time."""
        m, n = self.unit_grid(problem)
        return problem.num_experts * m * n

    def unit_grid(self, problem: WeightGradProblem) -> tuple[int, int]:
        """The units of an expert along M and along N: a tile, or the tiles of a cluster."""
        m, n = -(-problem.m // self.tile_m), -(-problem.n // self.tile_n)
        if problem.shared is Side.LEFT:
            return m, -(-n // self.cluster)
        return -(-m // self.cluster), n

    def stage_bytes(self, problem: WeightGradProblem) -> int:
        return (self.tile_m + self.tile_n) * STEP_ROWS * problem.operand.bytes

    def staging_bytes(self, problem: WeightGradProblem) -> int:
        return 8 * self.buffers(problem) * SLICE_ROWS * SLICE_BYTES

    def fixed_smem_bytes(self, problem: WeightGradProblem) -> int:
        """Bytes of shared memory except the stages: staging rows, barriers."""
        barriers = 2 * self.MAX_STAGES + 8 * self.buffers(problem)
        return self.staging_bytes(problem) + 8 * barriers

    @property
    def words(self) -> str:
        """A short description, for lists that people read."""
        pingpong = ["ping-pong"] if self.pingpong else []
        cluster = [f"cluster {self.cluster}"] if self.cluster > 1 else []
        tile, group = f"{self.tile_m}x{self.tile_n}", f"group {self.group_m}"
        return " ".join([tile, *pingpong, *cluster, group])

    def why_illegal(self, problem: WeightGradProblem) -> str | None:
        """Why no kernel can be built with this config for a legal problem, or None."""
        rows = 64 * self.warpgroups_per_tile
        if self.tile_m not in (rows, 2 * rows):
            return f"tile_m must be {rows} or {2 * rows} (64 per warpgroup), got {self.tile_m}"
        if self.tile_n % BLOCK or not BLOCK <= self.tile_n <= 256:
            return (
                f"tile_n must be a multiple of {BLOCK} up to 256 (WGMMA's largest N), "
                f"got {self.tile_n}"
            )
        if self.cluster not in (1, 2):
            return f"cluster must be 1 or 2, got {self.cluster}"
        shared = self.tile_m if problem.shared is Side.LEFT else self.tile_n
        if shared % (BLOCK * self.cluster):
            return (
                f"a tile's columns of the operand that a cluster shares must be a multiple of "
                f"{BLOCK * self.cluster}, got {shared}"
            )
        if self.group_m < 1:
            return f"group_m must be a positive number, got {self.group_m}"
        if self.ctas_per_sm != 1:
            return f"ctas_per_sm must be 1, got {self.ctas_per_sm}"
        if self.units(problem) >= 2**31:
            return f"tiles must be fewer than 2**31, got {self.units(problem)}"
        return self.why_no_memory(problem) or why_no_registers(
            self.accumulators, 40, self.consumer_registers, "consumer thread"
        )


def ragged_view(columns: int, stride: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The extents and outer strides of the tensor map of an operand whose rows are read in order.

    It ends where the kernel says: at the coordinates (c, B - rows + r, end, B), where B is
    RAGGED_ROWS, lies column c of row end - rows + r, and zeros are read from r = rows on, whatever
    follows in memory. For this the strides of the last two dimensions add up to 2^34 elements, so
    that B of them are 2^64, or more, and drop out of an address. columns: of the operand; stride:
    from a row to the next; in elements of 16 bits.

    (Two dimensions, because a map must start at an address that may be read.)
    """
    many = 2**31 - 1
    return (columns, RAGGED_ROWS, many, many), (stride, stride, 2**34 - stride)
