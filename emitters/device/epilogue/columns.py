"""The fragment of the template for few rows: columns of the product are WGMMA's M."""

from __future__ import annotations

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr, range_constexpr

from emitters.device.memory import VECTOR
from emitters.spec.config_swap_sm90 import GemmSwapSm90Config
from emitters.spec.gemm import GemmProblem, Major


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
        self.warp, self.lane = warp, lane
        self.gated, self.alternating = problem.gated, problem.alternating
        n_major = problem.weight.major is Major.N
        self.by_blocks = problem.gated and n_major and not problem.alternating  # gate and up
        self.m_blocks = -(-config.tile_n // (64 * config.column_groups))  # of 64: WGMMA's M
        self.block_columns = (1 if self.by_blocks else 4) * config.warp_columns(problem)
        self.warp_column = warp * (16 if self.by_blocks else config.warp_columns(problem))
        self.tile_m, self.m_registers = config.tile_m, config.tile_m // 2
        self.strides = strides
        self.part_rows = config.part_rows
        self.part_blocks = config.part_rows // 8
        self.parts = config.parts
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

    def read_scales(self, x: cute.Tensor, weights: cute.Tensor, columns: int) -> list:
        of_rows = [
            x[8 * block + self.lane % 4 * 2 + c]
            for block in range(self.tile_m // 8)
            for c in range(2)
        ]
        groups = self.m_blocks * self.block_columns // columns  # of gates or ups
        firsts = [m * self.block_columns + self.warp_column for m in range(self.m_blocks)]
        return of_rows + [
            weights[up * groups + first // columns]
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
