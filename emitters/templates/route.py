"""The routing kernels: sort (token, choice) pairs by expert."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, range_constexpr
from cutlass.memory import SmemAllocator

from emitters.device.dependent import launch_next, wait_for_previous
from emitters.device.memory import VECTOR
from emitters.spec.layer_steps import RouteLogitsProblem, RouteProblem, StepConfig
from emitters.templates.parameters import integer, pointer, several
from emitters.templates.router import Routing, TopkRouter, routing_argument

_BATCH = 8  # loads in flight per thread
_EXPERT_BITS = 10  # a pair packs its rank (high bits) and its expert (low bits)
_ALL, _COUNT, _ASSIGN = range(3)  # values of `phase`


class Pairs(NamedTuple):
    """The pairs to sort.

    ids [pairs]: `choices` per token. expert_map [num_ids]: may be null, then ids are the experts
    and num_ids is num_experts.
    """

    ids: cute.Pointer
    expert_map: cute.Pointer
    num_ids: Int32
    pairs: Int32
    choices: Int32


class Table(NamedTuple):
    """The routing table that is written."""

    index: cute.Pointer
    offsets: cute.Pointer
    inverse: cute.Pointer


class Limits(NamedTuple):
    """The bounds of a routing table.

    capacity: the most rows of an expert. max_rows: the most rows of all experts together; later
    pairs are dropped. overflow: null, or where the number of rows dropped for max_rows is written.
    """

    capacity: Int32
    max_rows: Int32
    overflow: cute.Pointer


def limits_argument():
    return several(
        integer("capacity"), integer("max_rows"), pointer("overflow", Int32, 4), kind=Limits
    )


def table_argument():
    return several(
        pointer("index", Int32, 4),
        pointer("offsets", Int32, 4),
        pointer("inverse", Int32, 4),
        kind=Table,
    )


class Route:
    """Writes the kernel of `route`: a counting sort of pairs by expert, stable and deterministic.

    A CTA has a run of neighbouring pairs, and each of its warps a run of these.

      count    ranks each pair among its warp's pairs of the same expert (`inverse` keeps the rank
               until the end), and makes a histogram per warp
      assign   adds the pairs of all experts, CTAs and warps before: the pair's row

    One CTA does both in one launch (phase 0). Several CTAs take two: `count` (phase 1), then
    `assign` (phase 2); in between, ranks and histograms are in global memory.
    """

    cluster = 1

    def __init__(self, problem: RouteProblem, config: StepConfig):
        self.experts = problem.num_experts
        self.id_type = Int64 if problem.id_bits == 64 else Int32
        self.threads, self.warps = config.threads, config.threads // 32
        self.words = (self.warps + 3) * self.experts + self.warps
        self.smem_bytes = 4 * self.words

    def arguments(self):
        """The arguments of `__call__`, except grid and stream."""
        return (
            several(
                pointer("ids", self.id_type, self.id_type.width // 8),
                pointer("expert_map", Int32, 4),
                integer("num_ids"),
                integer("pairs"),
                integer("choices"),
                kind=Pairs,
            ),
            limits_argument(),
            table_argument(),
            pointer("histograms", Int32, 4),
            integer("phase"),
        )

    def tensor_maps(self):
        return ()

    @cute.jit
    def __call__(self, pairs, limits, table, histograms, phase, grid, stream):
        """Launches the kernel.

        histograms [grid, num_experts]: what the second
        launch of two takes from the first. phase: 0, all of it, by one CTA; 1, `count`; 2,
        `assign`, by as many CTAs as that."""
        self.kernel(pairs, limits, table, histograms, phase).launch(
            grid=[grid, 1, 1], block=[self.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self, pairs: Pairs, limits: Limits, table: Table, histograms: cute.Pointer, phase: Int32
    ):
        self.attach(pairs.pairs)
        wait_for_previous()
        launch_next()
        self.sort(pairs, limits, table, histograms, phase)

    @cute.jit
    def sort(
        self, pairs: Pairs, limits: Limits, table: Table, histograms: cute.Pointer, phase: Int32
    ):
        """Sorts the pairs; `attach` must have been called."""
        ids, expert_map, num_ids, _, choices = pairs
        index, offsets, inverse = table
        cute.arch.sync_threads()
        vector = cute.make_layout(VECTOR)
        inverse = cute.make_tensor(inverse, vector)
        if phase != _ASSIGN:
            self.count(ids, expert_map, num_ids, inverse)
            cute.arch.sync_threads()
            self.sum_warps()
            if phase == _COUNT:
                self.leave(histograms, inverse)
        else:
            self.gather(histograms)
        if phase != _COUNT:
            cute.arch.sync_threads()
            used = self.sum_experts(limits, cute.make_tensor(offsets, vector))
            cute.arch.sync_threads()
            self.assign(choices, cute.make_tensor(index, vector), inverse, used, limits.max_rows)

    def attach(self, pairs: Int32):
        """Allocates the tables in shared memory and clears them; a barrier must follow."""
        table = SmemAllocator().allocate_array(Int32, self.words)
        experts = cute.make_layout(self.experts)
        words = cute.make_layout(self.words)
        self.table = cute.make_tensor(table, words)
        by_warp = cute.make_layout((self.warps, self.experts), stride=(self.experts, 1))
        self.before = cute.make_tensor(table, by_warp)  # histograms, then sums over earlier warps
        table += self.warps * self.experts
        self.totals = cute.make_tensor(table, experts)
        self.first = cute.make_tensor(table + self.experts, experts)  # this CTA's first row
        self.end = cute.make_tensor(table + 2 * self.experts, experts)
        self.sums = cute.make_tensor(table + 3 * self.experts, cute.make_layout(self.warps))
        self.thread, _, _ = cute.arch.thread_idx()
        self.block, _, _ = cute.arch.block_idx()
        self.blocks, _, _ = cute.arch.grid_dim()
        self.warp, self.lane = cute.arch.make_warp_uniform(self.thread // 32), self.thread % 32
        self.pairs = pairs
        together = self.threads * self.blocks
        self.rounds = (pairs + together - 1) // together
        self.first_pair = (self.block * self.warps + self.warp) * self.rounds * 32 + self.lane
        self.clear()

    @cute.jit
    def clear(self):
        table = self.table
        for i in cutlass.range(self.thread, self.words, self.threads):
            table[i] = Int32(0)

    @cute.jit
    def count(self, ids: cute.Pointer, expert_map: cute.Pointer, num_ids: Int32, inverse):
        ids = cute.make_tensor(ids, cute.make_layout(VECTOR))
        local = cute.make_tensor(expert_map, cute.make_layout(VECTOR))
        before, warp = self.before, self.warp
        for start in cutlass.range(0, self.rounds, _BATCH, unroll=1):
            experts = cute.make_rmem_tensor((_BATCH,), Int32)
            for i in range_constexpr(_BATCH):
                experts[i] = Int32(-1)
                pair = self.first_pair + (start + i) * 32
                if start + i < self.rounds and pair < self.pairs:
                    given = ids[pair]
                    if given >= 0 and given < num_ids:
                        experts[i] = Int32(given)
            if expert_map.toint() != 0:
                for i in range_constexpr(_BATCH):
                    if experts[i] >= 0:
                        experts[i] = local[experts[i]]
                        if experts[i] >= self.experts:
                            experts[i] = Int32(-1)
            for i in range_constexpr(_BATCH):
                if start + i < self.rounds:
                    expert = experts[i]
                    same = self.same(expert)
                    rank = Int32(cute.arch.popc(same & cute.arch.lanemask_lt()))
                    seen = Int32(0)
                    if expert >= 0:
                        seen = before[warp, expert]
                    cute.arch.sync_warp()
                    if expert >= 0 and rank == 0:
                        before[warp, expert] = seen + Int32(cute.arch.popc(same))
                    cute.arch.sync_warp()
                    pair = self.first_pair + (start + i) * 32
                    if pair < self.pairs:
                        packed = (seen + rank) << _EXPERT_BITS | expert
                        if expert < 0:
                            packed = Int32(-1)
                        inverse[pair] = packed

    @cute.jit
    def same(self, expert: Int32) -> Uint32:
        """A mask of the lanes with this lane's expert, for an expert that is not negative.

        On an H200, match.any takes 2.5 times as long for 128 experts.
        """
        found = Uint32(cute.arch.vote_ballot_sync(expert >= 0))
        for bit in range_constexpr((self.experts - 1).bit_length()):
            mine = (expert >> bit & 1) == 1
            votes = Uint32(cute.arch.vote_ballot_sync(mine))
            if not mine:
                votes = votes ^ Uint32(0xFFFFFFFF)
            found = found & votes
        return found

    @cute.jit
    def sum_warps(self):
        """Turns the warps' histograms into sums over earlier warps; a thread per expert."""
        before, totals, expert = self.before, self.totals, self.thread
        if expert < self.experts:
            total = Int32(0)
            for part in range_constexpr(0, self.warps, 8):
                counts = [before[part + i, expert] for i in range(min(8, self.warps - part))]
                for i in range_constexpr(len(counts)):
                    before[part + i, expert] = total
                    total += counts[i]
            totals[expert] = total

    @cute.jit
    def leave(self, histograms: cute.Pointer, inverse: cute.Tensor):
        """Leaves ranks among the CTA's pairs, and its histogram, for the second launch."""
        histograms = cute.make_tensor(histograms, cute.make_layout(VECTOR))
        if self.thread < self.experts:
            histograms[self.block * self.experts + self.thread] = self.totals[self.thread]
        cute.arch.sync_threads()
        for step in cutlass.range(self.rounds, unroll=1):
            pair = self.first_pair + step * 32
            if pair < self.pairs:
                packed = inverse[pair]
                if packed >= 0:
                    before = self.before[self.warp, packed & ((1 << _EXPERT_BITS) - 1)]
                    inverse[pair] = packed + (before << _EXPERT_BITS)

    @cute.jit
    def gather(self, histograms: cute.Pointer):
        """Sums the histograms of all CTAs, and those of the CTAs before this one."""
        histograms = cute.make_tensor(histograms, cute.make_layout(VECTOR))
        for block in cutlass.range(self.warp, self.blocks, self.warps, unroll=1):
            for expert in cutlass.range(self.lane, self.experts, 32, unroll=4):
                count = histograms[block * self.experts + expert]
                cute.arch.atomic_add(
                    self.totals.iterator + expert, count, sem="relaxed", scope="cta"
                )
                if block < self.block:
                    cute.arch.atomic_add(
                        self.first.iterator + expert, count, sem="relaxed", scope="cta"
                    )

    @cute.jit
    def sum_experts(self, limits: Limits, offsets: cute.Tensor) -> Int32:
        """Computes the first row and end of each expert; returns the number of rows in all."""
        first, ends, sums = self.first, self.end, self.sums
        expert, kept = self.thread, Int32(0)
        if expert < self.experts:
            kept = cutlass.min(self.totals[expert], limits.capacity)
        end = kept
        for step in range_constexpr(5):
            below = cute.arch.shuffle_sync_up(end, 1 << step)
            if self.lane >= (1 << step):
                end += below
        if self.lane == 31:
            sums[self.warp] = end
        cute.arch.sync_threads()
        of_warp = sums[cutlass.min(self.lane, self.warps - 1)]
        if self.lane >= self.warps:
            of_warp = Int32(0)
        used = cute.arch.warp_redux_sync(of_warp, "add")
        if self.lane >= self.warp:
            of_warp = Int32(0)
        end += cute.arch.warp_redux_sync(of_warp, "add")
        if expert < self.experts:
            first[expert] = first[expert] + end - kept
            end = cutlass.min(end, limits.max_rows)
            ends[expert] = end
            if self.block == 0:
                offsets[expert] = end
        kept_rows = cutlass.min(used, limits.max_rows)
        if limits.overflow.toint() != 0 and self.block == 0 and self.thread == 0:
            cute.make_tensor(limits.overflow, cute.make_layout(1))[0] = used - kept_rows
        return kept_rows

    @cute.jit
    def assign(
        self,
        choices: Int32,
        index: cute.Tensor,
        inverse: cute.Tensor,
        used: Int32,
        max_rows: Int32,
    ):
        for start in cutlass.range(0, self.rounds, _BATCH, unroll=1):
            packed = cute.make_rmem_tensor((_BATCH,), Int32)
            for i in range_constexpr(_BATCH):
                pair = self.first_pair + (start + i) * 32
                packed[i] = Int32(-1)
                if start + i < self.rounds and pair < self.pairs:
                    packed[i] = inverse[pair]
            for i in range_constexpr(_BATCH):
                pair = self.first_pair + (start + i) * 32
                if packed[i] >= 0:
                    expert = packed[i] & ((1 << _EXPERT_BITS) - 1)
                    row = self.first[expert] + self.before[self.warp, expert]
                    row += packed[i] >> _EXPERT_BITS
                    if row < self.end[expert]:
                        index[row] = pair // choices
                    else:
                        row = Int32(-1)
                    inverse[pair] = row
        together = self.threads * self.blocks
        rows = cutlass.min(self.pairs, max_rows)
        for i in cutlass.range((rows - used + together - 1) // together, unroll=1):
            row = used + i * together + self.block * self.threads + self.thread
            if row < rows:
                index[row] = Int32(-1)


class RouteLogits:
    """Writes the kernel of `route_logits` for a few tokens: one CTA in one launch.

    Its warps first choose experts as `TopkRouter` does, then all sort pairs as `Route` does.
    """

    cluster = 1

    def __init__(self, problem: RouteLogitsProblem, config: StepConfig):
        self.problem, self.threads = problem, config.threads
        self.router = TopkRouter(problem, config)
        self.route = Route(RouteProblem(problem.num_experts, 32), config)
        self.smem_bytes = self.route.smem_bytes

    def arguments(self):
        """The arguments of `__call__`, except grid and stream."""
        return (
            routing_argument(self.problem),
            limits_argument(),
            table_argument(),
        )

    def tensor_maps(self):
        return ()

    @cute.jit
    def __call__(self, routing, limits, table, grid, stream):
        """grid: 1."""
        self.kernel(routing, limits, table).launch(
            grid=[grid, 1, 1], block=[self.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, routing: Routing, limits: Limits, table: Table):
        route, tokens, k = self.route, routing.num_tokens, routing.k
        route.attach(tokens * k)
        wait_for_previous()
        launch_next()
        for i in cutlass.range((tokens + route.warps - 1) // route.warps, unroll=1):
            token = i * route.warps + route.warp
            if token < tokens:
                self.router.route_token(token, routing)
        nothing = cute.make_ptr(Int32, Int64(0), cute.AddressSpace.gmem, assumed_align=4)
        pairs = Pairs(routing.ids, nothing, Int32(self.problem.num_experts), tokens * k, k)
        route.sort(pairs, limits, table, nothing, Int32(_ALL))
