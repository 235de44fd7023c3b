"""The mapping between a consumer thread's accumulators and the rows and columns of a tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr, range_constexpr

from emitters.device.memory import GMEM, VECTOR, vector
from emitters.spec.config_sm90 import SLICE_BYTES, GemmSm90Config
from emitters.spec.config_swap_sm90 import GemmSwapSm90Config
from emitters.spec.gemm import N_MAJOR_BLOCK, GemmProblem, Major

_FEW_SUMS = 128  # columns of 64 rows each, up to which a thread has registers to spare


class Fragment(Protocol):
    """The interface through which the epilogue's nodes and stores see a thread's accumulators.

    accumulators   m_blocks blocks, of 64 rows (of 64 columns if WGMMA's M is columns)
    block          parts equal parts
    part           part_registers registers; nodes and stores see one part at a time
    """

    m_blocks: int
    parts: int
    part_registers: int
    token_count: int  # rows per thread, for which it reads tokens
    channel_count: int  # columns per thread and tile
    part_channels: int  # columns per thread and part
    few_registers: bool  # whether a value per column of the tile is too much beside the sums
    out_columns: int  # columns of the output
    has_n_tail: bool  # whether the last tile has columns past N

    def register(self, i: int) -> int:
        """The accumulator at position i in the order in which gate and up blocks alternate."""

    def token_row(self, i: int):
        """The row of the tile for which the thread reads its i-th token."""

    def by_row(self, values: cute.Tensor, m: int, part: int) -> list:
        """Spreads values[token_count] over a part: for each register, the value of its row."""

    def by_channel(self, values: cute.Tensor, m: int, part: int) -> list:
        """Spreads values[channel_count] over a part: for each register, the value of its column."""

    def read_scales(self, words: cute.Tensor, columns: int) -> list:
        """Reads what the thread needs of a box of `BlockScales`: of its rows, then of its columns.

        words: the box's float32. columns: of the output, that share a scale of the weights.
        """

    def factors(self, scales: list, columns: int) -> Callable[[int], Float32]:
        """The factor of each register of two-level sums, from what `read_scales` read."""

    def gates_and_ups(self, values: cute.Tensor) -> list[tuple[Float32, Float32]]:
        """The gate and up values of each output that the thread computes, of a part's values."""

    def in_order(self, results: cute.Tensor):
        """The outputs that the thread stores, of those that the lanes computed."""

    def read_channels(
        self, pointer: cute.Pointer, values: cute.Tensor, first: int, expert: Int32, column: Int32
    ):
        """Reads the values [E, N] of the thread's columns, from its `first` on, into `values`.

        column: the tile's first output column. Nothing is read past N.
        """


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

    def read_scales(self, words: cute.Tensor, columns: int) -> list:
        of_rows = [words[self.token_row(i)] for i in range(self.token_count)]
        return of_rows + [words[self.tile_m + i] for i in range(8 * self.blocks // columns)]

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


class ColumnsFragment:
    """The fragment of `GemmSwapSm90`: columns of the product (rows of weight) are WGMMA's M.

    WGMMA gives a thread two columns of 64, 8 apart, and two neighbours of every 8 rows:

      register   4 * block + 2 * half + c, within a part of `part_rows` rows
      row        8 * block + lane % 4 * 2 + c, within the part
      column     8 * half + lane / 4, within the warp's 16

    In a gated problem the halves are gate and up of the warp's 8 outputs. With N-major weights the
    first 64 columns are gates and the next 64 ups; `register` puts them in the order of halves. In
    an alternating problem lanes 4 apart have gate and up of an output of each half. Consumers
    follow each other, with 64 columns each where there are several.

    Each row's values are read by one lane and passed on by shuffles.
    """

    def __init__(
        self, problem: GemmProblem, config: GemmSwapSm90Config, strides, warp: Int32, lane: Int32
    ):
        """Computes what a thread's registers stand for. strides: as in `RowsFragment`."""
        self.lane = lane
        self.gated, self.alternating = problem.gated, problem.alternating
        n_major = problem.weight.major is Major.N
        self.by_blocks = problem.gated and n_major and not problem.alternating  # gate and up
        self.m_blocks = config.tile_n // (64 * config.consumers)  # WGMMA's M is 64 columns
        self.block_columns = (1 if self.by_blocks else 4) * config.warp_columns(problem)
        self.warp_column = warp * (16 if self.by_blocks else config.warp_columns(problem))
        self.tile_m, self.m_registers = config.tile_m, config.tile_m // 2
        self.strides = strides
        self.part_rows = config.part_rows
        self.part_blocks = config.part_rows // 8
        self.parts = config.tile_m // config.part_rows
        self.part_registers = 4 * self.part_blocks
        self.n, self.out_columns = problem.n, problem.out_columns
        self.has_n_tail = problem.n % config.tile_n != 0
        self.token_count = -(-config.tile_m // 32)
        self.channel_count = self.part_channels = 2 * self.m_blocks
        self.few_registers = False

    def register(self, i: int) -> int:
        if not self.by_blocks:
            return i
        m, rest = divmod(i, self.m_registers)
        half = rest // 2 % 2
        return half * self.m_registers + rest + 2 * (m - half)

    def token_row(self, i: int):
        return self.lane + 32 * i

    def by_row(self, values: cute.Tensor, m: int, part: int):
        first = part * self.part_rows
        found = {}
        for block in range(self.part_blocks):
            row = first + 8 * block
            for c in range(2):
                found[block, c] = cute.arch.shuffle_sync(
                    values[row // 32], row % 32 + c + self.lane % 4 * 2
                )
        return [found[i // 4, i % 2] for i in range(4 * self.part_blocks)]

    def by_channel(self, values: cute.Tensor, m: int, part: int):
        return [values[2 * m + i // 2 % 2] for i in range(4 * self.part_blocks)]

    def read_scales(self, words: cute.Tensor, columns: int) -> list:
        of_rows = [
            words[8 * block + self.lane % 4 * 2 + c]
            for block in range(self.tile_m // 8)
            for c in range(2)
        ]
        groups = self.m_blocks * self.block_columns // columns  # of gates or ups
        firsts = [m * self.block_columns + self.warp_column for m in range(self.m_blocks)]
        return of_rows + [
            words[self.tile_m + up * groups + first // columns]
            for up in range(2 if self.gated else 1)
            for first in firsts
        ]

    def factors(self, scales: list, columns: int) -> Callable[[int], Float32]:
        products: dict[tuple[int, int], Float32] = {}

        def factor(register: int) -> Float32:
            m, rest = divmod(register, self.m_registers)
            up = rest // 2 % 2 if self.gated else 0
            pair = rest // 4 * 2 + rest % 2, self.tile_m // 4 + up * self.m_blocks + m
            if pair not in products:
                products[pair] = scales[pair[0]] * scales[pair[1]]
            return products[pair]

        return factor

    def gates_and_ups(self, values: cute.Tensor) -> list[tuple[Float32, Float32]]:
        pairs = []
        for first in range(0, cute.size(values), 4):
            for i in range(first, first + 2):
                gate, up = values[i], values[i + 2]
                if self.alternating:
                    has_up = self.lane // 4 % 2 != 0  # else a gate; it keeps that half's output
                    other = cute.arch.shuffle_sync_bfly(cutlass.select_(has_up, gate, up), 4)
                    gate, up = (
                        cutlass.select_(has_up, other, gate),
                        cutlass.select_(has_up, up, other),
                    )
                pairs.append((gate, up))
        return pairs

    def in_order(self, results: cute.Tensor):
        if not self.alternating:
            return results
        # of a warp's 8 outputs, lanes with a gate have the first four, the others the last four
        column = self.lane // 4
        source = (column % 4 * 2 + column // 4) * 4 + self.lane % 4
        ordered = cute.make_rmem_tensor((cute.size(results),), Float32)
        for i in range(cute.size(results)):
            ordered[i] = cute.arch.shuffle_sync(results[i], source)
        return ordered

    @cute.jit
    def read_channels(
        self,
        pointer: cute.Pointer,
        values: cute.Tensor,
        first: cutlass.Constexpr,
        expert: Int32,
        first_column: Int32,
    ):
        table = cute.make_tensor(pointer, cute.make_layout(VECTOR))
        for i in range_constexpr(cute.size(values)):
            block, half = (first + i) // 2, (first + i) % 2
            block_column = first_column + self.block_columns * block + self.warp_column
            column = block_column + (0 if self.gated else 8 * half) + self.lane // 4
            at = column
            if const_expr(self.alternating):
                at = 2 * block_column + 8 * half + self.lane // 4
                column = at // 2
            elif const_expr(self.gated):
                at = column * self.strides[0] + half * self.strides[1]
            value = pointer.dtype(0)
            if const_expr(self.has_n_tail):
                if column < self.out_columns:
                    value = table[expert * self.n + at]
            else:
                value = table[expert * self.n + at]
            values[i] = value
