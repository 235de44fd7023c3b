"""The SM90 grouped GEMM template for few rows per expert: weights are WGMMA's M operand."""

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils as utils
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Int64, Uint8, const_expr, range_constexpr
from cutlass.cute.nvgpu import warpgroup
from cutlass.pipeline import PipelineUserType

from emitters.device.dependent import launch_next, wait_for_previous
from emitters.device.epilogue.columns import ColumnsFragment
from emitters.device.epilogue.nodes import Epilogue
from emitters.device.epilogue.store import TransposedStore, WarpgroupStore
from emitters.device.gather import GatherIterator
from emitters.device.mainloop_packed_mma import RowProducts
from emitters.device.mainloop_packed_sm90 import PackedProducts
from emitters.device.mainloop_sm90 import add_products, begin_products, issue, make_sums, sum_type
from emitters.device.memory import ELEMENT, SMEM, map_carrier, vector
from emitters.device.packed import PackedLoader
from emitters.device.parameters import Gate, Gathered, Output, Rows, Scales
from emitters.device.ring import Ring
from emitters.device.scales import BlockScales
from emitters.device.scheduler import ExpertTable
from emitters.device.weights import OPERAND_MAJOR, WEIGHT_LAYOUT, WeightLoader
from emitters.spec.config_packed_sm90 import MMA_ROWS
from emitters.spec.config_swap_sm90 import GemmSwapSm90Config
from emitters.spec.gemm import GemmProblem
from emitters.spec.staged_sm90 import SLICE_BYTES
from emitters.templates.parameters import gemm_arguments, gemm_tensor_maps

GROUP_M = 8  # M tiles that use an N tile's weights, in L2, before the next N tile starts


class GemmSwapSm90:
    """Writes the kernel of a grouped GEMM for few rows per expert; weights are WGMMA's M operand.

      out[r, :] = epilogue(x[index[r], :] @ weight[e].T), for the rows r of all experts e

    A CTA computes output tiles of tile_m rows x tile_n columns, one after the other. With split_k
    > 1 a cluster computes a tile, and each of its CTAs takes a share of K. A stage s of the ring
    holds k_boxes times 128 bytes of K:

      role                        work              waits for     arrives at
      weights' warp, 1 lane       weights, TMA      empty[s]      full[s]: 1, and their bytes
      gather, G threads           x, cp.async       empty[s]      full[s]: G, as copies land
      consumers, warps 0 - 3      WGMMA, epilogue   full[s]       empty[s]: 1 per warp
        with split_k, CTA 1, ..   send sums         sums_empty    CTA 0's sums_full: their bytes
        with split_k, CTA 0       add sums, store   sums_full     others' sums_empty: 1 per warp

      full[s] completes after 1 + G arrivals and the bytes of the weights, empty[s] after 4;
      sums_full after 1 (CTA 0's own) and the bytes of the sums, sums_empty after 4.

    The time of the roles, for tiles a, b, c, in a dependent launch with `early` (wait: until the
    previous kernel has ended; m: main loop, e: epilogue):

      weights' warp   | table | load a | load b | ...       stops only when the ring is full
      gather          | wait         | index | load a | load b | ...
      consumers       | wait                   | m a | e a | m b | e b | ...

    The weights' warp needs no index, so it runs ahead of the gather. It also builds the expert
    table, for which it waits for the previous kernel unless `early`.

    Packed weights have more consumers: each warpgroup has 64 of the tile's columns, and releases
    every stage; or several have the same ones and take stages in turn, of which each releases its
    own, and the others pass their sums to the first, which stores (`add_groups`). Tiles of eight
    rows are multiplied by mma.sync, also by groups of two warps with 32 columns. With one producer
    the gather's first warp copies weights too, in step with the others, the gather's warpgroup
    passes registers on to the consumers, and these store by TMA, so that a tile leaves under the
    next one's main loop. A tile's last stage is multiplied by itself, if one group has all stages
    and a part of this one is past the end of K: that is neither copied nor multiplied.

    A stage has, for each box, tile_n rows of weight (N-major weights: for every 64 columns, the
    rows of K) and tile_m rows of x, in the 128-byte swizzle. Past the end of K or N it has zeros:
    TMA writes them where it reads outside of the tensor map, and so does the gather.
    """

    def __init__(self, problem: GemmProblem, config: GemmSwapSm90Config):
        self.problem, self.config = problem, config
        self.element = ELEMENT[problem.x]
        self.tile = (config.tile_n, config.tile_m, config.k_tile(problem))
        self.stages = config.pipeline_stages(problem)
        self.x_bytes = config.x_bytes(problem)  # per box
        self.weight_bytes = config.weight_bytes(problem)  # per copy
        self.weight_copies = config.weight_copies(problem)  # per stage
        # of a tile's last stage, if fewer; else 0
        self.tail_copies = config.tail_blocks(problem) if problem.weight.packing else 0
        self.smem_bytes, self.cluster = config.smem_bytes(problem), config.cluster
        self.experts = ExpertTable(problem, config, cluster_m=1, group_m=GROUP_M)
        self.gather = GatherIterator(problem.gather, problem.k * problem.x.bytes, config.tile_m)
        products = RowProducts if config.tile_m == MMA_ROWS else PackedProducts
        self.packed = products(problem, config) if problem.weight.packing else None
        loader = PackedLoader if self.packed else WeightLoader
        self.weights = loader(problem, config.evict_first)
        self.consumer_threads = config.group_threads * config.consumers
        self.column_threads = 32 * config.column_warps  # of them, those that store
        self.k_groups = config.consumers // config.column_groups
        self.one_producer = config.weight_threads == 0
        self.ring = Ring(self.stages, 1 + config.gather_threads, config.column_warps)
        self.scales = BlockScales(problem, config) if problem.block_rows else None
        self.slice_bytes = config.slice_bytes(problem) if self.packed else 0
        store = (WarpgroupStore if self.slice_bytes else TransposedStore)(problem, config)
        self.epilogue = Epilogue(problem, config, ColumnsFragment, store)

    def arguments(self):
        """The arguments of `__call__`, except grid and stream."""
        return gemm_arguments(self.problem)

    def tensor_maps(self):
        columns, k = self.config.tile_n, self.tile[2]
        slice_bytes = self.slice_bytes or SLICE_BYTES
        return gemm_tensor_maps(self.problem, columns, k, self.config.l2_promotion, slice_bytes)

    @cute.jit
    def __call__(
        self, weight, rows, gathered, output, gate, scales, node_tensors, counters, grid, stream
    ):
        """weight: a [N, K, E] tensor, or the pointer to a table of E tensor maps.

        None unless needed: gate (for a gated activation), scales (if they vary along K),
        node_tensors (for other scales, and nodes that read a tensor). counters is always None: no
        schedule here is dynamic.
        """
        layout, _ = self.stage_layouts()
        one_box = cute.slice_(layout, (None, None, 0))
        self.kernel(
            self.weights.carrier(weight, one_box, (self.tile[0], self.tile[2])),
            rows,
            gathered,
            Output(output.out, map_carrier(output.out_map)),
            gate,
            scales,
            node_tensors,
        ).launch(
            grid=[grid, 1, 1],
            block=[self.config.threads, 1, 1],
            cluster=[self.config.split_k, 1, 1],
            min_blocks_per_mp=self.config.ctas_per_sm,
            preferred_smem_carveout=100,  # else the compiler asks a driver
            stream=stream,
        )

    def stage_layouts(self):
        """The swizzled layouts of all boxes of weight and of x."""
        k_major, weight_major = utils.LayoutEnum.ROW_MAJOR, WEIGHT_LAYOUT[self.problem.weight.major]
        boxes = self.stages * self.config.k_boxes
        return (
            sm90.make_smem_layout_a(weight_major, self.tile, self.element, boxes),
            sm90.make_smem_layout_b(k_major, self.tile, self.element, boxes),
        )

    def storage(self):
        boxes = self.stages * self.config.k_boxes
        x_count = self.x_bytes * boxes // self.problem.x.bytes
        weight_element = Uint8 if self.packed else self.element
        weight_bytes = self.weight_bytes * self.weight_copies * self.stages
        weight_count = weight_bytes * 8 // weight_element.width
        words = self.config.table_words(self.problem)
        staging_bytes = self.config.staging_bytes(self.problem)
        sliced_bytes, staging_bytes = (staging_bytes, 0) if self.slice_bytes else (0, staging_bytes)
        partial_bytes = self.config.partial_bytes
        scale_words = self.config.scale_words(self.problem) * boxes

        @cute.struct
        class Storage:
            x: cute.struct.Align[cute.struct.MemRange[self.element, x_count], 1024]
            slices: cute.struct.Align[cute.struct.MemRange[Uint8, sliced_bytes], 1024]
            weight: cute.struct.Align[cute.struct.MemRange[weight_element, weight_count], 1024]
            partial: cute.struct.Align[cute.struct.MemRange[Uint8, partial_bytes], 16]
            staging: cute.struct.Align[cute.struct.MemRange[Uint8, staging_bytes], 16]
            full: cute.struct.MemRange[Int64, self.stages]
            empty: cute.struct.MemRange[Int64, self.stages]
            sums: cute.struct.MemRange[Int64, 2]
            table: cute.struct.MemRange[Int32, words]
            tiles: cute.struct.MemRange[Int32, 1]
            scales: cute.struct.Align[cute.struct.MemRange[Float32, scale_words], 16]

        return Storage

    @cute.kernel
    def kernel(
        self,
        weight: cute.CopyAtom | cute.Pointer,
        rows: Rows,
        gathered: Gathered,
        output: Output,
        gate: Gate | None,
        scales: Scales | None,
        node_tensors: tuple | None,
    ):
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = utils.SmemAllocator().allocate(self.storage())
        self.ring.attach(storage.full.data_ptr(), storage.empty.data_ptr())
        sums = storage.sums.data_ptr()
        self.experts.attach(storage.table.data_ptr())
        tiles = storage.tiles.get_tensor(cute.make_layout(1))
        if const_expr(self.scales is not None):
            self.scales.attach(storage.scales.data_ptr())

        consumer_warps = self.consumer_threads // 32
        weight_warp = consumer_warps  # of one producer; else the last one
        if const_expr(not self.one_producer):
            weight_warp += self.config.gather_threads // 32
        if warp == weight_warp:
            if rows.early == 0:
                wait_for_previous()
            count = self.experts.build(rows)
            if cute.arch.lane_idx() == 0:
                tiles[0] = count
        if warp == 0:
            with cute.arch.elect_one():
                self.ring.init()
                if const_expr(self.config.split_k > 1):
                    cute.arch.mbarrier_init(sums, 1)
                    cute.arch.mbarrier_init(sums + 1, self.config.column_warps)
            cute.arch.mbarrier_init_fence()
            self.weights.prefetch_map(weight)
        self.sync_cluster(alone=True)

        if self.one_producer or warp != weight_warp:
            wait_for_previous()  # it may still use x, index, scales and out
            if thread == 0:
                launch_next()
        if warp < consumer_warps:
            if const_expr(self.one_producer):
                cute.arch.setmaxregister_increase(self.config.consumer_registers)
            staging = (storage.slices if self.slice_bytes else storage.staging).data_ptr()
            of_columns = warp
            if const_expr(self.packed is not None):  # of either group with the same columns
                of_columns = warp % self.config.column_warps
            lane = thread % 32
            self.epilogue.attach(node_tensors, gate, gathered, output, staging, of_columns, lane)
            if const_expr(self.packed is not None):
                self.mma_packed(storage, sums, thread)
            else:
                self.mma(storage, sums, thread)
        elif self.one_producer or warp < weight_warp:
            if const_expr(self.one_producer):
                cute.arch.setmaxregister_decrease(self.config.producer_registers)
            copier = thread % self.config.gather_threads
            self.gather.attach(gathered, copier)
            if const_expr(self.scales is not None):
                self.scales.attach_copies(scales, copier, self.gather)
            self.load_x(storage, weight, warp == weight_warp)
        else:
            self.load_weights(weight, storage)
        self.sync_cluster()  # other CTAs may still write to this one's shared memory

    def sync_cluster(self, alone: bool = False):
        """Waits for all threads of the cluster; of a CTA without a cluster only if `alone`."""
        if self.config.split_k > 1:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        elif alone:
            cute.arch.sync_threads()

    def share(self, storage):
        """The tiles of this CTA or cluster: (first, end, stride)."""
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        end = storage.tiles.get_tensor(cute.make_layout(1))[0]
        return block // self.config.split_k, end, grid // self.config.split_k

    def k_range(self):
        """The stages of K that this CTA takes: (first, end)."""
        stages, split = self.config.k_stages(self.problem), self.config.split_k
        if split == 1:
            return Int32(0), Int32(stages)
        rank = cute.arch.block_idx_in_cluster()
        return rank * stages // split, (rank + 1) * stages // split

    @cute.jit
    def load_weights(self, weight, storage):
        """The loop over tiles of the weights' warp: fills the stages with weights."""
        tile, end, stride = self.share(storage)
        first_k, end_k = self.k_range()
        state = self.ring.producer()
        while tile < end:
            expert, _, _, column, _ = self.experts.locate(tile, end, Int32(0))
            weight_map = self.weights.find_map(weight, expert)
            for k in cutlass.range(first_k, end_k, unroll=1):
                self.ring.wait_empty(state)
                self.copy_weights(storage, state, weight_map, k, column, expert)
                state.advance()
            tile += stride

    @cute.jit
    def copy_weights(self, storage, state, weight_map, k, column, expert):
        """Starts the copies of a stage's weights; by one warp."""
        stages = cute.recast_ptr(storage.weight.data_ptr(), dtype=Uint8)
        copies = self.weight_copies
        step = 1 if self.packed else self.tile[2]  # blocks or elements of K
        count = copies
        if const_expr(self.tail_copies > 0):
            last = k == self.config.k_stages(self.problem) - 1
            count = cutlass.select_(last, Int32(self.tail_copies), Int32(copies))
        with cute.arch.elect_one():
            barrier = self.ring.expect(state, self.weight_bytes * count)
            for i in range_constexpr(copies):
                stage = stages + (state.index * copies + i) * self.weight_bytes
                corner = ((k * copies + i) * step, column, expert)
                if i < count:
                    self.weights.copy(stage, weight_map, corner, self.tile[0], barrier)

    @cute.jit
    def load_x(self, storage, weight, with_weights):
        """The loop over tiles of the gather's warps: fills the stages with rows of x.

        weight, with_weights: what this warp copies too, if there is one producer.
        """
        stages = cute.recast_ptr(storage.x.data_ptr(), dtype=Uint8)
        boxes = self.config.k_boxes
        tile, end, stride = self.share(storage)
        first_k, end_k = self.k_range()
        state = self.ring.producer()
        next_expert, row, rows, next_column, _ = self.experts.locate(tile, end, Int32(0))
        self.gather.fetch(row, rows)
        while tile < end:
            self.gather.advance()
            if const_expr(self.scales is not None):
                self.scales.advance()
            tile += stride
            expert, column = next_expert, next_column
            next_expert, row, rows, next_column, _ = self.experts.locate(tile, end, Int32(0))
            self.gather.fetch(row, rows)
            for k in cutlass.range(first_k, end_k, unroll=1):
                self.ring.wait_empty(state)
                if self.one_producer and with_weights:
                    weight_map = self.weights.find_map(weight, expert)
                    self.copy_weights(storage, state, weight_map, k, column, expert)
                for i in range_constexpr(boxes):
                    stage = stages + (state.index * boxes + i) * self.x_bytes
                    self.gather.copy(stage, k * boxes + i)
                    if const_expr(self.scales is not None):
                        box = state.index * boxes + i
                        self.scales.copy(box, k * boxes + i, expert, column)
                self.ring.arrive_when_copied(state)
                state.advance()

    def operands(self, storage):
        """The consumers' MMA, and its views of all boxes of weight and of x."""
        k_major = cute.nvgpu.OperandMajorMode.K
        weight_major = OPERAND_MAJOR[self.problem.weight.major]
        mma = sm90.make_trivial_tiled_mma(
            self.element, self.element, weight_major, k_major, sum_type(self.problem), (1, 1, 1),
            tiler_mn=(64, self.config.tile_m),
        )  # fmt: skip
        weight_layout, x_layout = self.stage_layouts()
        sA = storage.weight.get_tensor(weight_layout.outer, swizzle=weight_layout.inner)
        sB = storage.x.get_tensor(x_layout.outer, swizzle=x_layout.inner)
        group = mma.get_slice(0)
        tCrA = mma.make_fragment_A(group.partition_A(sA))
        tCrB = mma.make_fragment_B(group.partition_B(sB))
        return mma, tCrA, tCrB

    @cute.jit
    def mma(self, storage, sums_full, thread):
        """The loop over tiles of the consumer warpgroup: main loop and epilogue."""
        mma, tCrA, tCrB = self.operands(storage)
        part = (64, self.tile[1])
        acc, sums = make_sums(mma, self.tile[:2], part, thread, self.problem)
        two_level = self.problem.two_level

        tile, end, stride = self.share(storage)
        first_k, end_k = self.k_range()
        state = self.ring.consumer()
        cluster_state = pipeline.make_pipeline_state(PipelineUserType.Consumer, 1)
        while tile < end:
            expert, row, rows, column, _ = self.experts.locate(tile, end, Int32(0))
            self.epilogue.begin(row, rows, column)
            if const_expr(two_level):
                sums.fill(0)
            mma.set(warpgroup.Field.ACCUMULATE, False)
            for k in cutlass.range(first_k, end_k, unroll=1):
                self.ring.wait_full(state)
                self.multiply(mma, acc, tCrA, tCrB, state.index, sums)
                mma.set(warpgroup.Field.ACCUMULATE, not two_level)
                self.ring.release(state.index)
                state.advance()
                if k == first_k:  # the wait for the index and the first weights hides this
                    self.epilogue.load(expert, column)
            self.store(storage, sums, sums_full, cluster_state, thread, (expert, row, rows, column))
            cluster_state.advance()
            tile += stride
        self.epilogue.finish()

    @cute.jit
    def mma_packed(self, storage, sums_full, thread):
        """`mma` for packed weights, which WGMMA reads from registers."""
        _, x_layout = self.stage_layouts()
        x = storage.x.get_tensor(x_layout.outer, swizzle=x_layout.inner)
        group = Int32(0)
        if const_expr(self.k_groups > 1):
            group = cute.arch.make_warp_uniform(thread // self.column_threads)
            thread = thread % self.column_threads
        self.packed.attach(storage.weight.data_ptr(), x, thread)

        tile, end, stride = self.share(storage)
        first_k, end_k = self.k_range()
        state = self.ring.consumer()
        cluster_state = pipeline.make_pipeline_state(PipelineUserType.Consumer, 1)
        turn = group  # the group's first stage of the tile
        for i in range_constexpr(self.k_groups - 1):
            if group > i:
                state.advance()
        ahead = self.one_producer  # has registers to find the next tile under the main loop
        expert = row = rows = column = Int32(0)
        if const_expr(ahead):
            expert, row, rows, column, _ = self.experts.locate(tile, end, Int32(0))
        while tile < end:
            if const_expr(not ahead):
                expert, row, rows, column, _ = self.experts.locate(tile, end, Int32(0))
            place = (expert, row, rows, column)
            tile += stride
            self.epilogue.begin(row, rows, column)
            self.packed.begin()
            own_k = first_k + turn
            full = end_k - (1 if self.tail_copies else 0)
            for k in cutlass.range(own_k, full, self.k_groups, unroll=1):
                self.ring.wait_full(state)
                self.packed.add_stage(state.index, self.config.k_blocks, self.release)
                for _ in range_constexpr(self.k_groups):
                    state.advance()
                if k == own_k:
                    self.epilogue.load(place[0], place[3])
                    if const_expr(ahead):
                        expert, row, rows, column, _ = self.experts.locate(tile, end, Int32(0))
            if const_expr(self.tail_copies > 0):
                self.ring.wait_full(state)
                self.packed.add_stage(state.index, self.tail_copies, self.release)
                state.advance()
            self.packed.finish(self.release)
            if const_expr(self.k_groups > 1):
                self.add_groups(storage, group, thread)
                # turns go on from tile to tile: a power of two minus the stages of this one
                turn = (turn + (self.k_groups - 1) * (end_k - first_k)) & (self.k_groups - 1)
                if group == 0:
                    self.store(storage, self.packed.sums, sums_full, cluster_state, thread, place)
            else:
                self.store(storage, self.packed.sums, sums_full, cluster_state, thread, place)
            cluster_state.advance()
        self.epilogue.finish()

    @cute.jit
    def add_groups(self, storage, group, thread):
        """Adds the sums of the other groups of consumers, which took the stages in between, to
        those of the first, which stores a tile."""
        sums, partial_sums = self.packed.sums, storage.partial.data_ptr()
        first = self.config.split_k - 1  # behind the sums of a cluster's CTAs
        if group > 0:
            for i in range_constexpr(cute.size(sums) // 4):
                sent = self.partial_vector(partial_sums, first + group - 1, i, thread, Float32)
                for j in range_constexpr(4):
                    sent[j] = sums[4 * i + j]
        cute.arch.barrier(barrier_id=1, number_of_threads=self.consumer_threads)
        if group == 0:
            for other in range_constexpr(self.k_groups - 1):
                for i in range_constexpr(cute.size(sums) // 4):
                    sent = self.partial_vector(partial_sums, first + other, i, thread, Float32)
                    for j in range_constexpr(4):
                        sums[4 * i + j] = sums[4 * i + j] + sent[j]
        cute.arch.barrier(barrier_id=2, number_of_threads=self.consumer_threads)

    def release(self, stage):
        """Releases a stage that all lanes have read; none if it is negative."""
        cute.arch.sync_warp()
        self.ring.release_unless(stage, stage >> 31)

    @cute.jit
    def store(self, storage, sums, sums_full, cluster_state, thread, place):
        """Stores a tile's sums; with split_k, after adding those of the cluster's other CTAs.

        place: the tile's expert, first row, rows and first column.
        """
        expert, row, rows, column = place
        if const_expr(self.config.tile_m % self.config.part_rows != 0):
            rows = cutlass.min(rows, self.config.tile_m)  # the epilogue's part goes on after it
        if const_expr(self.config.split_k > 1):
            rank = cute.arch.block_idx_in_cluster()
            partial_sums = storage.partial.data_ptr()
            if rank == 0:
                self.add_sums(sums, partial_sums, sums_full, cluster_state.phase, thread)
                self.epilogue.store(sums, expert, row, rows, column)
            else:
                self.send_sums(sums, partial_sums, sums_full, cluster_state.phase, rank, thread)
        else:
            self.epilogue.store(sums, expert, row, rows, column)

    def multiply(self, mma, acc, tCrA, tCrB, stage, sums):
        """Multiplies one stage and waits for the result.

        With two-level accumulation it waits for each 128 bytes of K and adds them to sums.
        """
        begin_products()
        for i in range(self.config.k_boxes):
            box = stage * self.config.k_boxes + i
            if self.problem.two_level:
                factor = self.factor(box)
                add_products(mma, acc, sums, (tCrA, tCrB), box, factor, lambda: None, lambda: None)
                mma.set(warpgroup.Field.ACCUMULATE, False)
            else:
                issue(mma, acc, tCrA, tCrB, box)
        if self.problem.two_level:
            cute.arch.sync_warp()  # all lanes have read their scales
        else:
            warpgroup.commit_group()
            warpgroup.wait_group(0)

    def factor(self, box):
        """The scale of each register of a box's products; None if all are 1."""
        if self.scales is None:
            return None
        fragment, columns = self.epilogue.fragment, self.scales.columns
        return fragment.factors(fragment.read_scales(*self.scales.read(box), columns), columns)

    @cute.jit
    def send_sums(self, sums, partial, sums_full, phase, rank, thread):
        """Sends sums to the cluster's CTA 0, once it has added those of the previous tile."""
        cute.arch.mbarrier_wait(sums_full + 1, phase ^ 1)
        words = cute.recast_tensor(sums, Int32)
        for i in range_constexpr(cute.size(sums) // 4):
            target = self.partial_vector(partial, rank - 1, i, thread, Int32)
            values = tuple(words[4 * i + j] for j in range(4))
            cute.arch.store_async_dsmem(target.iterator, values, sums_full, 0)

    @cute.jit
    def add_sums(self, sums, partial, sums_full, phase, thread):
        """Adds the sums of the cluster's other CTAs, in order of their ranks."""
        peers = self.config.split_k - 1
        if thread == 0:
            sent_bytes = peers * self.config.tile_m * self.config.tile_n * 4
            cute.arch.mbarrier_arrive_and_expect_tx(sums_full, sent_bytes)
        cute.arch.mbarrier_wait(sums_full, phase)
        for peer in range_constexpr(peers):
            for i in range_constexpr(cute.size(sums) // 4):
                sent = self.partial_vector(partial, peer, i, thread, sum_type(self.problem))
                for j in range_constexpr(4):
                    sums[4 * i + j] = sums[4 * i + j] + sent[j]
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            for peer in range_constexpr(1, self.config.split_k):
                cute.arch.mbarrier_arrive(sums_full + 1, peer)

    def partial_vector(self, partial, peer, i, thread, element):
        """The place of a thread's i-th four sums from the CTA of rank peer + 1."""
        share = self.config.tile_m * self.config.tile_n * 4
        at = partial + (peer * share + i * (self.column_threads * 16) + thread * 16)
        return vector(at, element, 4, SMEM)
