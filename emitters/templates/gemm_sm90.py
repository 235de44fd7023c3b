"""The SM90 grouped GEMM template: persistent CTAs, warps with roles, rows gathered by index."""

from functools import partial

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int16, Int32, Int64, Uint8, const_expr, range_constexpr
from cutlass.cute.nvgpu import cpasync, warpgroup

from emitters.device.dependent import launch_next, wait_for_previous
from emitters.device.epilogue.gradient import GradientStore
from emitters.device.epilogue.groups import GroupStore
from emitters.device.epilogue.nodes import Epilogue
from emitters.device.epilogue.rows import RowsFragment
from emitters.device.epilogue.store import SliceStore
from emitters.device.gather import GatherIterator
from emitters.device.mainloop_sm90 import (
    add_products,
    begin_products,
    computed_once,
    fragments,
    issue,
    loop_steps,
    make_sums,
    sum_type,
)
from emitters.device.memory import ELEMENT, map_carrier
from emitters.device.ordered import OrderedRows
from emitters.device.parameters import Gate, Gathered, Gradient, Output, Rows, Scales
from emitters.device.ring import Ring
from emitters.device.scales import BlockScales, SpannedScales
from emitters.device.scheduler import PostedUnits
from emitters.device.weights import OPERAND_MAJOR, WEIGHT_LAYOUT, WeightLoader
from emitters.spec.config_sm90 import GemmSm90Config
from emitters.spec.gemm import GemmProblem
from emitters.spec.image import TensorMapBox
from emitters.spec.staged_sm90 import K_TILE_BYTES, WARPGROUP, Schedule
from emitters.templates.parameters import gemm_arguments, gemm_tensor_maps, gradient_argument

LOAD_AHEAD = 2  # the epilogue's operands are loaded this many k-tiles before the last


class GemmSm90:
    """Writes the kernel of a grouped GEMM; consumers hold rows of x as WGMMA's M operand.

      out[r, :] = epilogue(x[index[r], :] @ weight[e].T), for the rows r of all experts e

    A CTA computes output tiles of tile_m x tile_n, one after the other. Warpgroup 0 is the
    producer, the other C warpgroups are consumers. A stage s of the ring holds 128 bytes of K:

      role                       work              waits for   arrives at
      producer, warp 0, 1 lane   weights, TMA      empty[s]    full[s]: 1, and their bytes
      producer, 128 threads      x, cp.async       empty[s]    full[s]: 128, as copies land
      producer, warp 1           posts units       -           named barrier 3 (128 threads)
      consumers                  WGMMA, epilogue   full[s]     empty[s]: 1 per warp

      full[s] completes after 1 + 128 arrivals and the bytes of the weights;
      empty[s] after 4 C, in ping-pong after 4, times the CTAs of the cluster.

    The time of the roles, for tiles a, b, c (m: main loop, e: epilogue):

      producer               | load a | load b | load c | ...
      consumers, together        | m a   | e a | m b   | e b | ...      each 64 rows of a tile
      consumer 0, ping-pong      | m a   | e a     | m c   | e c | ...  each a whole tile
      consumer 1, ping-pong              | m b   | e b     | m d | ...

    - In ping-pong (C = 2) consumers must take the stages in the order in which they are filled. A
      consumer waits at named barrier 1 + its number before its main loop; the other one arrives
      there when it has issued the last WGMMA of its own (256 threads: 128 wait, 128 arrive). At
      the start, consumer 1 lets consumer 0 begin.
    - In a cluster of two, each CTA loads half of the weights of a shared N tile and sends it to
      both. A stage is empty once the consumers of both CTAs have read it.
    - Warp 1 posts each unit of work before the last stage of the unit before the previous one is
      filled. Named barrier 3 makes the post visible to the producer, full[s] to the consumers.
    - Scales along K are in the stages, and threads copy them as they copy x. With scale_span they
      are in memory of their own, and those of several k-tiles are copied with the first of these.
    - With tma_x, warp 1 posts units, and one lane of it loads weights and x: full[s] completes
      after its arrival. If scales vary along K, it loads those of x too, and warp 2 copies those of
      the weights, which takes 32 arrivals more. Named barrier 3 has 32 or 64 threads. WGMMA then
      reads what TMA alone has written, so consumers need no proxy fence.

    A stage has tile_m rows of x and tile_n rows of weight (N-major weights: for every 64 columns,
    the rows of K), in the 128-byte swizzle. Past the end of K or N it has zeros: TMA writes them
    where it reads outside of the tensor map, and so does the gather.
    """

    def __init__(self, problem: GemmProblem, config: GemmSm90Config):
        self.problem, self.config = problem, config
        self.element = ELEMENT[problem.x]
        self.tile = (config.tile_m, config.tile_n, config.k_tile(problem))
        self.k_tiles = config.k_tiles(problem)
        self.stages = config.pipeline_stages(problem)
        self.x_bytes, self.weight_bytes = config.x_bytes(problem), config.weight_bytes(problem)
        self.parts = config.parts(problem)
        self.smem_bytes, self.cluster = config.smem_bytes(problem), config.cluster
        self.units = PostedUnits(problem, config)
        self.weights = WeightLoader(problem)
        scales = SpannedScales if config.scale_span > 1 else BlockScales
        self.scales = scales(problem, config) if problem.block_rows else None
        if config.tma_x:
            self.x, self.tma_bytes = OrderedRows(), self.x_bytes + self.weight_bytes
            copying = 0
            if self.scales:
                self.tma_bytes += self.scales.x_bytes
                copying = 32
            self.producers = 32 + copying  # threads
        else:
            row_bytes = problem.k * problem.x.bytes
            self.x = GatherIterator(problem.gather, row_bytes, config.tile_m)
            self.tma_bytes, copying = self.weight_bytes, WARPGROUP
            self.producers = WARPGROUP
        self.ring = Ring(self.stages, 1 + copying, 4 * config.warpgroups_per_tile, self.cluster)
        # scales of a stage per consumer thread: of two rows of each 64, and of all columns
        of_rows = 2 * config.warpgroup_rows // 64
        self.scale_count = of_rows + self.scales.count if self.scales else 1
        if problem.gradient:
            store = GradientStore(problem, config)
        else:
            make_store = GroupStore if problem.quantized_out else SliceStore
            store = make_store(problem, config.slices_together(problem))
        self.epilogue = Epilogue(problem, config, RowsFragment, store)

    def arguments(self):
        """The arguments of `__call__`, except grid and stream."""
        dynamic = self.config.schedule is Schedule.DYNAMIC
        arguments = gemm_arguments(self.problem, dynamic, self.config.tma_x)
        return *arguments, gradient_argument(self.problem)

    def tensor_maps(self):
        columns, k = self.config.tile_n // self.cluster, self.tile[2]
        maps = gemm_tensor_maps(self.problem, columns, k, self.config.l2_promotion)
        if self.config.tma_x:
            promotion = self.config.l2_promotion
            x = TensorMapBox("x", (k, self.tile[0]), K_TILE_BYTES, promotion)
            maps = (x, *maps)
            if self.scales is not None:
                box = self.config.scaled_rows, 1
                maps = (*maps, TensorMapBox("per_token_scale", box, 0, promotion))
        return maps

    @cute.jit
    def __call__(
        self, weight, rows, gathered, output, gate, scales, node_tensors, counters, gradient, grid,
        stream,
    ):  # fmt: skip
        """weight: a [N, K, E] tensor, or the pointer to a table of E tensor maps.

        None unless needed: gate (for a gated activation), scales (if they vary along K),
        node_tensors (for other scales, and nodes that read a tensor), counters (for a dynamic
        schedule), gradient (of an activation).
        """
        _, layout = self.stage_layouts()
        one_stage = cute.slice_(layout, (None, None, 0))
        if const_expr(self.config.tma_x):
            gathered = gathered._replace(x=map_carrier(gathered.x))
            if const_expr(scales is not None):
                scales = scales._replace(x=map_carrier(scales.x))
        self.kernel(
            self.weights.carrier(weight, one_stage, self.tile[1:]),
            rows,
            gathered,
            self.output(output),
            gate,
            scales,
            node_tensors,
            counters,
            self.gradient(gradient),
        ).launch(
            grid=[grid, 1, 1],
            block=[self.config.threads, 1, 1],
            cluster=[self.cluster, 1, 1],
            min_blocks_per_mp=self.config.ctas_per_sm,
            preferred_smem_carveout=100,  # else the compiler asks a driver
            stream=stream,
        )

    def output(self, output: Output) -> Output:
        """The outputs as arguments of the kernel."""
        maps = {"out_map": map_carrier(output.out_map)}
        if self.problem.stored:
            maps["h_map"] = map_carrier(output.h_map)
        return output._replace(**maps)

    def gradient(self, gradient: Gradient | None) -> Gradient | None:
        """An activation's gradient as an argument of the kernel."""
        if gradient is None:
            return None
        maps = {name: getattr(gradient, name) for name in ("h_map", "grad_h_map")}
        maps = {name: map_carrier(tensor) for name, tensor in maps.items()}
        return gradient._replace(**maps)

    def stage_layouts(self):
        """The swizzled layouts of all stages of x and of weight."""
        k_major, weight_major = utils.LayoutEnum.ROW_MAJOR, WEIGHT_LAYOUT[self.problem.weight.major]
        return (
            sm90.make_smem_layout_a(k_major, self.tile, self.element, self.stages),
            sm90.make_smem_layout_b(weight_major, self.tile, self.element, self.stages),
        )

    def storage(self):
        tile_m, tile_n, tile_k = self.tile
        per_stage_row = tile_k * self.stages
        words = self.config.table_words(self.problem)
        scale_words = self.config.scale_words(self.problem)
        scale_words *= self.config.scale_boxes(self.problem)
        staging_bytes = self.config.staging_bytes(self.problem)
        slice_barriers = self.config.slice_barriers(self.problem)

        @cute.struct
        class Storage:
            x: cute.struct.Align[cute.struct.MemRange[self.element, tile_m * per_stage_row], 1024]
            weight: cute.struct.Align[
                cute.struct.MemRange[self.element, tile_n * per_stage_row], 1024
            ]
            staging: cute.struct.Align[cute.struct.MemRange[Uint8, staging_bytes], 1024]
            scales: cute.struct.Align[cute.struct.MemRange[Float32, scale_words], 128]
            full: cute.struct.MemRange[Int64, self.stages]
            empty: cute.struct.MemRange[Int64, self.stages]
            table: cute.struct.MemRange[Int32, words]
            loaded: cute.struct.MemRange[Int64, slice_barriers]

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
        counters: cute.Pointer | None,
        gradient: Gradient | None,
    ):
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)
        storage = utils.SmemAllocator().allocate(self.storage())
        self.ring.attach(storage.full.data_ptr(), storage.empty.data_ptr())
        self.units.attach(storage.table.data_ptr(), counters)
        if const_expr(self.scales is not None):
            self.scales.attach(storage.scales.data_ptr())

        if warp == 0:
            with cute.arch.elect_one():
                self.ring.init()
                for i in range_constexpr(self.config.slice_barriers(self.problem)):
                    cute.arch.mbarrier_init(storage.loaded.data_ptr() + i, 1)
            cute.arch.mbarrier_init_fence()
        if warp == 1:
            if rows.early == 0:
                wait_for_previous()
            self.units.start(rows)
        if warp == 2:
            cpasync.prefetch_descriptor(output.out_map)
            self.weights.prefetch_map(weight)
            if const_expr(self.config.tma_x):
                cpasync.prefetch_descriptor(gathered.x)
        self.sync_cluster()
        wait_for_previous()
        if thread == 0:
            launch_next()

        if group == 0:
            cute.arch.setmaxregister_decrease(self.config.producer_registers)
            if const_expr(self.config.tma_x):
                if warp >= 1 and warp <= self.producers // 32:  # the others have nothing to copy
                    self.x.attach(gathered)
                    if const_expr(self.scales is not None):
                        self.scales.attach_copies(scales, thread % 32)
                    self.load(weight, storage, warp)
            else:
                self.x.attach(gathered, thread)
                if const_expr(self.scales is not None):
                    self.scales.attach_copies(scales, thread, self.x)
                self.load(weight, storage, warp)
        else:
            cute.arch.setmaxregister_increase(self.config.consumer_registers)
            staging = storage.staging.data_ptr()
            if const_expr(gradient is not None):
                self.epilogue.target.attach_gradient(gradient, storage.loaded.data_ptr() + warp - 4)
            self.epilogue.attach(
                node_tensors, gate, gathered, output, staging, warp - 4, thread % 32
            )
            self.mma(storage, group - 1, thread - WARPGROUP)
        if const_expr(self.cluster > 1):
            self.sync_cluster()  # the other CTA still copies to, and arrives at, this one's memory

    def sync_cluster(self):
        if self.cluster > 1:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    @cute.jit
    def load(self, weight, storage, warp):
        """The producers' loop over tiles: fills the stages."""
        x_stages = cute.recast_ptr(storage.x.data_ptr(), dtype=Uint8)
        weight_stages = cute.recast_ptr(storage.weight.data_ptr(), dtype=Uint8)
        state = self.ring.producer()
        expert, row, rows, column, shared = self.units.read(Int32(0))
        self.x.fetch(row, rows)
        j = Int32(1)  # the CTA's unit after this one
        while expert >= 0:
            self.x.advance()
            if const_expr(self.scales is not None and not self.config.tma_x):
                self.scales.advance()
            next_expert, row, rows, next_column, next_shared = self.units.read(j)
            self.x.fetch(row, rows)
            j += 1
            if warp == 1:
                self.units.post(j)
            cute.arch.barrier(barrier_id=3, number_of_threads=self.producers)
            weight_map = self.weights.find_map(weight, expert)
            for k_tile in cutlass.range(self.k_tiles, unroll=1):
                self.ring.wait_empty(state)
                if warp == (1 if self.config.tma_x else 0):
                    with cute.arch.elect_one():
                        barrier = self.ring.expect(state, self.tma_bytes)
                        stage = weight_stages + state.index * self.weight_bytes
                        corner = (k_tile * self.tile[2], column, expert)
                        self.load_weight(stage, weight_map, corner, barrier, shared)
                        if const_expr(self.config.tma_x):
                            stage = x_stages + state.index * self.x_bytes
                            self.x.copy(stage, k_tile * self.tile[2], barrier)
                            if const_expr(self.scales is not None):
                                self.scales.load_x(state.index, k_tile, self.x.row[0], barrier)
                if const_expr(not self.config.tma_x):
                    self.x.copy(x_stages + state.index * self.x_bytes, k_tile)
                    if const_expr(self.scales is not None):
                        self.scales.copy(self.scale_box(state), k_tile, expert, column)
                    self.ring.arrive_when_copied(state)
                elif const_expr(self.scales is not None):
                    copies = warp == 2  # warp 1 loads the rest
                    if copies:
                        self.scales.copy_weights(state.index, k_tile, expert, column)
                        self.ring.arrive_when_copied(state)
                state.advance()
            expert, column, shared = next_expert, next_column, next_shared
        if const_expr(self.config.schedule is Schedule.DYNAMIC):
            self.units.finish(warp)

    def scale_box(self, state):
        """What tells where the scales along K of a k-tile are: its stage or, of spans, its number,
        counted over all tiles."""
        return state.count if self.config.scale_span > 1 else state.index

    @cute.jit
    def load_weight(self, stage, weight_map, corner, barrier, shared):
        """Starts the copies of a stage's weights; by one thread.

        shared: the cluster's CTAs need the same weights, so this one copies half of them to both.
        """
        columns = self.tile[1] // self.cluster
        if const_expr(self.cluster == 1):
            self.weights.copy(stage, weight_map, corner, columns, barrier)
        else:
            k, column, expert = corner
            half_bytes = self.weight_bytes // 2
            if shared != 0:
                rank = self.units.rank
                mine = (k, column + rank * columns, expert)
                self.weights.copy(
                    stage + rank * half_bytes, weight_map, mine, columns, barrier, Int16(3)
                )
            else:
                for i in range_constexpr(2):
                    half = (k, column + i * columns, expert)
                    self.weights.copy(stage + i * half_bytes, weight_map, half, columns, barrier)

    def operands(self, storage, consumer):
        """A consumer's MMA, and its views of all stages of x and of weight."""
        k_major = cute.nvgpu.OperandMajorMode.K
        weight_major = OPERAND_MAJOR[self.problem.weight.major]
        split = self.config.warpgroups_per_tile
        mma = sm90.make_trivial_tiled_mma(
            self.element, self.element, k_major, weight_major, sum_type(self.problem),
            (split, 1, 1), tiler_mn=(64, self.config.tile_n // self.parts),
        )  # fmt: skip
        stages = storage.x, storage.weight
        views = fragments(mma, stages, self.stage_layouts(), split, consumer)
        if self.problem.two_level:
            views = tuple(map(computed_once, views))
        return mma, *views

    @cute.jit
    def mma(self, storage, consumer, thread):
        """A consumer warpgroup's loop over tiles: main loop and epilogue.

        consumer: its number; thread: counted over all consumers.
        """
        mma, tCrA, tCrB = self.operands(storage, consumer)
        split = self.config.warpgroups_per_tile
        part = (64 * split, self.config.tile_n // self.parts)
        thread = thread % (split * WARPGROUP)
        acc, sums = make_sums(mma, self.tile[:2], part, thread, self.problem)
        two_level = self.problem.two_level
        scales, next_scales = (cute.make_rmem_tensor((self.scale_count,), Float32) for _ in (0, 1))

        last = self.k_tiles - 1
        runs = (0, max(last - LOAD_AHEAD, 0), last)  # the last k-tile follows after the loops
        state = self.ring.consumer()
        j, turn = Int32(0), 1  # the CTA's unit, and the distance to this consumer's next one
        if const_expr(self.config.pingpong):
            turn = 2
            if consumer == 1:
                self.pass_turn(consumer, j)
                j += 1
                state.advance(self.k_tiles)  # these stages are the other consumer's
        expert, row, rows, column, _ = self.units.read(j)
        while expert >= 0:
            self.epilogue.begin(row, rows, column)
            if const_expr(self.config.pingpong):
                cute.arch.barrier(barrier_id=1 + consumer, number_of_threads=2 * WARPGROUP)
            mma.set(warpgroup.Field.ACCUMULATE, False)
            if const_expr(two_level):
                sums.fill(0)
                self.take_stage(state, row, scales)
                for _ in cutlass.range(loop_steps(last), unroll=1):
                    following = state.clone()
                    following.advance()
                    take_next = partial(self.take_stage, following, row, next_scales)
                    self.add(mma, acc, sums, (tCrA, tCrB), state.index, scales, take_next)
                    mma.set(warpgroup.Field.ACCUMULATE, False)
                    for i in range_constexpr(self.scale_count):
                        scales[i] = next_scales[i]
                    state.advance()
                pass_turn = partial(self.pass_turn, consumer, j + 1)
                self.add(mma, acc, sums, (tCrA, tCrB), state.index, scales, after=pass_turn)
                self.epilogue.load(expert, column)
            else:
                behind = state.clone()  # the stage of the previous k-tile, which WGMMA still reads
                for run in range_constexpr(2):
                    for k_tile in cutlass.range(runs[run], runs[run + 1], unroll=1):
                        self.ring.wait_full(state)
                        self.issue(mma, acc, tCrA, tCrB, state.index)
                        mma.set(warpgroup.Field.ACCUMULATE, True)  # in this loop's own text
                        warpgroup.wait_group(1)
                        if k_tile > 0:
                            self.ring.release(behind.index)
                            behind.advance()
                        state.advance()
                    if const_expr(run == 0):
                        self.epilogue.load(expert, column)
                self.ring.wait_full(state)
                self.issue(mma, acc, tCrA, tCrB, state.index)
                if const_expr(self.config.pingpong):
                    self.pass_turn(consumer, j + 1)
                if const_expr(self.k_tiles > 1):
                    warpgroup.wait_group(1)
                    self.ring.release(behind.index)
                warpgroup.wait_group(0)
                self.ring.release(state.index)
            state.advance()
            if const_expr(self.config.pingpong):
                state.advance(self.k_tiles)
            self.epilogue.store(sums, expert, row, rows, column)
            j += turn
            expert, row, rows, column, _ = self.units.read(j)
        self.epilogue.finish()

    def take_stage(self, state, row, scales):
        """Waits until a stage is full, makes it visible to WGMMA and reads its scales.

        row: the tile's first.

        Two-level accumulation does so while WGMMA works on the stage before: otherwise all this
        would add to the time in which it has nothing to do.
        """
        self.ring.wait_full(state)
        if not self.config.tma_x:
            cute.arch.fence_view_async_shared()  # because cp.async wrote x by the generic proxy
        if self.scales is not None:
            skipped = row & 3 if self.config.tma_x else 0
            of_tile = self.scales.read(self.scale_box(state), skipped)
            read = self.epilogue.fragment.read_scales(*of_tile, self.scales.columns)
            for i, value in enumerate(read):
                scales[i] = value

    def add(self, mma, acc, sums, operands, stage, scales, take_next=None, after=None):
        """Adds a stage to two-level sums. scales: what `take_stage` read. take_next: takes the
        stage after it. after: called at the end of a tile, in ping-pong."""
        factor = None
        if self.scales is not None:
            read = [scales[i] for i in range(self.scale_count)]
            factor = self.epilogue.fragment.factors(read, self.scales.columns)

        def finished():
            cute.arch.sync_warp()  # all lanes have read their scales
            self.ring.release(stage)
            if after is not None and self.config.pingpong:
                after()

        add_products(mma, acc, sums, operands, stage, factor, take_next or (lambda: None), finished)

    @cute.jit
    def pass_turn(self, consumer, j):
        """Lets the other consumer start the main loop of the CTA's j-th unit, if there is one."""
        expert, _, _, _, _ = self.units.read(j)
        if expert >= 0:
            cute.arch.barrier_arrive(barrier_id=2 - consumer, number_of_threads=2 * WARPGROUP)

    def issue(self, mma, acc, tCrA, tCrB, stage):
        """Starts the WGMMAs of one stage."""
        begin_products(copied=not self.config.tma_x)
        issue(mma, acc, tCrA, tCrB, stage)
        warpgroup.commit_group()
