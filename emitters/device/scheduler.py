"""From a tile's number to its place, on the device: the host never learns an expert's rows."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr, range_constexpr

from emitters.device.memory import VECTOR
from emitters.spec.config_sm90 import SLOT_WORDS, SLOTS, GemmSm90Config, Schedule
from emitters.spec.gemm import GemmProblem


class TileScheduler:
    """Numbers the work of all experts and finds unit u again without a search loop.

    A unit is what a cluster does at once: an output tile, or where cluster_m is 2 a pair of them.
    Pairs are two M tiles of one expert and one N tile, whose weights they share. An odd last M tile
    is not padded: its pairs are two N tiles and share nothing.

    One warp keeps the books. `start` turns starts and ends into a table in shared memory, for every
    expert its first unit, first row and end, in which two ballots find a unit's expert; experts
    without rows own no unit. `post` puts the place of the CTA's j-th unit into slot j % SLOTS,
    where all warps `read` it. It is posted before the last stage of unit j - 2 is filled, and at
    most MAX_STAGES + 3 units ahead of a reader: slots outnumber them.
    """

    def __init__(self, problem: GemmProblem, config: GemmSm90Config):
        self.experts = problem.num_experts
        self.entries = config.table_entries(problem)
        self.per_lane = self.entries // 32
        self.tile_m, self.tile_n = config.tile_m, config.tile_n
        self.n_tiles = config.n_tiles(problem)
        self.cluster_m = config.cluster_m
        self.schedule = config.schedule
        self.group = config.group_m // config.cluster_m  # units that share weights in L2

    def attach(self, table: cute.Pointer, counters: cute.Pointer | None):
        """table: shared memory, `table_words` int32. counters: of a dynamic schedule, two int32 in
        global memory, zero before and after each launch: units taken, CTAs done."""
        layout = cute.make_layout(self.entries)
        self.first = cute.make_tensor(table, layout)  # units of all experts before this one
        self.row = cute.make_tensor(table + self.entries, layout)
        self.end = cute.make_tensor(table + 2 * self.entries, layout)
        slots = cute.make_layout((SLOTS, SLOT_WORDS), stride=(SLOT_WORDS, 1))
        self.slots = cute.make_tensor(table + 3 * self.entries, slots)
        self.counters = counters
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        self.cluster, self.clusters = block // self.cluster_m, grid // self.cluster_m
        self.rank = block % self.cluster_m
        self.next = cute.make_rmem_tensor((1,), Int32)  # the unit to post next
        self.stop = cute.make_rmem_tensor((1,), Int32)  # one past the last unit of this cluster

    @cute.jit
    def start(self, starts: cute.Pointer, ends: cute.Pointer, num_rows: Int32):
        """Builds the table and posts the first two units.

        starts is null where every expert starts at the previous one's end. Values that contradict
        num_rows (rows of the output) are clamped: nothing outside is ever touched.
        """
        units = self.build(starts, ends, num_rows)
        cute.arch.sync_warp()
        first, step, stop = self.cluster, self.clusters, units
        if const_expr(self.schedule is Schedule.STATIC):
            share, rest = units // self.clusters, units % self.clusters
            first = self.cluster * share + cutlass.min(self.cluster, rest)
            stop = (self.cluster + 1) * share + cutlass.min(self.cluster + 1, rest)
            step = Int32(1)
        self.stop[0] = stop
        self.write(Int32(0), first)
        self.write(Int32(1), first + step)
        if const_expr(self.schedule is Schedule.DYNAMIC):
            self.claim()
        else:
            self.next[0] = first + 2 * step

    @cute.jit
    def post(self, j: Int32):
        """Takes the CTA's j-th unit, j = 2, 3, 4, ..."""
        unit = self.next[0]
        if const_expr(self.schedule is Schedule.DYNAMIC):
            unit = cute.arch.shuffle_sync(unit, 0) + 2 * self.clusters
            self.claim()
        elif const_expr(self.schedule is Schedule.STATIC):
            self.next[0] = unit + 1
        else:
            self.next[0] = unit + self.clusters
        self.write(j, unit)

    @cute.jit
    def claim(self):
        """Asks for another unit; the answer is awaited when it is posted."""
        next_ = self.next
        if cute.arch.lane_idx() == 0:
            next_[0] = cute.arch.atomic_add(self.counters, Int32(1), sem="relaxed", scope="gpu")

    @cute.jit
    def finish(self, warp: Int32):
        """After the last unit of a dynamic schedule: the grid's last CTA leaves zeros."""
        if warp == 1 and cute.arch.lane_idx() == 0:
            counters = cute.make_tensor(self.counters, cute.make_layout(2))
            done = cute.arch.atomic_add(self.counters + 1, Int32(1), sem="acq_rel", scope="gpu")
            if done == self.clusters - 1:
                counters[0] = Int32(0)
                counters[1] = Int32(0)

    @cute.jit
    def write(self, j: Int32, unit: Int32):
        place = self.locate(unit)
        slots = self.slots
        if cute.arch.lane_idx() == 0:
            for word in range_constexpr(len(place)):
                slots[j % SLOTS, word] = place[word]

    def read(self, j: Int32):
        """-> expert, first row, rows from there to the expert's end, first column, shared.

        Of the tile that this CTA computes of its j-th unit; expert is -1 after the last unit. rows
        is not positive where a pair lacks a tile. shared: the pair has the same weights.
        """
        return tuple(self.slots[j % SLOTS, word] for word in range(5))

    @cute.jit
    def build(self, starts: cute.Pointer, ends: cute.Pointer, num_rows: Int32):
        """-> number of units"""
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
            self.row[expert] = start
            self.end[expert] = end
            before[i] = total
            m_tiles = self.m_tiles(end - start)
            total += m_tiles // self.cluster_m * self.n_tiles
            if const_expr(self.cluster_m == 2):
                total += m_tiles % 2 * ((self.n_tiles + 1) // 2)
        scan = total
        for step in range_constexpr(5):
            below = cute.arch.shuffle_sync_up(scan, 1 << step)
            if lane >= (1 << step):
                scan += below
        for i in range_constexpr(self.per_lane):
            self.first[lane * self.per_lane + i] = scan - total + before[i]
        return cute.arch.shuffle_sync(scan, 31)

    def m_tiles(self, rows: Int32) -> Int32:
        return (rows + (self.tile_m - 1)) // self.tile_m

    @cute.jit
    def locate(self, unit: Int32):
        """What `read` returns, of any unit; called by a whole warp."""
        lane = cute.arch.lane_idx()
        first = self.first
        expert = cute.arch.popc(cute.arch.vote_ballot_sync(first[lane * self.per_lane] <= unit)) - 1
        if const_expr(self.per_lane > 1):
            expert = expert * self.per_lane
            inside = first[expert + cutlass.min(lane, self.per_lane - 1)] <= unit
            found = cute.arch.popc(cute.arch.vote_ballot_sync(inside and lane < self.per_lane))
            expert = expert + found - 1
        start = self.row[expert]
        rows = self.end[expert] - start
        past = unit >= self.stop[0]
        unit = unit - first[expert]
        full = self.m_tiles(rows) // self.cluster_m  # whole units along M
        # groups of units along M; inside one M runs first, so that they share an N tile's weights
        group = unit // (self.group * self.n_tiles)
        first_m = group * self.group
        unit_in_group = unit - first_m * self.n_tiles
        size = cutlass.max(cutlass.min(full - first_m, Int32(self.group)), Int32(1))
        n = unit_in_group // size
        m = (first_m + unit_in_group - n * size) * self.cluster_m + self.rank
        shared = Int32(1)
        if const_expr(self.cluster_m == 2):
            unpaired = unit - full * self.n_tiles
            if unpaired >= 0:
                shared = Int32(0)
                m = full * 2
                n = unpaired * 2 + self.rank
                if n >= self.n_tiles:
                    rows = Int32(0)
        if past:
            expert = Int32(-1)
        return expert, start + m * self.tile_m, rows - m * self.tile_m, n * self.tile_n, shared
