"""The SM90 grouped weight gradient: persistent CTAs, warps with roles, one operand gathered."""

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int16, Int32, Int64, Uint8, const_expr, range_constexpr
from cutlass.cute.nvgpu import warpgroup
from cutlass.experimental import primitives as prims

from emitters.device.epilogue.slices import Slices
from emitters.device.gather import GatherIterator
from emitters.device.mainloop_sm90 import begin_products, fragments, issue
from emitters.device.memory import ELEMENT, VECTOR, map_carrier, tensor_map_address
from emitters.device.parameters import Gathered
from emitters.device.ring import Ring
from emitters.spec.image import TensorMapBox
from emitters.spec.staged_sm90 import K_TILE_BYTES, SLICE_BYTES, SLICE_ROWS, WARPGROUP
from emitters.spec.weight_grad import (
    BLOCK,
    RAGGED_ROWS,
    STEP_ROWS,
    Side,
    WeightGradProblem,
    WeightGradSm90Config,
)
from emitters.templates.parameters import ABSENT, integer, pointer, several, tensor_map

SLICE = SLICE_ROWS * SLICE_BYTES  # bytes of a slice
BLOCK_BYTES = STEP_ROWS * K_TILE_BYTES  # of 64 columns of an operand in a stage


class WeightGradSm90:
    """Writes the kernel of a grouped weight gradient.

      out[e] = sum over the rows r of expert e of left[r].T @ right[r]

    A unit of work is a tile of tile_m x tile_n of an expert's result. Their number is known when
    the kernel is compiled; how many rows a unit sums is read from `offsets`. Of C CTAs, the c-th
    computes units c, c + C, c + 2 C, ... Warpgroup 0 is the producer, the other two are consumers.
    A stage s of the ring holds 64 rows of both operands:

      role                       work                     waits for   arrives at
      producer, warp 0, 1 lane   operands in order, TMA   empty[s]    full[s]: 1, and their bytes
      producer, 128 threads      gathered one, cp.async   empty[s]    full[s]: 128, as copies land
      consumers                  WGMMA, stores            full[s]     empty[s]: 1 per warp

      full[s] completes after 1 arrival and the bytes of the operands in order, and 128 more if one
      is gathered; empty[s] after 8, in ping-pong after 4, times the CTAs of the cluster.

    Consumers share a tile, tile_m / 2 rows each, or take whole tiles in ping-pong, as in `GemmSm90`
    (named barriers 1 and 2).

    - Both operands are MN-major: for every 64 columns a stage has 64 rows of 128 bytes, in the
      128-byte swizzle. Rows past the expert's end, and those with an index outside [0, T), are
      zeros. An operand in order has a tensor map of four dimensions for that, see `ragged_view`.
    - In a cluster of two, which then counts as one of the C, a unit is two neighbouring tiles. Each
      CTA loads half of the operand in order that they share and sends it to both. A stage is empty
      once the consumers of both CTAs have read it.
    - Results leave in slices of 16 rows x 128 bytes, each by one TMA store of its warp. The tensor
      map of out [E, M, N] cuts off what lies past M and N. An expert without rows gets zeros.
    - To add to out, a warp loads slices of it by TMA before and after the main loop, `buffers` at a
      time, adds to them in shared memory, and stores them from there. Barrier loaded[b] of a warp
      completes when the slice in its b-th buffer has come.
    """

    def __init__(self, problem: WeightGradProblem, config: WeightGradSm90Config):
        self.problem, self.config = problem, config
        self.element = ELEMENT[problem.operand]
        self.tile = (config.tile_m, config.tile_n, STEP_ROWS)
        self.m_units, self.n_units = config.unit_grid(problem)
        self.units = config.units(problem)
        self.stages, self.buffers = config.pipeline_stages(problem), config.buffers(problem)
        self.smem_bytes, self.cluster = config.smem_bytes(problem), config.cluster
        row_bytes = problem.operand.bytes * STEP_ROWS
        self.left_bytes, self.right_bytes = row_bytes * config.tile_m, row_bytes * config.tile_n
        self.gathers = problem.gathered is not None
        self.ordered_bytes = self.left_bytes + self.right_bytes
        if self.gathers:
            left = problem.gathered is Side.LEFT
            self.ordered_bytes -= self.left_bytes if left else self.right_bytes
            columns = problem.gathered_columns
            self.gather = GatherIterator(True, columns * problem.operand.bytes, STEP_ROWS)
        arrivals = 1 + (WARPGROUP if self.gathers else 0)
        self.ring = Ring(self.stages, arrivals, 4 * config.warpgroups_per_tile, self.cluster)
        self.slice_columns = SLICE_BYTES // problem.out.bytes
        self.slice_count = config.slices(problem)
        self.slices = Slices(problem.out)

    def arguments(self):
        """The arguments of `__call__`, except grid and stream."""
        p = self.problem
        operands = {
            side: tensor_map(side.value, self.element, (SLICE_ROWS, columns), (1, 0))
            for side, columns in ((Side.LEFT, p.m), (Side.RIGHT, p.n))
        }
        gathered = ABSENT
        if p.gathered is not None:
            operands[p.gathered] = ABSENT
            gathered = several(
                pointer(p.gathered.value, Uint8, 16),
                pointer("index", Int32, 4),
                integer("num_tokens"),
                integer("gathered_stride"),
                kind=Gathered,
            )
        return (
            *operands.values(),
            gathered,
            pointer("starts", Int32, 4),
            pointer("offsets", Int32, 4),
            integer("num_rows"),
            tensor_map("out", ELEMENT[p.out], (SLICE_ROWS, p.n), (1, 0)),
        )

    def tensor_maps(self):
        ordered = [side for side in Side if side is not self.problem.gathered]
        box, promotion = (BLOCK, STEP_ROWS, 1, 1), self.config.l2_promotion
        return (
            *(TensorMapBox(side.value, box, K_TILE_BYTES, promotion) for side in ordered),
            TensorMapBox("out", (self.slice_columns, SLICE_ROWS, 1), SLICE_BYTES, 128),
        )

    @cute.jit
    def __call__(self, left, right, gathered, starts, offsets, num_rows, out, grid, stream):
        """left, right: None if gathered, else a [16, M] or [16, N] tensor that stands for it.

        gathered: the other operand, None if both are in order. out: a [16, N] tensor.
        """
        self.kernel(
            *(None if x is None else map_carrier(x) for x in (left, right)),
            gathered,
            starts,
            offsets,
            num_rows,
            map_carrier(out),
        ).launch(
            grid=[grid, 1, 1],
            block=[self.config.threads, 1, 1],
            cluster=[self.cluster, 1, 1],
            min_blocks_per_mp=1,
            preferred_smem_carveout=100,  # else the compiler asks a driver
            stream=stream,
        )

    def storage(self):
        tile_m, tile_n, rows = self.tile
        staging_bytes = self.config.staging_bytes(self.problem)

        @cute.struct
        class Storage:
            left: cute.struct.Align[
                cute.struct.MemRange[self.element, tile_m * rows * self.stages], 1024
            ]
            right: cute.struct.Align[
                cute.struct.MemRange[self.element, tile_n * rows * self.stages], 1024
            ]
            staging: cute.struct.Align[cute.struct.MemRange[Uint8, staging_bytes], 1024]
            full: cute.struct.MemRange[Int64, self.stages]
            empty: cute.struct.MemRange[Int64, self.stages]
            loaded: cute.struct.MemRange[Int64, 8 * self.buffers]

        return Storage

    @cute.kernel
    def kernel(
        self,
        left: cute.CopyAtom | None,
        right: cute.CopyAtom | None,
        gathered: Gathered | None,
        starts: cute.Pointer,
        offsets: cute.Pointer,
        num_rows: Int32,
        out: cute.CopyAtom,
    ):
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)
        storage = utils.SmemAllocator().allocate(self.storage())
        self.ring.attach(storage.full.data_ptr(), storage.empty.data_ptr())
        self.starts, self.offsets, self.num_rows = starts, offsets, num_rows
        self.left_map, self.right_map, self.out_map = left, right, out
        block, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        self.first, self.clusters = block // self.cluster, ctas // self.cluster
        self.rank = block % self.cluster
        if warp == 0:
            with cute.arch.elect_one():
                self.ring.init()
                if const_expr(self.problem.accumulate):
                    for i in range_constexpr(8 * self.buffers):
                        cute.arch.mbarrier_init(storage.loaded.data_ptr() + i, 1)
            cute.arch.mbarrier_init_fence()
        self.sync_cluster()
        if group == 0:
            cute.arch.setmaxregister_decrease(self.config.producer_registers)
            if const_expr(self.gathers):
                self.gather.attach(gathered, thread)
                self.load(storage, warp)
            elif warp == 0:
                self.load(storage, warp)  # the other warps have nothing to copy
        else:
            cute.arch.setmaxregister_increase(self.config.consumer_registers)
            self.attach_slices(storage, warp - 4, thread % 32)
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
    def locate(self, unit: Int32):
        """Finds the tile of a unit, or of the last one if there are not that many.

        Returns (expert, first column of left, first column of right, first row, number of rows).
        Rows outside [0, num_rows) are left out.
        """
        unit = cutlass.min(unit, Int32(self.units - 1))
        expert = unit // (self.m_units * self.n_units)
        unit = unit - expert * (self.m_units * self.n_units)
        # units come in groups along M; inside a group M runs first, to share columns of right
        group_m = self.config.group_m
        first_m = unit // (group_m * self.n_units) * group_m
        unit = unit - first_m * self.n_units
        size = cutlass.min(self.m_units - first_m, Int32(group_m))
        n = unit // size
        m = first_m + unit - n * size
        if const_expr(self.problem.shared is Side.LEFT):
            n = n * self.cluster + self.rank
        else:
            m = m * self.cluster + self.rank
        ends = cute.make_tensor(self.offsets, cute.make_layout(VECTOR))
        start = Int32(0)
        if self.starts.toint() != 0:
            start = cute.make_tensor(self.starts, cute.make_layout(VECTOR))[expert]
        elif expert > 0:
            start = ends[expert - 1]
        start = cutlass.min(cutlass.max(start, Int32(0)), self.num_rows)
        end = cutlass.min(cutlass.max(ends[expert], start), self.num_rows)
        return expert, m * self.tile[0], n * self.tile[1], start, end - start

    def steps(self, rows: Int32) -> Int32:
        """The stages that so many rows fill."""
        return (rows + (STEP_ROWS - 1)) // STEP_ROWS

    @cute.jit
    def load(self, storage, warp):
        """The producer warpgroup's loop over units: fills the stages."""
        left_stages = cute.recast_ptr(storage.left.data_ptr(), dtype=Uint8)
        right_stages = cute.recast_ptr(storage.right.data_ptr(), dtype=Uint8)
        state = self.ring.producer()
        unit = self.first
        while unit < self.units:
            _, m, n, start, rows = self.locate(unit)
            column = (n if self.left_map is not None else m) * self.problem.operand.bytes
            if const_expr(self.gathers):
                self.gather.fetch(start, rows)
            for k in cutlass.range(self.steps(rows), unroll=1):
                done = k * STEP_ROWS  # rows
                if const_expr(self.gathers):
                    self.gather.locate(column)
                    following = done + STEP_ROWS
                    self.gather.fetch(start + following, rows - following)
                self.ring.wait_empty(state)
                left_stage = left_stages + state.index * self.left_bytes
                right_stage = right_stages + state.index * self.right_bytes
                if warp == 0:
                    with cute.arch.elect_one():
                        barrier = self.ring.expect(state, self.ordered_bytes)
                        row = (RAGGED_ROWS - rows + done, start + rows)
                        if const_expr(self.left_map is not None):
                            self.copy(Side.LEFT, left_stage, m, row, barrier)
                        if const_expr(self.right_map is not None):
                            self.copy(Side.RIGHT, right_stage, n, row, barrier)
                if const_expr(self.left_map is None):
                    self.gather.copy_blocks(left_stage, column, self.tile[0] // BLOCK)
                if const_expr(self.right_map is None):
                    self.gather.copy_blocks(right_stage, column, self.tile[1] // BLOCK)
                if const_expr(self.gathers):
                    self.ring.arrive_when_copied(state)
                state.advance()
            unit += self.clusters

    def copy(self, side: Side, stage, column, row, barrier):
        """Starts the copies of 64 rows of an operand in order; by one thread.

        Of the operand that a cluster shares, each CTA copies a part to all. row: in the second and
        in the third dimension of the tensor map, see `ragged_view`.
        """
        operand = self.left_map if side is Side.LEFT else self.right_map
        boxes = self.tile[side is Side.RIGHT] // BLOCK
        shares = self.cluster > 1 and side is self.problem.shared
        if shares:
            boxes //= self.cluster
        for i in range(boxes):
            box = i + self.rank * boxes if shares else i
            prims.cp_async_bulk_tensor_shared_cluster_global(
                (stage + box * BLOCK_BYTES).to_llvm_ptr(),
                tensor_map_address(operand).to_llvm_ptr(),
                [column + box * BLOCK, *row, Int32(RAGGED_ROWS)],
                barrier.to_llvm_ptr(),
                [],
                multicast_mask=Int16(2**self.cluster - 1) if shares else None,
            )

    def operands(self, storage, consumer):
        """A consumer's MMA, and its views of all stages of left and of right."""
        major, split = cute.nvgpu.OperandMajorMode.MN, self.config.warpgroups_per_tile
        mma = sm90.make_trivial_tiled_mma(
            self.element, self.element, major, major, Float32,
            (split, 1, 1), tiler_mn=(64, self.config.tile_n),
        )  # fmt: skip
        layout = utils.LayoutEnum.COL_MAJOR
        left = sm90.make_smem_layout_a(layout, self.tile, self.element, self.stages)
        right = sm90.make_smem_layout_b(layout, self.tile, self.element, self.stages)
        stages = storage.left, storage.right
        return mma, *fragments(mma, stages, (left, right), split, consumer)

    @cute.jit
    def mma(self, storage, consumer, thread):
        """A consumer warpgroup's loop over units: main loop and stores.

        consumer: its number; thread: counted over both consumers.
        """
        mma, tCrA, tCrB = self.operands(storage, consumer)
        of_tile = mma.get_slice(thread % (self.config.warpgroups_per_tile * WARPGROUP))
        shape = of_tile.partition_C(cute.make_identity_tensor(self.tile[:2])).shape
        acc = cute.make_rmem_tensor(shape, Float32)
        state = self.ring.consumer()
        unit, turn = self.first, self.clusters  # to this consumer's next unit
        pingpong = self.config.pingpong
        if const_expr(pingpong):
            turn = 2 * self.clusters
            if consumer == 1:
                cute.arch.barrier_arrive(barrier_id=1, number_of_threads=2 * WARPGROUP)
                state.advance(self.steps_of(unit))  # these stages are the other consumer's
                unit += self.clusters
        expert, m, n, _, rows = self.locate(unit)
        while unit < self.units:
            steps = self.steps(rows)
            if const_expr(self.problem.accumulate):
                self.begin(expert, m, n, rows)
            mma.set(warpgroup.Field.ACCUMULATE, True)
            acc.fill(0.0)
            if const_expr(pingpong):
                cute.arch.barrier(barrier_id=1 + consumer, number_of_threads=2 * WARPGROUP)
            behind = state.clone()  # the stage of the previous step, which WGMMA still reads
            for k in cutlass.range(steps, unroll=1):
                self.ring.wait_full(state)
                if const_expr(self.gathers):
                    begin_products()
                else:
                    warpgroup.fence()  # TMA alone wrote the stage
                issue(mma, acc, tCrA, tCrB, state.index)
                mma.set(warpgroup.Field.ACCUMULATE, True)  # in this loop's own text
                warpgroup.commit_group()
                warpgroup.wait_group(1)
                if k > 0:
                    self.ring.release(behind.index)
                    behind.advance()
                state.advance()
            others = unit + self.clusters
            if const_expr(pingpong):
                if others < self.units:
                    cute.arch.barrier_arrive(
                        barrier_id=2 - consumer, number_of_threads=2 * WARPGROUP
                    )
                if others < self.units:
                    state.advance(self.steps_of(others))
            warpgroup.wait_group(0)
            if steps > 0:
                self.ring.release(behind.index)
            unit += turn
            following = self.locate(unit)  # before the stores, so that nothing waits for it after
            self.store(acc, expert, m, n, rows)
            expert, m, n, _, rows = following
        if self.lane == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    def steps_of(self, unit: Int32) -> Int32:
        return self.steps(self.locate(unit)[-1])

    def attach_slices(self, storage, warp: Int32, lane: Int32):
        """Finds a consumer warp's rows of a tile and its part of the staging memory.

        warp: its number among the warps of both consumers.
        """
        self.lane = lane
        self.warp_row = warp % (4 * self.config.warpgroups_per_tile) * SLICE_ROWS
        self.staging = storage.staging.data_ptr() + warp * (self.buffers * SLICE)
        self.loaded = storage.loaded.data_ptr() + warp * self.buffers
        self.slices.attach(lane)
        self.rounds = cute.make_rmem_tensor((1,), Int32)  # in which all buffers were loaded
        self.rounds[0] = Int32(0)

    def corner(self, i: int, expert: Int32, m: Int32, n: Int32) -> list[Int32]:
        """The coordinates of the warp's i-th slice of a tile."""
        per_block = self.slice_count // self.config.m_blocks
        block, part = divmod(i, per_block)
        row = m + block * (64 * self.config.warpgroups_per_tile) + self.warp_row
        return [n + part * self.slice_columns, row, expert]

    @cute.jit
    def begin(self, expert: Int32, m: Int32, n: Int32, rows: Int32):
        """Starts loading the first slices that the sums of a tile are added to."""
        if self.lane == 0 and rows > 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            for i in range_constexpr(self.buffers):
                self.fetch(i, expert, m, n)

    def fetch(self, i: int, expert: Int32, m: Int32, n: Int32):
        """Starts loading the warp's i-th slice of a tile; by one thread."""
        buffer = i % self.buffers
        barrier = self.loaded + buffer
        cute.arch.mbarrier_arrive_and_expect_tx(barrier, SLICE)
        prims.cp_async_bulk_tensor_shared_cluster_global(
            (self.staging + buffer * SLICE).to_llvm_ptr(),
            tensor_map_address(self.out_map).to_llvm_ptr(),
            self.corner(i, expert, m, n),
            barrier.to_llvm_ptr(),
            [],
        )

    @cute.jit
    def store(self, acc: cute.Tensor, expert: Int32, m: Int32, n: Int32, rows: Int32):
        """Stores a tile, or adds it to out if the expert has rows."""
        if const_expr(self.problem.accumulate):
            if rows > 0:
                self.put(acc, expert, m, n)
        else:
            self.put(acc, expert, m, n)

    @cute.jit
    def put(self, acc: cute.Tensor, expert: Int32, m: Int32, n: Int32):
        count = self.slice_columns // 2  # registers of a slice
        for i in range_constexpr(self.slice_count):
            buffer = i % self.buffers
            slice_ = self.staging + buffer * SLICE
            values = cute.make_rmem_tensor((count,), Float32)
            for j in range_constexpr(count):
                values[j] = acc[i * count + j]
            if const_expr(self.problem.accumulate):
                cute.arch.mbarrier_wait(self.loaded + buffer, self.rounds[0] % 2)
                self.slices.add(slice_, values)
                if const_expr(buffer == self.buffers - 1):
                    self.rounds[0] = self.rounds[0] + 1
            else:
                if self.lane == 0:
                    cute.arch.cp_async_bulk_wait_group(self.buffers - 1, read=True)
                cute.arch.sync_warp()  # an earlier slice has left the buffer
                self.slices.write(slice_, values, 0)
            cute.arch.fence_view_async_shared()
            cute.arch.sync_warp()
            if self.lane == 0:
                prims.cp_async_bulk_tensor_global_shared_cta(
                    tensor_map_address(self.out_map).to_llvm_ptr(),
                    slice_.to_llvm_ptr(),
                    self.corner(i, expert, m, n),
                )
                cute.arch.cp_async_bulk_commit_group()
                following = i + self.buffers - 1  # goes where the slice before this one was
                if const_expr(self.problem.accumulate and i > 0 and following < self.slice_count):
                    cute.arch.cp_async_bulk_wait_group(1, read=True)
                    self.fetch(following, expert, m, n)
