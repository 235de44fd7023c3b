"""The SM90 grouped GEMM template: persistent, warp-specialised, gathering."""

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils as utils
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Int64, Uint8, const_expr, range_constexpr
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.experimental import primitives as prims
from cutlass.pipeline import PipelineUserType

from emitters.device.epilogue.nodes import Epilogue
from emitters.device.gather import GatherIterator
from emitters.device.memory import ELEMENT
from emitters.device.scheduler import TileScheduler
from emitters.device.weights import (
    OPERAND_MAJOR,
    WEIGHT_LAYOUT,
    find_weight_map,
    make_out_map,
)
from emitters.spec.config_sm90 import K_TILE_BYTES, WARPGROUP, GemmSm90Config, Schedule
from emitters.spec.dtypes import Accumulation, DType
from emitters.spec.gemm import GemmProblem, WeightStorage
from emitters.spec.weight_map import weight_corners
from emitters.templates.parameters import gemm_arguments, gemm_tensor_maps

LOAD_AHEAD = 2  # k-steps before the last, under which the epilogue's operands are loaded


class GemmSm90:
    """out[r, :] = epilogue(x[index[r], :] @ weight[e(r)].T) for the rows r of all experts e.

    A CTA takes output tiles of tile_m x tile_n, one after the other. Roles and the pipeline
    between them:

      warps                       role             waits for   arrives at
      producer, warp 0, one lane  weights by TMA   empty[s]    full[s]: 1, with the box's bytes
      producer, 128 threads       x by cp.async    empty[s]    full[s]: 128, as the copies land
      consumers                   WGMMA, epilogue  full[s]     empty[s]: 1 a warp

    Consumers share a tile, 64 rows each; in ping-pong they take tiles in turn, and named barriers
    1 and 2 order their main loops as the stages are filled. In a cluster of two CTAs each loads
    half of the weights that both need and sends it to both: a stage is empty once the consumers
    of both CTAs have read it. The producer's warp 1 is the scheduler's; named barrier 3 makes its
    posts known to the producer, full[s] to the consumers.

    A stage holds 128 bytes of K: tile_m rows of x, then tile_n rows of weight, or of N-major ones
    its K rows of every 64 columns, both in the 128-byte swizzle. K's and N's tails are zeros: TMA
    fills what lies outside the tensor map, the gather fills its own.
    """

    def __init__(self, problem: GemmProblem, config: GemmSm90Config):
        self.problem, self.config = problem, config
        self.operand = ELEMENT[problem.x]
        self.sum_type = Int32 if problem.x is DType.INT8 else Float32
        self.tile = (config.tile_m, config.tile_n, config.k_tile(problem))
        self.k_tiles = config.k_tiles(problem)
        self.stages = config.pipeline_stages(problem)
        self.x_bytes = config.tile_m * K_TILE_BYTES
        self.weight_bytes = config.tile_n * K_TILE_BYTES
        self.smem_bytes, self.cluster = config.smem_bytes(problem), config.cluster
        self.scheduler = TileScheduler(problem, config)
        self.gather = GatherIterator(problem, config)
        self.epilogue = Epilogue(problem, config)

    def arguments(self):
        """Of `__call__`, before grid and stream."""
        return gemm_arguments(self.problem, self.config)

    def tensor_maps(self):
        return gemm_tensor_maps(self.problem, self.config)

    @cute.jit
    def __call__(
        self, weight, x, index, starts, ends, out, out_map, num_tokens, num_rows, early,
        gate_strides, node_tensors, counters, grid, stream,
    ):  # fmt: skip
        """weight: a [N, K, E] tensor, or the pointer to a table of E tensor maps. index is None
        where rows are taken in order. starts may be null, and counters is None but for a dynamic
        schedule: see TileScheduler. out_map: [16, N], stands for the output's tensor map.
        gate_strides is None but for a gated activation. early: not 0 where starts and ends are
        complete before the grid before this one is waited for; they are read then."""
        if const_expr(self.problem.weight.storage is WeightStorage.STACKED):
            # the atom reserves a parameter of 128 bytes: the host encodes the tensor map in it,
            # `load_weight` issues the copy
            _, layout = self.stage_layouts()
            one_stage = cute.slice_(layout, (None, None, 0))
            copy = cpasync.CopyBulkTensorTileG2SOp()
            weight, _ = cpasync.make_tiled_tma_atom(copy, weight, one_stage, self.tile[1:])
        out_map = make_out_map(self.problem, out_map)
        self.kernel(
            weight,
            x,
            index,
            starts,
            ends,
            out,
            out_map,
            num_tokens,
            num_rows,
            early,
            gate_strides,
            node_tensors,
            counters,
        ).launch(
            grid=[grid, 1, 1],
            block=[self.config.threads, 1, 1],
            cluster=[self.cluster, 1, 1],
            min_blocks_per_mp=self.config.ctas_per_sm,
            preferred_smem_carveout=100,  # given, so that the compiler need not ask a driver
            stream=stream,
        )

    def stage_layouts(self):
        """Of the stages of x and of weight: swizzled."""
        k_major, weight_major = utils.LayoutEnum.ROW_MAJOR, WEIGHT_LAYOUT[self.problem.weight.major]
        return (
            sm90.make_smem_layout_a(k_major, self.tile, self.operand, self.stages),
            sm90.make_smem_layout_b(weight_major, self.tile, self.operand, self.stages),
        )

    def storage(self):
        tile_m, tile_n, tile_k = self.tile
        per_stage_row = tile_k * self.stages
        words = self.config.table_words(self.problem)

        @cute.struct
        class Storage:
            x: cute.struct.Align[cute.struct.MemRange[self.operand, tile_m * per_stage_row], 1024]
            weight: cute.struct.Align[
                cute.struct.MemRange[self.operand, tile_n * per_stage_row], 1024
            ]
            staging: cute.struct.Align[cute.struct.MemRange[Uint8, self.config.staging_bytes], 1024]
            full: cute.struct.MemRange[Int64, self.stages]
            empty: cute.struct.MemRange[Int64, self.stages]
            table: cute.struct.MemRange[Int32, words]

        return Storage

    @cute.kernel
    def kernel(
        self,
        weight: cute.CopyAtom | cute.Pointer,
        x: cute.Pointer,
        index: cute.Pointer | None,
        starts: cute.Pointer,
        ends: cute.Pointer,
        out: cute.Pointer,
        out_map: cute.CopyAtom,
        num_tokens: Int32,
        num_rows: Int32,
        early: Int32,
        gate_strides: tuple | None,
        node_tensors: tuple | None,
        counters: cute.Pointer | None,
    ):
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)
        storage = utils.SmemAllocator().allocate(self.storage())
        full, empty = storage.full.data_ptr(), storage.empty.data_ptr()
        self.scheduler.attach(storage.table.data_ptr(), counters)

        if warp == 0:
            with cute.arch.elect_one():
                for stage in range_constexpr(self.stages):
                    cute.arch.mbarrier_init(full + stage, 1 + WARPGROUP)
                    cute.arch.mbarrier_init(
                        empty + stage, 4 * self.config.warpgroups_per_tile * self.cluster
                    )
            cute.arch.mbarrier_init_fence()
        if warp == 1:
            if early == 0:
                cute.arch.griddepcontrol_wait()
            self.scheduler.start(starts, ends, num_rows)
        if warp == 2:
            cpasync.prefetch_descriptor(out_map)
            if const_expr(self.problem.weight.storage is WeightStorage.STACKED):
                cpasync.prefetch_descriptor(weight)
        self.sync_cluster()
        cute.arch.griddepcontrol_wait()
        if thread == 0:
            cute.arch.griddepcontrol_launch_dependents()

        if group == 0:
            cute.arch.setmaxregister_decrease(self.config.producer_registers)
            self.gather.attach(x, index, num_tokens, thread)
            self.load(weight, storage, full, empty, warp)
        else:
            cute.arch.setmaxregister_increase(self.config.consumer_registers)
            staging = storage.staging.data_ptr()
            self.epilogue.attach(
                node_tensors, gate_strides, out, out_map, index, num_tokens, staging, warp - 4,
                thread % 32,
            )  # fmt: skip
            self.mma(storage, full, empty, group - 1, thread - WARPGROUP)
        if const_expr(self.cluster > 1):
            self.sync_cluster()  # the other CTA's copies and arrivals end here

    def sync_cluster(self):
        if self.cluster > 1:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    @cute.jit
    def load(self, weight, storage, full, empty, warp):
        """The producer warpgroup."""
        x_stages = cute.recast_ptr(storage.x.data_ptr(), dtype=Uint8)
        weight_stages = cute.recast_ptr(storage.weight.data_ptr(), dtype=Uint8)
        state = pipeline.make_pipeline_state(PipelineUserType.Producer, self.stages)
        rank = self.scheduler.rank
        expert, row, rows, column, shared = self.scheduler.read(Int32(0))
        self.gather.fetch(row, rows)
        j = Int32(1)  # the CTA's unit after this one
        while expert >= 0:
            self.gather.advance()
            next_expert, row, rows, next_column, next_shared = self.scheduler.read(j)
            self.gather.fetch(row, rows)
            j += 1
            if warp == 1:
                self.scheduler.post(j)
            cute.arch.barrier(barrier_id=3, number_of_threads=WARPGROUP)
            weight_map = find_weight_map(self.problem, weight, expert)
            for k_tile in cutlass.range(self.k_tiles, unroll=1):
                cute.arch.mbarrier_wait(empty + state.index, state.phase)
                if warp == 0:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(
                            full + state.index, self.weight_bytes
                        )
                        self.load_weight(
                            weight_stages + state.index * self.weight_bytes,
                            weight_map,
                            k_tile,
                            column,
                            expert,
                            full + state.index,
                            rank,
                            shared,
                        )
                self.gather.copy(x_stages + state.index * self.x_bytes, k_tile)
                cute.arch.cp_async_mbarrier_arrive_noinc(full + state.index)
                state.advance()
            expert, column, shared = next_expert, next_column, next_shared
        if const_expr(self.config.schedule is Schedule.DYNAMIC):
            self.scheduler.finish(warp)

    @cute.jit
    def load_weight(self, stage, weight_map, k_tile, column, expert, barrier, rank, shared):
        """tile_n rows of 128 bytes, by the calling thread: where shared, half of them to both."""
        k = k_tile * self.tile[2]
        if const_expr(self.cluster == 1):
            self.copy_boxes(stage, weight_map, k, column, expert, barrier, None)
        else:
            half, half_bytes = self.tile[1] // 2, self.weight_bytes // 2
            if shared != 0:
                self.copy_boxes(
                    stage + rank * half_bytes,
                    weight_map,
                    k,
                    column + rank * half,
                    expert,
                    barrier,
                    cutlass.Int16(3),
                )
            else:
                for i in range_constexpr(2):
                    self.copy_boxes(
                        stage + i * half_bytes,
                        weight_map,
                        k,
                        column + i * half,
                        expert,
                        barrier,
                        None,
                    )

    def copy_boxes(self, stage, weight_map, k, column, expert, barrier, ctas):
        """A CTA's share of a stage, from `column` on."""
        columns = self.tile[1] // self.cluster
        corners = weight_corners(self.problem, k, column, columns, expert)
        for i, corner in enumerate(corners):
            prims.cp_async_bulk_tensor_shared_cluster_global(
                (stage + i * (columns * K_TILE_BYTES // len(corners))).to_llvm_ptr(),
                weight_map.to_llvm_ptr(),
                [Int32(c) for c in corner],
                barrier.to_llvm_ptr(),
                [],
                multicast_mask=ctas,
            )

    @cute.jit
    def mma(self, storage, full, empty, consumer, thread):
        """A consumer warpgroup. consumer: which one; thread: within all of them."""
        k_major = cute.nvgpu.OperandMajorMode.K
        weight_major = OPERAND_MAJOR[self.problem.weight.major]
        split = self.config.warpgroups_per_tile
        mma = sm90.make_trivial_tiled_mma(
            self.operand, self.operand, k_major, weight_major, self.sum_type,
            (split, 1, 1), tiler_mn=(64, self.config.tile_n),
        )  # fmt: skip
        x_layout, weight_layout = self.stage_layouts()
        sA = storage.x.get_tensor(x_layout.outer, swizzle=x_layout.inner)
        sB = storage.weight.get_tensor(weight_layout.outer, swizzle=weight_layout.inner)
        group = mma.get_slice(cute.make_layout(split, stride=WARPGROUP)(consumer % split))
        tCrA = mma.make_fragment_A(group.partition_A(sA))
        tCrB = mma.make_fragment_B(group.partition_B(sB))
        shape = (
            mma.get_slice(thread % (split * WARPGROUP))
            .partition_C(cute.make_identity_tensor(self.tile[:2]))
            .shape
        )
        acc = cute.make_rmem_tensor(shape, self.sum_type)
        k_blocks = cute.size(tCrA, mode=[2])
        two_level = self.problem.accumulation is Accumulation.TWO_LEVEL
        sums = acc
        if const_expr(two_level):
            sums = cute.make_rmem_tensor(shape, self.sum_type)

        last = self.k_tiles - 1
        steps = (0, max(last - LOAD_AHEAD, 0), last)  # the last one is apart
        state = pipeline.make_pipeline_state(PipelineUserType.Consumer, self.stages)
        j, turn = Int32(0), 1  # the CTA's unit, and how far it is to this consumer's next
        if const_expr(self.config.pingpong):
            turn = 2
            if consumer == 1:
                self.pass_turn(consumer, j)
                j += 1
                state.advance(self.k_tiles)  # the other consumer's
        expert, row, rows, column, _ = self.scheduler.read(j)
        while expert >= 0:
            self.epilogue.begin(row, rows)
            if const_expr(self.config.pingpong):
                cute.arch.barrier(barrier_id=1 + consumer, number_of_threads=2 * WARPGROUP)
            behind = state.clone()  # the stage of the k-step before: WGMMA still reads it
            if const_expr(two_level):
                sums.fill(0)
            mma.set(warpgroup.Field.ACCUMULATE, False)
            for part in range_constexpr(2):
                for k_tile in cutlass.range(steps[part], steps[part + 1], unroll=1):
                    cute.arch.mbarrier_wait(full + state.index, state.phase)
                    self.issue(mma, acc, tCrA, tCrB, state.index, k_blocks)
                    if const_expr(two_level):
                        warpgroup.wait_group(0)
                        self.release(empty + state.index)
                        self.promote(acc, sums)
                        mma.set(warpgroup.Field.ACCUMULATE, False)
                    else:
                        warpgroup.wait_group(1)
                        if k_tile > 0:
                            self.release(empty + behind.index)
                            behind.advance()
                    state.advance()
                if const_expr(part == 0):
                    self.epilogue.load(expert, column)
            cute.arch.mbarrier_wait(full + state.index, state.phase)
            self.issue(mma, acc, tCrA, tCrB, state.index, k_blocks)
            if const_expr(self.config.pingpong):
                self.pass_turn(consumer, j + 1)
            if const_expr(not two_level and self.k_tiles > 1):
                warpgroup.wait_group(1)
                self.release(empty + behind.index)
            warpgroup.wait_group(0)
            if const_expr(two_level):
                self.promote(acc, sums)
            self.release(empty + state.index)
            state.advance()
            if const_expr(self.config.pingpong):
                state.advance(self.k_tiles)
            self.epilogue.store(sums, expert, row, rows, column)
            j += turn
            expert, row, rows, column, _ = self.scheduler.read(j)
        self.epilogue.finish()

    @cute.jit
    def pass_turn(self, consumer, j):
        """Lets the other consumer start the main loop of the CTA's j-th unit, if there is one."""
        expert, _, _, _, _ = self.scheduler.read(j)
        if expert >= 0:
            cute.arch.barrier_arrive(barrier_id=2 - consumer, number_of_threads=2 * WARPGROUP)

    def issue(self, mma, acc, tCrA, tCrB, stage, k_blocks):
        """Starts the WGMMAs of one stage."""
        cute.arch.fence_view_async_shared()  # x was written through the generic proxy
        warpgroup.fence()
        for k_block in range(k_blocks):
            cute.gemm(
                mma, acc, tCrA[None, None, k_block, stage], tCrB[None, None, k_block, stage], acc
            )
            mma.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()

    def promote(self, acc, sums):
        for i in range(cute.size(acc)):
            sums[i] = sums[i] + acc[i]

    @cute.jit
    def release(self, barrier):
        if const_expr(self.cluster == 1):
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(barrier)
        else:
            lane = cute.arch.lane_idx()
            if lane < self.cluster:
                cute.arch.mbarrier_arrive(barrier, lane)
