"""From a tile's number to its place, on the device: the host never learns an expert's rows."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr, range_constexpr

from emitters.config import GemmSm90Config
from emitters.problem import GemmProblem

VECTOR = 1 << 30  # extent given to arrays whose length only the host knows


class TileScheduler:
    """Numbers the output tiles of all experts and finds tile t again without a search loop.

    `build` (one warp, once) turns starts and ends into a table in shared memory: for every expert
    its first tile row, first row and end. `locate` (any warp, any tile, no state) finds a tile's
    expert by two ballots over that table, so it serves static and dynamic schedules alike. Experts
    without rows own no tile number.
    """

    def __init__(self, problem: GemmProblem, config: GemmSm90Config):
        self.experts = problem.num_experts
        self.entries = config.table_entries(problem)
        self.per_lane = self.entries // 32
        self.tile_m, self.tile_n = config.tile_m, config.tile_n
        self.n_tiles = config.n_tiles(problem)
        self.group_m = config.group_m

    def attach(self, table: cute.Pointer):
        """table: shared memory, `table_words` int32."""
        layout = cute.make_layout(self.entries)
        self.first = cute.make_tensor(table, layout)  # tile rows of all experts before this one
        self.start = cute.make_tensor(table + self.entries, layout)
        self.end = cute.make_tensor(table + 2 * self.entries, layout)
        self.total = cute.make_tensor(table + 3 * self.entries, cute.make_layout(1))

    @cute.jit
    def build(self, starts: cute.Pointer, ends: cute.Pointer, num_rows: Int32):
        """Run by one warp. starts is null where every expert starts at the previous one's end.

        Values that contradict num_rows (rows of the output) are clamped: nothing outside is ever
        touched.
        """
        lane = cute.arch.lane_idx()
        given_starts = cute.make_tensor(starts, cute.make_layout(VECTOR))
        given_ends = cute.make_tensor(ends, cute.make_layout(VECTOR))
        before = cute.make_rmem_tensor((self.per_lane,), Int32)
        first_row = cute.make_rmem_tensor((self.per_lane,), Int32)
        end_row = cute.make_rmem_tensor((self.per_lane,), Int32)
        # all loads before the first use of one
        for i in range_constexpr(self.per_lane):
            end_row[i] = given_ends[cutlass.min(lane * self.per_lane + i, self.experts - 1)]
        if starts.toint() != 0:
            for i in range_constexpr(self.per_lane):
                expert = cutlass.min(lane * self.per_lane + i, self.experts - 1)
                first_row[i] = given_starts[expert]
        else:
            for i in range_constexpr(1, self.per_lane):
                first_row[i] = end_row[i - 1]
            first_row[0] = cute.arch.shuffle_sync_up(end_row[self.per_lane - 1], 1)
            if lane == 0:
                first_row[0] = Int32(0)
        total = Int32(0)
        for i in range_constexpr(self.per_lane):
            expert = lane * self.per_lane + i
            start = first_row[i]
            end = end_row[i]
            if expert >= self.experts:
                end = start
            start = cutlass.min(cutlass.max(start, Int32(0)), num_rows)
            end = cutlass.min(cutlass.max(end, start), num_rows)
            self.start[expert] = start
            self.end[expert] = end
            before[i] = total
            total += (end - start + (self.tile_m - 1)) // self.tile_m
        scan = total
        for step in range_constexpr(5):
            below = cute.arch.shuffle_sync_up(scan, 1 << step)
            if lane >= (1 << step):
                scan += below
        for i in range_constexpr(self.per_lane):
            self.first[lane * self.per_lane + i] = scan - total + before[i]
        tiles = self.total
        if lane == 31:
            tiles[0] = scan * self.n_tiles

    @cute.jit
    def locate(self, tile: Int32):
        """-> expert, first row, rows from there to the expert's end, first column.

        Called by whole warps. Past the last tile the number of rows is not positive.
        """
        lane = cute.arch.lane_idx()
        tile_row = tile // self.n_tiles
        expert = (
            cute.arch.popc(cute.arch.vote_ballot_sync(self.first[lane * self.per_lane] <= tile_row))
            - 1
        )
        if const_expr(self.per_lane > 1):
            expert = expert * self.per_lane
            inside = self.first[expert + cutlass.min(lane, self.per_lane - 1)] <= tile_row
            found = cute.arch.popc(cute.arch.vote_ballot_sync(inside and lane < self.per_lane))
            expert = expert + found - 1
        start = self.start[expert]
        rows = self.end[expert] - start
        tile_in_expert = tile - self.first[expert] * self.n_tiles
        # groups of group_m M tiles; inside one M runs first, so that they share an N tile's weights
        group = tile_in_expert // (self.group_m * self.n_tiles)
        first_m = group * self.group_m
        tile_in_group = tile_in_expert - first_m * self.n_tiles
        if const_expr(self.group_m == 1):
            m, n = first_m, tile_in_group
        else:
            m_tiles = (rows + (self.tile_m - 1)) // self.tile_m
            size = cutlass.max(cutlass.min(m_tiles - first_m, Int32(self.group_m)), Int32(1))
            n = tile_in_group // size
            m = first_m + tile_in_group - n * size
        return expert, start + m * self.tile_m, rows - m * self.tile_m, n * self.tile_n
