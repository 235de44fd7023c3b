"""The mapping between a consumer thread's accumulators and the rows and columns of a tile.

rows.py and columns.py have one implementation for each template.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import cutlass.cute as cute
from cutlass import Float32, Int32


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

    def read_scales(self, x: cute.Tensor, weights: cute.Tensor, columns: int) -> list:
        """Reads the scales that the thread needs: of its rows, then of its columns.

        x, weights: the scales of a tile, as `BlockScales.read` gives them. columns: of the output,
        that share a scale of the weights.
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
