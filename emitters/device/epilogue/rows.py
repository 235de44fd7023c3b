"""The fragment of the template for many rows: rows of the product are WGMMA's M."""

from __future__ import annotations

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr, range_constexpr

from emitters.device.memory import GMEM, vector
from emitters.spec.config_sm90 import GemmSm90Config
from emitters.spec.gemm import N_MAJOR_BLOCK, GemmProblem, Major
from emitters.spec.staged_sm90 import SLICE_BYTES

_FEW_SUMS = 128  # columns of 64 rows each, up to which a thread has registers to spare


class RowsFragment:
    """The fragment of `GemmSm90`: rows of the product are WGMMA's M.

    WGMMA gives a thread two rows of 64, 8 apart, and two neighbours of every 8 columns:

      register   m * tile_n / 2 + 4 * block + 2 * half + c
      row        64 * m + 8 * half + `row`
      column     8 * block + `column` + c

    In a gated problem the blocks of 8 columns hold gates (g) and ups (u) of the outputs 0 - 7, ...

      block             0     1     2     3     ...   8     9     ...
      K-major weights   g0    u0    g1    u1    ...   g4    u4    ...
      N-major weights   g0    g1    g2    g3    ...   u0    u1    ...

    where g0 is for the outputs 0 - 7, g1 for 8 - 15. `register` puts the second order into the
    first. In an alternating problem the two neighbours are gate and up of an output, and four lanes
    exchange the outputs of two blocks.
    """

    def __init__(
        self, problem: GemmProblem, config: GemmSm90Config, strides, warp: Int32, lane: Int32
    ):
        """Computes what a thread's registers stand for.

        strides: the result of `gate_strides` for a gated problem, else None. warp: its number
        among the warps of all consumers.
        """
        # the first of the warp's 16 rows, in the tile or in every 64 rows of it
        self.warp_row = warp % (4 * config.warpgroups_per_tile) * 16
        self.tile_m = config.tile_m
        self.row = self.warp_row + lane // 4
        self.m_blocks = config.warpgroup_rows // 64
        self.column = lane % 4 * 2
        self.blocks = config.tile_n // 8
        self.gated, self.alternating = problem.gated, problem.alternating
        n_major = problem.weight.major is Major.N
        self.by_blocks = problem.gated and n_major and not problem.alternating  # gate and up
        self.lane = lane
        self.part_blocks = SLICE_BYTES // problem.out.bytes // 8
        self.parts = config.tile_n // (8 * self.part_blocks)
        self.part_registers = 4 * self.part_blocks
        self.n, self.out_columns = problem.n, problem.out_columns
        self.has_n_tail = problem.n % config.tile_n != 0
        self.strides = strides
        self.token_count = 2 * self.m_blocks
        self.channel_count = 2 * self.blocks
        self.part_channels = 2 * self.part_blocks
        self.few_registers = problem.two_level and self.m_blocks * config.tile_n > _FEW_SUMS

    def register(self, i: int) -> int:
        if not self.by_blocks:
            return i
        block, c = divmod(i, 4)
        box = N_MAJOR_BLOCK // 8  # blocks per box
        two, in_pairs = divmod(block, 2 * box)
        return 4 * (2 * box * two + box * (in_pairs % 2) + in_pairs // 2) + c

    def token_row(self, i: int):
        return self.row + i // 2 * 64 + i % 2 * 8

    def by_row(self, values: cute.Tensor, m: int, part: int):
        return [values[2 * m + i // 2 % 2] for i in range(4 * self.part_blocks)]

    def by_channel(self, values: cute.Tensor, m: int, part: int):
        first = part * self.part_channels
        if self.gated and not self.alternating:
            return [self.gate_or_up(values, first, i) for i in range(4 * self.part_blocks)]
        return [values[first + i // 4 * 2 + i % 2] for i in range(4 * self.part_blocks)]

    def read_scales(self, x: cute.Tensor, weights: cute.Tensor, columns: int) -> list:
        of_rows = [x[self.token_row(i)] for i in range(self.token_count)]
        return of_rows + [weights[i] for i in range(8 * self.blocks // columns)]

    def factors(self, scales: list, columns: int) -> Callable[[int], Float32]:
        halves = 2 if self.gated else 1
        columns *= halves  # of N
        groups = 8 * self.blocks // columns  # of gates or ups
        products: dict[tuple[int, int], Float32] = {}

        def factor(register: int) -> Float32:
            m, rest = divmod(register, 4 * self.blocks)
            block, half = divmod(rest // 2, 2)
            up = block % halves
            pair = 2 * m + half, self.token_count + up * groups + block * 8 // columns
            if pair not in products:
                products[pair] = scales[pair[0]] * scales[pair[1]]
            return products[pair]

        return factor

    def gates_and_ups(self, values: cute.Tensor) -> list[tuple[Float32, Float32]]:
        firsts = [first + i for first in range(0, cute.size(values), 8) for i in range(4)]
        if self.alternating:  # of a row the output of each block, instead of the block's columns
            return [(values[i + 3 * (i % 2)], values[i + 3 * (i % 2) + 1]) for i in firsts]
        return [(values[i], values[i + 4]) for i in firsts]

    def in_order(self, results: cute.Tensor):
        if not self.alternating:
            return results
        # of every 8 outputs a lane has q = lane % 4 and q + 4; it stores 2q and 2q + 1
        ordered = cute.make_rmem_tensor((cute.size(results),), Float32)
        for i in range(0, cute.size(results), 2):
            for c in range(2):
                source = self.lane // 4 * 4 + (self.lane * 2 + c) % 4
                low, high = (cute.arch.shuffle_sync(results[i + j], source) for j in range(2))
                ordered[i + c] = cutlass.select_(self.lane % 4 < 2, low, high)
        return ordered

    def read_channels(
        self,
        pointer: cute.Pointer,
        values: cute.Tensor,
        first: int,
        expert: Int32,
        first_column: Int32,
    ):
        if self.alternating:
            self.read_pairs(pointer, values, first, expert, 2 * first_column)
        elif self.gated:
            self.read_gate_and_up(pointer, values, first, expert, first_column)
        else:
            self.read_pairs(pointer, values, first, expert, first_column)

    @cute.jit
    def read_gate_and_up(
        self,
        pointer: cute.Pointer,
        values: cute.Tensor,
        first: cutlass.Constexpr,
        expert: Int32,
        first_column: Int32,
    ):
        """Reads the gate and up values of two neighbouring outputs at a time.

        They come as g, g, u, u or, interleaved, as g, u, g, u; `gate_or_up` tells them apart.
        """
        column_stride, gate_stride = self.strides
        second = gate_stride
        if gate_stride == 1:
            second = Int32(2)
        column = first_column + first // 4 * 8 + self.column
        source = pointer + (expert * self.n + column * column_stride)
        for pairs in range_constexpr(cute.size(values) // 4):
            four = cute.make_rmem_tensor((2, 2), pointer.dtype)
            four.fill(0)
            if const_expr(self.has_n_tail):
                if column + pairs * 8 < self.out_columns:
                    for i in range_constexpr(2):
                        pair = vector(source + i * second, pointer.dtype, 2, GMEM)
                        cute.autovec_copy(pair, four[None, i])
            else:
                for i in range_constexpr(2):
                    pair = vector(source + i * second, pointer.dtype, 2, GMEM)
                    cute.autovec_copy(pair, four[None, i])
            for i in range_constexpr(4):
                values[4 * pairs + i] = four[i]
            source = source + 8 * column_stride

    def gate_or_up(self, values: cute.Tensor, first: int, register: int):
        """The value that `read_gate_and_up` read for a register of a part.

        It is selected here, no sooner than it is needed.
        """
        half, c = register // 4 % 2, register % 2
        four = first + register // 8 * 4
        halves, interleaved = values[four + 2 * half + c], values[four + 2 * c + half]
        if half == c:
            return halves
        chosen = cutlass.select_(self.strides[1] == 1, interleaved, halves)
        return values.element_type(chosen)

    @cute.jit
    def read_pairs(
        self,
        pointer: cute.Pointer,
        values: cute.Tensor,
        first: cutlass.Constexpr,
        expert: Int32,
        first_column: Int32,
    ):
        """Reads the values of two neighbouring columns at a time."""
        for block in range_constexpr(cute.size(values) // 2):
            column = first_column + (first // 2 + block) * 8 + self.column
            pair = cute.make_rmem_tensor((2,), pointer.dtype)
            pair.fill(0)
            source = pointer + (expert * self.n + column)
            if const_expr(self.has_n_tail):
                if column < self.n:
                    cute.autovec_copy(vector(source, pointer.dtype, 2, GMEM), pair)
            else:
                cute.autovec_copy(vector(source, pointer.dtype, 2, GMEM), pair)
            values[2 * block] = pair[0]
            values[2 * block + 1] = pair[1]
