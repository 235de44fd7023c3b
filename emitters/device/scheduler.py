"""The scheduler: numbers tiles on the device, since the host never learns the experts' rows."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr, range_constexpr

from emitters.device.memory import VECTOR
from emitters.device.parameters import Rows
from emitters.spec.config_sm90 import SLOT_WORDS, SLOTS, GemmSm90Config
from emitters.spec.gemm import GemmProblem
from emitters.spec.registry import GemmConfig
from emitters.spec.staged_sm90 import Schedule


class ExpertTable:
    """A table of the experts' units of work, in which two ballots of a warp find a unit.

    A unit is the work that a cluster does at a time: one output tile or, with cluster_m 2, a pair:

      pair of M tiles   two M tiles of an expert, same N tile: they share its weights
      pair of N tiles   only for an odd last M tile, two N tiles: they share nothing

    Units of all experts are numbered 0, 1, 2, ... For each expert the table, in shared memory,
    holds its first unit, first row and end. Experts without rows have no unit.
    """

    def __init__(self, problem: GemmProblem, config: GemmConfig, cluster_m: int, group_m: int):
        """Fixes the order of units. group_m: M tiles that use an N tile before the next N tile."""
        self.experts = problem.num_experts
        self.entries = config.table_entries(problem)
        self.per_lane = self.entries // 32
        self.tile_m, self.tile_n = config.tile_m, config.tile_n
        self.n_tiles = config.n_tiles(problem)
        self.cluster_m = cluster_m
        self.group = group_m // cluster_m  # units

    def attach(self, table: cute.Pointer):
        """Binds the table in shared memory: three int32 per entry."""
        layout = cute.make_layout(self.entries)
        self.first = cute.make_tensor(table, layout)  # the number of units of all experts before
        self.row = cute.make_tensor(table + self.entries, layout)
        self.end = cute.make_tensor(table + 2 * self.entries, layout)

    @cute.jit
    def build(self, rows: Rows):
        """Fills the table and returns the number of units; by a whole warp.

        Starts and ends outside [0, num_rows] are clamped, so that no row outside is ever touched.
        """
        starts, offsets, num_rows, _ = rows
        lane = cute.arch.lane_idx()
        given_starts = cute.make_tensor(starts, cute.make_layout(VECTOR))
        given_ends = cute.make_tensor(offsets, cute.make_layout(VECTOR))
        before = cute.make_rmem_tensor((self.per_lane,), Int32)
        first_row = cute.make_rmem_tensor((self.per_lane,), Int32)
        end_row = cute.make_rmem_tensor((self.per_lane,), Int32)
        # all loads are issued before the first result is used
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
    def locate(self, unit: Int32, stop: Int32, rank: Int32):
        """Finds the tile of a unit that CTA `rank` of a cluster computes; by a whole warp.

        Returns (expert, first row, rows from there to the expert's end, first column, shared).
        expert is -1 from unit `stop` on. rows is 0 or less if the pair has no tile for this CTA.
        shared is 1 if both tiles of the pair have the same weights.
        """
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
        past = unit >= stop
        unit = unit - first[expert]
        full = self.m_tiles(rows) // self.cluster_m  # whole units along M
        # units come in groups along M; inside a group M runs first, to share an N tile's weights
        group = unit // (self.group * self.n_tiles)
        first_m = group * self.group
        unit_in_group = unit - first_m * self.n_tiles
        size = cutlass.max(cutlass.min(full - first_m, Int32(self.group)), Int32(1))
        n = unit_in_group // size
        m = (first_m + unit_in_group - n * size) * self.cluster_m + rank
        shared = Int32(1)
        if const_expr(self.cluster_m == 2):
            unpaired = unit - full * self.n_tiles
            if unpaired >= 0:
                shared = Int32(0)
                m = full * 2
                n = unpaired * 2 + rank
                if n >= self.n_tiles:
                    rows = Int32(0)
        if past:
            expert = Int32(-1)
        return expert, start + m * self.tile_m, rows - m * self.tile_m, n * self.tile_n, shared


class PostedUnits:
    """The units that a CTA computes: one warp posts them, all others read them.

    `post` writes the tile of the CTA's j-th unit to slot j % SLOTS, where all warps `read` it. It
    is posted before the last stage of unit j - 2 is filled, and at most MAX_STAGES + 3 units ahead
    of any reader; there are more slots than that.
    """

    def __init__(self, problem: GemmProblem, config: GemmSm90Config):
        self.experts = ExpertTable(problem, config, config.cluster_m, config.group_m)
        self.cluster_m, self.schedule = config.cluster_m, config.schedule

    def attach(self, table: cute.Pointer, counters: cute.Pointer | None):
        """Binds the table in shared memory, `table_words` int32, and finds this CTA's place.

        counters: for a dynamic schedule, two int32 in global memory: units taken and CTAs done.
        Both are 0 before and after each launch.
        """
        self.experts.attach(table)
        slots = cute.make_layout((SLOTS, SLOT_WORDS), stride=(SLOT_WORDS, 1))
        self.slots = cute.make_tensor(table + 3 * self.experts.entries, slots)
        self.counters = counters
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        self.cluster, self.clusters = block // self.cluster_m, grid // self.cluster_m
        self.rank = block % self.cluster_m
        self.next = cute.make_rmem_tensor((1,), Int32)  # the unit to post next
        self.stop = cute.make_rmem_tensor((1,), Int32)  # one past the last unit of this cluster

    @cute.jit
    def start(self, rows: Rows):
        """Builds the table and posts the first two units."""
        units = self.experts.build(rows)
        cute.arch.sync_warp()
        first, stride, stop = self.cluster, self.clusters, units
        if const_expr(self.schedule is Schedule.STATIC):
            share, rest = units // self.clusters, units % self.clusters
            first = self.cluster * share + cutlass.min(self.cluster, rest)
            stop = (self.cluster + 1) * share + cutlass.min(self.cluster + 1, rest)
            stride = Int32(1)
        self.stop[0] = stop
        self.write(Int32(0), first)
        self.write(Int32(1), first + stride)
        if const_expr(self.schedule is Schedule.DYNAMIC):
            self.claim()
        else:
            self.next[0] = first + 2 * stride

    @cute.jit
    def post(self, j: Int32):
        """Posts the CTA's j-th unit, for j = 2, 3, 4, ..."""
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
        """Asks the counter for another unit; the answer is needed only when it is posted."""
        next_ = self.next
        if cute.arch.lane_idx() == 0:
            next_[0] = cute.arch.atomic_add(self.counters, Int32(1), sem="relaxed", scope="gpu")

    @cute.jit
    def finish(self, warp: Int32):
        """Called after the last unit of a dynamic schedule: the last CTA resets the counters."""
        if warp == 1 and cute.arch.lane_idx() == 0:
            counters = cute.make_tensor(self.counters, cute.make_layout(2))
            done = cute.arch.atomic_add(self.counters + 1, Int32(1), sem="acq_rel", scope="gpu")
            if done == self.clusters - 1:
                counters[0] = Int32(0)
                counters[1] = Int32(0)

    @cute.jit
    def write(self, j: Int32, unit: Int32):
        location = self.experts.locate(unit, self.stop[0], self.rank)
        slots = self.slots
        if cute.arch.lane_idx() == 0:
            for word in range_constexpr(len(location)):
                slots[j % SLOTS, word] = location[word]

    def read(self, j: Int32):
        """The tile of the CTA's j-th unit, as `ExpertTable.locate` returns it."""
        return tuple(self.slots[j % SLOTS, word] for word in range(5))
