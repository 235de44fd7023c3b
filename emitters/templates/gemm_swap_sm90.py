"""The SM90 grouped GEMM template for few rows an expert: weights are WGMMA's M operand."""

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
import cutlass.utils as utils
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Int64, Uint8, const_expr, range_constexpr
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.experimental import primitives as prims
from cutlass.pipeline import PipelineUserType

from emitters.device.epilogue.nodes import CHUNK, Epilogue
from emitters.device.gather import GatherIterator
from emitters.device.memory import ELEMENT, GMEM, SMEM, VECTOR, vector
from emitters.device.scheduler import TileScheduler
from emitters.device.weights import (
    OPERAND_MAJOR,
    WEIGHT_LAYOUT,
    find_weight_map,
    make_out_map,
)
from emitters.spec.config_sm90 import K_TILE_BYTES, WARPGROUP, GemmSwapSm90Config
from emitters.spec.dtypes import Accumulation, DType
from emitters.spec.gemm import GemmProblem, Major, WeightStorage
from emitters.spec.weight_map import weight_corners
from emitters.templates.parameters import gemm_arguments, gemm_tensor_maps

_EVICT_FIRST = 0x12F0000000000000  # the L2 policy that createpolicy makes of evict_first


class SwapFragment:
    """Which part of a tile a consumer thread's accumulator holds, WGMMA's M being columns.

    Of every 64 columns a thread has two, 8 apart, and of every 8 rows two neighbours: register
    4 * block + 2 * half + c of a part is row 8 * block + lane % 4 * 2 + c, column 8 * half +
    lane / 4 of the warp's 16. Part `part` of the m-th 64 columns has `part_rows` rows. Where gated,
    the halves are gate and up of the warp's 8 outputs; of N-major weights the 64 columns are, whose
    registers `register` has in that order.

    What belongs to rows is read by one lane a row, and passed on by shuffles.
    """

    def __init__(self, problem: GemmProblem, config: GemmSwapSm90Config, warp: Int32, lane: Int32):
        self.lane = lane
        self.gated = problem.gated
        self.by_blocks = problem.gated and problem.weight.major is Major.N  # gate and up
        self.warp_column = warp * (16 if self.by_blocks else config.warp_columns(problem))
        self.block_columns = (1 if self.by_blocks else 4) * config.warp_columns(problem)
        self.m_registers = config.tile_m // 2
        self.strides = None  # of a gated problem's channels: see `gate_strides`
        self.m_blocks = config.tile_n // 64  # of WGMMA's M
        self.part_rows = config.part_rows
        self.part_blocks = config.part_rows // 8
        self.n, self.out_columns = problem.n, problem.out_columns
        self.has_n_tail = problem.n % config.tile_n != 0
        self.token_count = -(-config.tile_m // 32)
        self.channel_count = config.tile_n // 32

    def register(self, i: int) -> int:
        """Of the accumulators, which is the i-th where halves are gate and up."""
        if not self.by_blocks:
            return i
        m, rest = divmod(i, self.m_registers)
        half = rest // 2 % 2
        return half * self.m_registers + rest + 2 * (m - half)

    def token_row(self, i: int):
        """Row of the tile whose token a thread reads as its i-th."""
        return self.lane + 32 * i

    def by_row(self, values: cute.Tensor, m: int, part: int):
        """values[token_count] -> for each register of a part, its row's."""
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
        """values[channel_count] -> for each register of a part, its column's."""
        return [values[2 * m + i // 2 % 2] for i in range(4 * self.part_blocks)]

    def gate_pairs(self, count: int) -> list[tuple[int, int]]:
        """Of `count` registers of a part, those of gate and up for each output."""
        return [(i, i + 2) for block in range(0, count, 4) for i in range(block, block + 2)]

    @cute.jit
    def read_channels(
        self,
        pointer: cute.Pointer,
        values: cute.Tensor,
        first: cutlass.Constexpr,
        expert: Int32,
        first_column: Int32,
    ):
        """[E, N] values of the thread's columns from its `first` on; past N none are read."""
        table = cute.make_tensor(pointer, cute.make_layout(VECTOR))
        for i in range_constexpr(cute.size(values)):
            block, half = (first + i) // 2, (first + i) % 2
            block_column = first_column + self.block_columns * block + self.warp_column
            column = block_column + (0 if self.gated else 8 * half) + self.lane // 4
            at = column
            if const_expr(self.gated):
                at = column * self.strides[0] + half * self.strides[1]
            value = pointer.dtype(0)
            if const_expr(self.has_n_tail):
                if column < self.out_columns:
                    value = table[expert * self.n + at]
            else:
                value = table[expert * self.n + at]
            values[i] = value


class SwapEpilogue(Epilogue):
    """Parts go through staging rows of the warp's own, transposed: a row is the warp's 16 columns,
    whole sectors of 32 bytes in global memory, or 8 where gated. No other warp is waited for."""

    def __init__(self, problem: GemmProblem, config: GemmSwapSm90Config):
        self.problem, self.config = problem, config
        self.element = ELEMENT[problem.out]
        self.parts = config.tile_m // config.part_rows
        self.pitch = config.staging_pitch(problem)
        self.staging_bytes = config.staging_bytes(problem) // 4

    def make_fragment(self, warp: Int32, lane: Int32):
        return SwapFragment(self.problem, self.config, warp, lane)

    @cute.jit
    def put(
        self,
        m: cutlass.Constexpr,
        part: cutlass.Constexpr,
        values: cute.Tensor,
        first_row: Int32,
        rows: Int32,
        first_column: Int32,
    ):
        cute.arch.sync_warp()  # the part before has left the staging rows
        self.stage(values)
        cute.arch.sync_warp()
        skipped = part * self.config.part_rows
        column = first_column + m * self.fragment.block_columns
        self.copy_out(first_row + skipped, rows - skipped, column)

    @cute.jit
    def stage_matrices(self, values: cute.Tensor, first: cutlass.Constexpr):
        """16-bit outputs: a part's blocks of 8 rows and 8 columns in one stmatrix."""
        count = cute.size(values)
        halves = self.config.warp_columns(self.problem) // 8
        packed = cute.make_rmem_tensor((count,), self.element)
        packed.store(values.load().to(self.element))
        words = cute.recast_tensor(packed, Int32)
        row = self.lane % 8
        if const_expr(self.config.part_rows == 16):
            row += self.lane // (8 * halves) * 8
        target = self.staging + (row * self.pitch + self.lane // 8 % halves * 16)
        prims.stmatrix(
            target.to_llvm_ptr(), [words[i] for i in range(count // 2)], prims.MMALayout.COL
        )

    @cute.jit
    def stage_words(self, values: cute.Tensor, first: cutlass.Constexpr):
        """float32 outputs."""
        for i in range_constexpr(cute.size(values)):
            halves = self.config.warp_columns(self.problem) // 8
            row = i // (2 * halves) * 8 + self.lane % 4 * 2 + i % 2
            column = i // 2 % halves * 8 + self.lane // 4
            word = vector(self.staging + (row * self.pitch + column * 4), Float32, 1, SMEM)
            word[0] = values[i]

    @cute.jit
    def copy_out(self, first_row: Int32, rows: Int32, first_column: Int32):
        f = self.fragment
        chunks = self.config.warp_columns(self.problem) * self.problem.out.bytes // CHUNK
        chunk = self.lane % chunks
        column = first_column + f.warp_column + chunk * (CHUNK // self.problem.out.bytes)
        for i in range_constexpr(-(-f.part_rows * chunks // 32)):
            row = self.lane // chunks + i * (32 // chunks)
            store = row < rows
            if const_expr(f.part_rows * chunks < 32):
                store = store and row < f.part_rows
            if const_expr(f.has_n_tail):
                store = store and column < f.out_columns
            if store:
                source = self.staging + (row * self.pitch + chunk * CHUNK)
                words = cute.make_rmem_tensor((4,), Int32)
                cute.autovec_copy(vector(source, Int32, 4, SMEM), words)
                target = self.out + (Int64(first_row + row) * f.out_columns + column)
                cute.autovec_copy(words, vector(target, Int32, 4, GMEM))


class GemmSwapSm90:
    """out[r, :] = epilogue(x[index[r], :] @ weight[e(r)].T) for the rows r of all experts e.

    A CTA takes output tiles of tile_m rows x tile_n columns, one after the other; with split_k > 1
    a cluster does, each CTA with its share of K. Roles and the barriers between them:

      warps                  role             waits for    arrives at
      1, one lane            weights by TMA   empty[s]     full[s]: 1, with the boxes' bytes
      gather_threads / 32    x by cp.async    empty[s]     full[s]: 1 a thread, as copies land
      consumer warpgroup     WGMMA, epilogue  full[s]      empty[s]: 1 a warp
        of a cluster's rest  sends its sums   sums_empty   sums_full of CTA 0: their bytes
        of its CTA 0         adds them        sums_full    sums_empty of the others: 1 a warp

    A stage holds k_boxes times 128 bytes of K: for each box tile_n rows of weight, or of N-major
    ones its K rows of every 64 columns, and tile_m rows of x, in the 128-byte swizzle. K's and N's
    tails are zeros: TMA fills what lies outside the tensor map, the gather fills its own. Weights
    do not wait for the index: a warp of their own fills the stages, and if `early` does not wait
    for the grid before this one either.
    """

    def __init__(self, problem: GemmProblem, config: GemmSwapSm90Config):
        self.problem, self.config = problem, config
        self.operand = ELEMENT[problem.x]
        self.sum_type = Int32 if problem.x is DType.INT8 else Float32
        self.tile = (config.tile_n, config.tile_m, config.k_tile(problem))
        self.stages = config.pipeline_stages(problem)
        self.x_bytes = config.tile_m * K_TILE_BYTES  # of one box
        self.weight_bytes = config.tile_n * K_TILE_BYTES
        self.smem_bytes, self.cluster = config.smem_bytes(problem), config.cluster
        self.scheduler = TileScheduler(problem, config)
        self.gather = GatherIterator(problem, config)
        self.epilogue = SwapEpilogue(problem, config)

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
        where rows are taken in order. starts may be null, see TileScheduler. out_map, which the
        other template stores through, is not used; counters is None. early: not 0 where starts and
        ends are complete before the grid before this one is waited for; weights are loaded then."""
        if const_expr(self.problem.weight.storage is WeightStorage.STACKED):
            # the atom reserves a parameter of 128 bytes: the host encodes the tensor map in it,
            # `load_weight` issues the copies
            layout, _ = self.stage_layouts()
            one_box = cute.slice_(layout, (None, None, 0))
            copy = cpasync.CopyBulkTensorTileG2SOp()
            box = (self.tile[0], self.tile[2])
            weight, _ = cpasync.make_tiled_tma_atom(copy, weight, one_box, box)
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
        ).launch(
            grid=[grid, 1, 1],
            block=[self.config.threads, 1, 1],
            cluster=[self.config.split_k, 1, 1],
            min_blocks_per_mp=self.config.ctas_per_sm,
            preferred_smem_carveout=100,  # given, so that the compiler need not ask a driver
            stream=stream,
        )

    def stage_layouts(self):
        """Of the boxes of weight and of x: swizzled."""
        k_major, weight_major = utils.LayoutEnum.ROW_MAJOR, WEIGHT_LAYOUT[self.problem.weight.major]
        boxes = self.stages * self.config.k_boxes
        return (
            sm90.make_smem_layout_a(weight_major, self.tile, self.operand, boxes),
            sm90.make_smem_layout_b(k_major, self.tile, self.operand, boxes),
        )

    def storage(self):
        columns, rows, tile_k = self.tile
        per_row = tile_k * self.stages * self.config.k_boxes
        words = self.config.table_words(self.problem)
        staging_bytes = self.config.staging_bytes(self.problem)
        partial_bytes = self.config.partial_bytes

        @cute.struct
        class Storage:
            weight: cute.struct.Align[cute.struct.MemRange[self.operand, columns * per_row], 1024]
            x: cute.struct.Align[cute.struct.MemRange[self.operand, rows * per_row], 1024]
            partial: cute.struct.Align[cute.struct.MemRange[Uint8, partial_bytes], 16]
            staging: cute.struct.Align[cute.struct.MemRange[Uint8, staging_bytes], 16]
            full: cute.struct.MemRange[Int64, self.stages]
            empty: cute.struct.MemRange[Int64, self.stages]
            sums: cute.struct.MemRange[Int64, 2]
            table: cute.struct.MemRange[Int32, words]
            tiles: cute.struct.MemRange[Int32, 1]

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
    ):
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = utils.SmemAllocator().allocate(self.storage())
        full, empty = storage.full.data_ptr(), storage.empty.data_ptr()
        sums = storage.sums.data_ptr()
        split = self.config.split_k
        self.scheduler.attach(storage.table.data_ptr(), None)
        tiles = storage.tiles.get_tensor(cute.make_layout(1))

        weight_warp = (WARPGROUP + self.config.gather_threads) // 32
        if warp == weight_warp:
            if early == 0:
                cute.arch.griddepcontrol_wait()
            count = self.scheduler.build(starts, ends, num_rows)
            if cute.arch.lane_idx() == 0:
                tiles[0] = count
        if warp == 0:
            with cute.arch.elect_one():
                for stage in range_constexpr(self.stages):
                    cute.arch.mbarrier_init(full + stage, 1 + self.config.gather_threads)
                    cute.arch.mbarrier_init(empty + stage, 4)
                if const_expr(split > 1):
                    cute.arch.mbarrier_init(sums, 1)
                    cute.arch.mbarrier_init(sums + 1, 4)
            cute.arch.mbarrier_init_fence()
            if const_expr(self.problem.weight.storage is WeightStorage.STACKED):
                cpasync.prefetch_descriptor(weight)
        if const_expr(split > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

        if warp != weight_warp:  # x, index, scales and out may still be the grid before's
            cute.arch.griddepcontrol_wait()
            if thread == 0:
                cute.arch.griddepcontrol_launch_dependents()
        if warp < 4:
            staging = storage.staging.data_ptr()
            self.epilogue.attach(
                node_tensors, gate_strides, out, None, index, num_tokens, staging, warp, thread % 32
            )
            self.mma(storage, full, empty, sums, thread)
        elif warp < weight_warp:
            self.gather.attach(x, index, num_tokens, thread % WARPGROUP)
            self.load_x(storage, full, empty)
        else:
            self.load_weights(weight, storage, full, empty)
        if const_expr(split > 1):  # others may still write to this CTA's shared memory
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    def share(self, storage):
        """-> first tile, end and step of this CTA's or cluster's."""
        block, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        end = storage.tiles.get_tensor(cute.make_layout(1))[0]
        self.scheduler.stop[0] = end
        return block // self.config.split_k, end, grid // self.config.split_k

    def k_range(self):
        """First and last + 1 of the stages of K that this CTA takes."""
        steps, split = self.config.k_steps(self.problem), self.config.split_k
        if split == 1:
            return Int32(0), Int32(steps)
        rank = cute.arch.block_idx_in_cluster()
        return rank * steps // split, (rank + 1) * steps // split

    @cute.jit
    def load_weights(self, weight, storage, full, empty):
        """The weights' warp."""
        stages = cute.recast_ptr(storage.weight.data_ptr(), dtype=Uint8)
        boxes = self.config.k_boxes
        tile, end, step = self.share(storage)
        first_k, end_k = self.k_range()
        state = pipeline.make_pipeline_state(PipelineUserType.Producer, self.stages)
        while tile < end:
            expert, _, _, column, _ = self.scheduler.locate(tile)
            weight_map = find_weight_map(self.problem, weight, expert)
            for k in cutlass.range(first_k, end_k, unroll=1):
                cute.arch.mbarrier_wait(empty + state.index, state.phase)
                with cute.arch.elect_one():
                    barrier = full + state.index
                    cute.arch.mbarrier_arrive_and_expect_tx(barrier, self.weight_bytes * boxes)
                    for i in range_constexpr(boxes):
                        self.load_weight(
                            stages + (state.index * boxes + i) * self.weight_bytes,
                            weight_map,
                            (k * boxes + i) * self.tile[2],
                            column,
                            expert,
                            barrier,
                        )
                state.advance()
            tile += step

    def load_weight(self, stage, weight_map, k, column, expert, barrier):
        """128 bytes of K from element k on, at `column`, by the calling thread."""
        corners = weight_corners(self.problem, k, column, self.tile[0], expert)
        for i, corner in enumerate(corners):
            prims.cp_async_bulk_tensor_shared_cluster_global(
                (stage + i * (self.weight_bytes // len(corners))).to_llvm_ptr(),
                weight_map.to_llvm_ptr(),
                [Int32(c) for c in corner],
                barrier.to_llvm_ptr(),
                [],
                l2_cache_hint=Int64(_EVICT_FIRST) if self.config.evict_first else None,
            )

    @cute.jit
    def load_x(self, storage, full, empty):
        """The gather's warps."""
        stages = cute.recast_ptr(storage.x.data_ptr(), dtype=Uint8)
        boxes = self.config.k_boxes
        tile, end, step = self.share(storage)
        first_k, end_k = self.k_range()
        state = pipeline.make_pipeline_state(PipelineUserType.Producer, self.stages)
        _, row, rows, _, _ = self.scheduler.locate(tile)
        self.gather.fetch(row, rows)
        while tile < end:
            self.gather.advance()
            tile += step
            _, row, rows, _, _ = self.scheduler.locate(tile)
            self.gather.fetch(row, rows)
            for k in cutlass.range(first_k, end_k, unroll=1):
                cute.arch.mbarrier_wait(empty + state.index, state.phase)
                for i in range_constexpr(boxes):
                    stage = stages + (state.index * boxes + i) * self.x_bytes
                    self.gather.copy(stage, k * boxes + i)
                cute.arch.cp_async_mbarrier_arrive_noinc(full + state.index)
                state.advance()

    @cute.jit
    def mma(self, storage, full, empty, sums_full, thread):
        """The consumer warpgroup."""
        k_major = cute.nvgpu.OperandMajorMode.K
        weight_major = OPERAND_MAJOR[self.problem.weight.major]
        mma = sm90.make_trivial_tiled_mma(
            self.operand, self.operand, weight_major, k_major, self.sum_type, (1, 1, 1),
            tiler_mn=(64, self.config.tile_m),
        )  # fmt: skip
        weight_layout, x_layout = self.stage_layouts()
        sA = storage.weight.get_tensor(weight_layout.outer, swizzle=weight_layout.inner)
        sB = storage.x.get_tensor(x_layout.outer, swizzle=x_layout.inner)
        group = mma.get_slice(0)
        tCrA = mma.make_fragment_A(group.partition_A(sA))
        tCrB = mma.make_fragment_B(group.partition_B(sB))
        shape = mma.get_slice(thread).partition_C(cute.make_identity_tensor(self.tile[:2])).shape
        acc = cute.make_rmem_tensor(shape, self.sum_type)
        two_level = self.problem.accumulation is Accumulation.TWO_LEVEL
        sums = acc
        if const_expr(two_level):
            sums = cute.make_rmem_tensor(shape, self.sum_type)

        tile, end, step = self.share(storage)
        first_k, end_k = self.k_range()
        state = pipeline.make_pipeline_state(PipelineUserType.Consumer, self.stages)
        cluster_state = pipeline.make_pipeline_state(PipelineUserType.Consumer, 1)
        while tile < end:
            expert, row, rows, column, _ = self.scheduler.locate(tile)
            self.epilogue.begin(row, rows)
            if const_expr(two_level):
                sums.fill(0)
            mma.set(warpgroup.Field.ACCUMULATE, False)
            for k in cutlass.range(first_k, end_k, unroll=1):
                cute.arch.mbarrier_wait(full + state.index, state.phase)
                self.multiply(mma, acc, tCrA, tCrB, state.index, sums)
                mma.set(warpgroup.Field.ACCUMULATE, not two_level)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(empty + state.index)
                state.advance()
                if k == first_k:  # what the index and the first weights took hides this
                    self.epilogue.load(expert, column)
            if const_expr(self.config.split_k > 1):
                rank = cute.arch.block_idx_in_cluster()
                partial = storage.partial.data_ptr()
                if rank == 0:
                    self.add_sums(sums, partial, sums_full, cluster_state.phase, thread)
                    self.epilogue.store(sums, expert, row, rows, column)
                else:
                    self.send_sums(sums, partial, sums_full, cluster_state.phase, rank, thread)
                cluster_state.advance()
            else:
                self.epilogue.store(sums, expert, row, rows, column)
            tile += step

    def multiply(self, mma, acc, tCrA, tCrB, stage, sums):
        """One stage, to its end; with two-level accumulation each 128 bytes of K to its own."""
        two_level = self.problem.accumulation is Accumulation.TWO_LEVEL
        cute.arch.fence_view_async_shared()  # x was written through the generic proxy
        warpgroup.fence()
        for i in range(self.config.k_boxes):
            box = stage * self.config.k_boxes + i
            for k_block in range(cute.size(tCrA, mode=[2])):
                a, b = tCrA[None, None, k_block, box], tCrB[None, None, k_block, box]
                cute.gemm(mma, acc, a, b, acc)
                mma.set(warpgroup.Field.ACCUMULATE, True)
            if two_level:
                warpgroup.commit_group()
                warpgroup.wait_group(0)
                for j in range(cute.size(acc)):
                    sums[j] = sums[j] + acc[j]
                mma.set(warpgroup.Field.ACCUMULATE, False)
                warpgroup.fence()
        if not two_level:
            warpgroup.commit_group()
            warpgroup.wait_group(0)

    @cute.jit
    def send_sums(self, sums, partial, sums_full, phase, rank, thread):
        """To the cluster's CTA 0, when it has added those of the tile before."""
        cute.arch.mbarrier_wait(sums_full + 1, phase ^ 1)
        words = cute.recast_tensor(sums, Int32)
        for i in range_constexpr(cute.size(sums) // 4):
            target = self.partial_vector(partial, rank - 1, i, thread, Int32)
            values = tuple(words[4 * i + j] for j in range(4))
            cute.arch.store_async_dsmem(target.iterator, values, sums_full, 0)

    @cute.jit
    def add_sums(self, sums, partial, sums_full, phase, thread):
        """Those of the cluster's other CTAs, in their order."""
        if thread == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(sums_full, self.config.partial_bytes)
        cute.arch.mbarrier_wait(sums_full, phase)
        for peer in range_constexpr(self.config.split_k - 1):
            for i in range_constexpr(cute.size(sums) // 4):
                part = self.partial_vector(partial, peer, i, thread, self.sum_type)
                for j in range_constexpr(4):
                    sums[4 * i + j] = sums[4 * i + j] + part[j]
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            for peer in range_constexpr(1, self.config.split_k):
                cute.arch.mbarrier_arrive(sums_full + 1, peer)

    def partial_vector(self, partial, peer, i, thread, element):
        """Four sums of a thread, as the CTA after `peer` sends them."""
        share = self.config.tile_m * self.config.tile_n * 4
        at = partial + (peer * share + i * (WARPGROUP * 16) + thread * 16)
        return vector(at, element, 4, SMEM)
