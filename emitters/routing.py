"""Routing kernels: from each token's experts to rows sorted by expert, in one launch."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import Int32, Int64, const_expr, range_constexpr

from emitters.arguments import integer, pointer
from emitters.steps import RouteProblem, StepConfig
from emitters.tiles import VECTOR

_BATCH = 8  # loads of a thread in flight
_EXPERT_BITS = 10  # of a pair's packed rank and expert


class PairSorter:
    """A counting sort of pairs by expert: stable, and the same in every run.

    The warps of a cluster own runs of neighbouring pairs. `count` gives every pair its rank among
    its warp's pairs of the same expert, which `inverse` keeps for the thread, and each warp a
    histogram. Their sums over warps, CTAs and experts (`scan`) are the first rows of each warp's
    pairs of each expert, where `place` puts them.
    """

    def __init__(self, num_experts: int, id_bits: int, config: StepConfig):
        self.experts = num_experts
        self.id_type = Int64 if id_bits == 64 else Int32
        self.warps, self.cluster = config.threads // 32, config.cluster
        self.words = (self.warps + 3) * self.experts + self.warps

    def attach(self, pairs: Int32, table: cute.Pointer):
        """table: `words` int32 of shared memory."""
        experts = cute.make_layout(self.experts)
        histograms = cute.make_layout((self.warps, self.experts), stride=(self.experts, 1))
        self.before = cute.make_tensor(table, histograms)  # of the warps before, after `scan`
        table += self.warps * self.experts
        self.totals = cute.make_tensor(table, experts)  # of this CTA
        self.first = cute.make_tensor(table + self.experts, experts)  # row of this CTA's pairs
        self.end = cute.make_tensor(table + 2 * self.experts, experts)
        self.sums = cute.make_tensor(table + 3 * self.experts, cute.make_layout(self.warps))
        self.thread, _, _ = cute.arch.thread_idx()
        self.warp, self.lane = cute.arch.make_warp_uniform(self.thread // 32), self.thread % 32
        self.rank = cute.arch.block_idx_in_cluster() if self.cluster > 1 else Int32(0)
        self.pairs = pairs
        all_warps = self.warps * self.cluster
        self.steps = (pairs + (all_warps * 32 - 1)) // (all_warps * 32)
        self.first_pair = (self.rank * self.warps + self.warp) * self.steps * 32 + self.lane

    @cute.jit
    def clear(self):
        counts = cute.make_tensor(self.before.iterator, cute.make_layout(self.warps * self.experts))
        for i in cutlass.range(self.thread, self.warps * self.experts, self.warps * 32):
            counts[i] = Int32(0)

    @cute.jit
    def sort(
        self,
        ids: cute.Pointer,
        expert_map: cute.Pointer,
        num_ids: Int32,
        choices: Int32,
        capacity: Int32,
        index: cute.Pointer,
        offsets: cute.Pointer,
        inverse: cute.Pointer,
    ):
        """After `clear` and a barrier; arguments as of `Route`."""
        vector = cute.make_layout(VECTOR)
        index, inverse = cute.make_tensor(index, vector), cute.make_tensor(inverse, vector)
        self.count(ids, expert_map, num_ids, inverse)
        cute.arch.sync_threads()
        used = self.scan(capacity, cute.make_tensor(offsets, vector))
        self.place(choices, index, inverse)
        threads = self.warps * 32
        for row in cutlass.range(
            used + self.rank * threads + self.thread, self.pairs, threads * self.cluster
        ):
            index[row] = Int32(-1)
        if const_expr(self.cluster > 1):
            cute.arch.cluster_wait()  # others may still read this CTA's totals

    @cute.jit
    def count(self, ids: cute.Pointer, expert_map: cute.Pointer, num_ids: Int32, inverse):
        ids = cute.make_tensor(ids, cute.make_layout(VECTOR))
        local = cute.make_tensor(expert_map, cute.make_layout(VECTOR))
        before, warp = self.before, self.warp
        for start in cutlass.range(0, self.steps, _BATCH, unroll=1):
            experts = cute.make_rmem_tensor((_BATCH,), Int32)
            for i in range_constexpr(_BATCH):
                experts[i] = Int32(-1)
                pair = self.first_pair + (start + i) * 32
                if start + i < self.steps and pair < self.pairs:
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
                if start + i < self.steps:
                    expert = experts[i]
                    same = cute.arch.match_sync(0xFFFFFFFF, expert)
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
    def scan(self, capacity: Int32, offsets: cute.Tensor) -> Int32:
        """-> rows that experts have. A thread sums up an expert."""
        before, totals, sums = self.before, self.totals, self.sums
        first, ends = self.first, self.end
        expert = self.thread
        total, rows_before, kept = Int32(0), Int32(0), Int32(0)
        if expert < self.experts:
            for part in range_constexpr(0, self.warps, 8):
                counts = [before[part + i, expert] for i in range(min(8, self.warps - part))]
                for i in range_constexpr(len(counts)):
                    before[part + i, expert] = total
                    total += counts[i]
            kept = total
        if const_expr(self.cluster > 1):
            if expert < self.experts:
                totals[expert] = total
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
            if expert < self.experts:
                kept = Int32(0)
                for rank in range_constexpr(self.cluster):
                    peer = cute.arch.map_dsmem_ptr(totals.iterator + expert, rank)
                    rows = cute.arch.inline_ptx(
                        "ld.shared::cluster.b32 {$w0}, [{$r0}];",
                        write_only_types=[Int32],
                        read_only_args=[peer.toint()],
                    )
                    kept += rows
                    if rank < self.rank:
                        rows_before += rows
            cute.arch.cluster_arrive()
        kept = cutlass.min(kept, capacity)
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
            first[expert] = end - kept + rows_before
            ends[expert] = end
            if self.rank == 0:
                offsets[expert] = end
        cute.arch.sync_threads()
        return used

    @cute.jit
    def place(self, choices: Int32, index: cute.Tensor, inverse: cute.Tensor):
        for start in cutlass.range(0, self.steps, _BATCH, unroll=1):
            packed = cute.make_rmem_tensor((_BATCH,), Int32)
            for i in range_constexpr(_BATCH):
                pair = self.first_pair + (start + i) * 32
                packed[i] = Int32(-1)
                if start + i < self.steps and pair < self.pairs:
                    packed[i] = inverse[pair]
            for i in range_constexpr(_BATCH):
                pair = self.first_pair + (start + i) * 32
                if packed[i] >= 0:
                    expert = packed[i] & ((1 << _EXPERT_BITS) - 1)
                    row = self.before[self.warp, expert] + self.first[expert]
                    row += packed[i] >> _EXPERT_BITS
                    if row < self.end[expert]:
                        index[row] = pair // choices
                    else:
                        row = Int32(-1)
                    inverse[pair] = row


class Route:
    """topk_ids -> index, offsets, inverse, by one cluster of CTAs."""

    def __init__(self, problem: RouteProblem, config: StepConfig):
        self.sorter = PairSorter(problem.num_experts, problem.id_bits, config)
        self.threads, self.cluster = config.threads, config.cluster
        self.smem_bytes = 4 * self.sorter.words

    def arguments(self):
        """Of `__call__`, before grid and stream."""
        return (
            pointer("ids", self.sorter.id_type, self.sorter.id_type.width // 8),
            pointer("expert_map", Int32, 4),
            integer("num_ids"),
            integer("pairs"),
            integer("choices"),
            integer("capacity"),
            pointer("index", Int32, 4),
            pointer("offsets", Int32, 4),
            pointer("inverse", Int32, 4),
        )

    def tensor_maps(self):
        return ()

    @cute.jit
    def __call__(
        self, ids, expert_map, num_ids, pairs, choices, capacity, index, offsets, inverse, grid,
        stream,
    ):  # fmt: skip
        """ids [pairs], `choices` of each token. expert_map [num_ids]: may be null, then ids are
        experts and num_ids is num_experts. capacity: the most rows of an expert. The grid is one
        cluster."""
        self.kernel(
            ids, expert_map, num_ids, pairs, choices, capacity, index, offsets, inverse
        ).launch(
            grid=[grid, 1, 1],
            block=[self.threads, 1, 1],
            cluster=[self.cluster, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        ids: cute.Pointer,
        expert_map: cute.Pointer,
        num_ids: Int32,
        pairs: Int32,
        choices: Int32,
        capacity: Int32,
        index: cute.Pointer,
        offsets: cute.Pointer,
        inverse: cute.Pointer,
    ):
        table = utils.SmemAllocator().allocate_array(Int32, self.sorter.words)
        self.sorter.attach(pairs, table)
        self.sorter.clear()
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        self.sorter.sort(ids, expert_map, num_ids, choices, capacity, index, offsets, inverse)
