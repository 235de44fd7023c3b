"""Stores of the epilogue's results: from registers through shared memory to the output."""

from __future__ import annotations

from typing import Protocol

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr, range_constexpr
from cutlass.experimental import primitives as prims

from emitters.device.epilogue.columns import ColumnsFragment
from emitters.device.epilogue.fragment import Fragment
from emitters.device.epilogue.rows import RowsFragment
from emitters.device.epilogue.slices import Slices
from emitters.device.memory import CHUNK, ELEMENT, GMEM, SMEM, tensor_map_address, vector
from emitters.device.parameters import Output
from emitters.spec.config_packed_sm90 import GemmPackedSm90Config
from emitters.spec.config_sm90 import staged_slices
from emitters.spec.config_swap_sm90 import GemmSwapSm90Config
from emitters.spec.dtypes import DType
from emitters.spec.gemm import GemmProblem
from emitters.spec.staged_sm90 import SLICE_BYTES, SLICE_ROWS, WARPGROUP


class Store(Protocol):
    """The interface through which the epilogue writes its results.

    Each consumer warp has `staging_bytes` of shared memory to itself, so it waits for no other.
    """

    staging_bytes: int  # per warp
    slice_parts: int  # the parts that are stored together
    outputs: int  # 1, more if columns before the activation are stored too

    def attach(self, output: Output, fragment: Fragment, staging: cute.Pointer, lane: Int32):
        """Binds the output, and the shared memory of this warp, `staging`."""

    def put(
        self,
        m: int,
        part: int,
        output: int,
        values: cute.Tensor,
        first_row: Int32,
        rows: Int32,
        column: Int32,
    ):
        """Stores part `part` of the thread's m-th 64 rows or columns.

        output: 0, or which of the columns before the activation: 1 for gates, or for all without a
        gate, 2 for ups. first_row, column: where the tile starts in the output. rows: from
        first_row to the expert's end. Rows past these, and columns past the output's, are not
        stored. Called for all parts that are stored together, then for the next output.
        """

    def finish(self):
        """Waits, after the last tile, until stores have read the shared memory."""


class SliceStore:
    """Stores slices of 16 rows x 128 bytes by TMA.

    A part fills a slice, or half of one in a gated problem. The warp writes `together` slices, one
    or those of a whole tile, to staging rows, in the 128-byte swizzle, and a TMA store sends each
    from there. If the expert ends within the 16 rows, lanes store them instead: 16 bytes per lane,
    eight lanes per row.

    Where columns before the activation are stored too, a slice of gates and one of ups (of all
    columns without a gate) follow through the same staging rows: memory for more of them would be a
    stage less, which takes longer than waiting for each slice to leave.
    """

    def __init__(self, problem: GemmProblem, together: int = 1):
        self.problem, self.together = problem, together
        self.slice_columns = SLICE_BYTES // problem.out.bytes
        self.slice_parts = 2 if problem.gated else 1
        self.slice_bytes = SLICE_ROWS * SLICE_BYTES
        self.halves = problem.n // problem.out_columns  # of the columns before the activation
        self.outputs = 1 + self.halves if problem.stored else 1
        self.staging_bytes = together * staged_slices(problem) * self.slice_bytes
        self.slices = Slices(problem.out)

    def attach(self, output: Output, fragment: RowsFragment, staging: cute.Pointer, lane: Int32):
        self.output, self.halves_target = output, (output.h, output.h_map)
        self.fragment, self.staging, self.lane = fragment, staging, lane
        self.slices.attach(lane)

    @cute.jit
    def put(
        self,
        m: cutlass.Constexpr,
        part: cutlass.Constexpr,
        output: cutlass.Constexpr,
        values: cute.Tensor,
        first_row: Int32,
        rows: Int32,
        first_column: Int32,
    ):
        in_slice = part % self.slice_parts
        column_slice = part // self.slice_parts
        place = column_slice % self.together
        if const_expr(in_slice == 0 and place == 0):
            if self.lane == 0:
                cute.arch.cp_async_bulk_wait_group(0, read=True)
            cute.arch.sync_warp()  # the previous slices have left shared memory
        first = in_slice * (SLICE_BYTES // CHUNK // self.slice_parts)
        self.slices.write(self.staging + place * self.slice_bytes, values, first)
        if const_expr(in_slice == self.slice_parts - 1 and place == self.together - 1):
            cute.arch.fence_view_async_shared()
            cute.arch.sync_warp()
            for i in range_constexpr(self.together):
                self.send(
                    {output: self.staging + i * self.slice_bytes},
                    first_row + m * 64 + self.fragment.warp_row,
                    rows - m * 64 - self.fragment.warp_row,
                    first_column + (column_slice - place + i) * self.slice_columns,
                )

    @cute.jit
    def finish(self):
        if self.lane == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def send(self, slices: cutlass.Constexpr, first_row: Int32, rows: Int32, column: Int32):
        """Sends slices, by output. rows: from first_row to the expert's end."""
        if rows >= SLICE_ROWS:
            if self.lane == 0:
                for output, slice_ in slices.items():
                    self.send_slice(output, slice_, first_row, column)
                cute.arch.cp_async_bulk_commit_group()
        else:
            for output, slice_ in slices.items():
                target, pitch = self.rows_of(output)
                self.copy_out(slice_, target, pitch, first_row, rows, column)

    def send_slice(self, output: int, slice_: cute.Pointer, first_row: Int32, column: Int32):
        """Starts a slice's store; by one thread."""
        target, corner = self.output[1], [column, first_row]
        if output > 0:
            target, corner = self.halves_target[1], [column, Int32(output - 1), first_row]
        prims.cp_async_bulk_tensor_global_shared_cta(
            tensor_map_address(target).to_llvm_ptr(), slice_.to_llvm_ptr(), corner
        )

    def rows_of(self, output: int):
        """Where an output's first row starts, and the elements from a row to the next."""
        columns = self.problem.out_columns
        if output == 0:
            return self.output[0], columns
        return self.halves_target[0] + (output - 1) * columns, self.halves * columns

    @cute.jit
    def copy_out(
        self,
        slice_: cute.Pointer,
        out: cute.Pointer,
        pitch: cutlass.Constexpr,
        first_row: Int32,
        rows: Int32,
        first_column: Int32,
    ):
        """Stores a slice's first `rows` rows. pitch: from a row of `out` to the next, in elements;
        columns past the output's are not stored."""
        chunk = self.lane % (SLICE_BYTES // CHUNK)
        column = first_column + chunk * (CHUNK // self.problem.out.bytes)
        for i in range_constexpr(SLICE_ROWS // 4):
            row = self.lane // 8 + 4 * i
            store = row < rows
            if const_expr(self.fragment.has_n_tail):
                store = store and column < self.problem.out_columns
            if store:
                words = cute.make_rmem_tensor((4,), Int32)
                source = self.slices.chunk(slice_, row, chunk)
                cute.autovec_copy(vector(source, Int32, 4, SMEM), words)
                target = out + (Int64(first_row + row) * pitch + column)
                cute.autovec_copy(words, vector(target, Int32, 4, GMEM))


class TransposedStore:
    """Stores 16 columns per warp and row, or 8 in a gated problem, after transposing them.

    16 columns of 16 bits are a whole sector of 32 bytes. A part goes through the warp's staging
    rows, each of which holds the warp's columns of one row.
    """

    def __init__(self, problem: GemmProblem, config: GemmSwapSm90Config):
        self.problem, self.config = problem, config
        self.element = ELEMENT[problem.out]
        self.pitch = config.staging_pitch(problem)
        self.staging_bytes = config.staging_bytes(problem) // config.column_warps
        self.slice_parts = self.outputs = 1
        self.stage = self.stage_words if problem.out is DType.FP32 else self.stage_matrices

    def attach(self, output: Output, fragment: ColumnsFragment, staging: cute.Pointer, lane: Int32):
        self.out = output.out
        self.fragment, self.staging, self.lane = fragment, staging, lane

    @cute.jit
    def put(
        self,
        m: cutlass.Constexpr,
        part: cutlass.Constexpr,
        output: cutlass.Constexpr,
        values: cute.Tensor,
        first_row: Int32,
        rows: Int32,
        first_column: Int32,
    ):
        cute.arch.sync_warp()  # the previous part has left the staging rows
        self.stage(values)
        cute.arch.sync_warp()
        skipped = part * self.config.part_rows
        column = first_column + m * self.fragment.block_columns
        self.copy_out(first_row + skipped, rows - skipped, column)

    def finish(self):
        pass  # lanes have stored everything, no TMA store reads shared memory

    @cute.jit
    def stage_matrices(self, values: cute.Tensor):
        """Writes 16-bit outputs to the staging rows: one stmatrix per part, in 8 x 8 blocks."""
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
    def stage_words(self, values: cute.Tensor):
        """Writes float32 outputs to the staging rows."""
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


class WarpgroupStore:
    """Stores slices of 16 rows and the columns of a warpgroup, in at most 128 bytes each, by TMA.

    A part has 16 rows, and each of the four warps has 16 columns of it, or 8 in a gated problem.
    They write all parts of a tile to shared memory, in the swizzle of the slices' width; one thread
    per warp sends every fourth part from there. So tiles leave under the next one's main loop: when
    many SMs store at once, L2 takes longer than the main loop would wait. If the expert ends within
    the 16 rows, lanes store them instead, 16 bytes each.
    """

    def __init__(self, problem: GemmProblem, config: GemmPackedSm90Config):
        self.problem, self.config = problem, config
        self.element = ELEMENT[problem.out]
        self.width = config.slice_bytes(problem)
        self.row_bytes = 4 * config.warp_columns(problem) * problem.out.bytes
        self.part_bytes = SLICE_ROWS * self.row_bytes
        self.parts = config.parts  # of SLICE_ROWS
        self.staging_bytes = self.parts * self.part_bytes // 4
        self.slice_parts = self.outputs = 1
        self.stage = self.stage_words if problem.out is DType.FP32 else self.stage_matrices

    def attach(self, output: Output, fragment: ColumnsFragment, staging: cute.Pointer, lane: Int32):
        self.output, self.fragment, self.lane = output, fragment, lane
        self.warp, self.group = fragment.warp & 3, fragment.warp >> 2
        self.staging = staging - self.warp * self.staging_bytes

    @cute.jit
    def put(
        self,
        m: cutlass.Constexpr,
        part: cutlass.Constexpr,
        output: cutlass.Constexpr,
        values: cute.Tensor,
        first_row: Int32,
        rows: Int32,
        first_column: Int32,
    ):
        if const_expr(part == 0):
            self.finish()
            self.sync()  # the tile before has left shared memory
        if rows > part * SLICE_ROWS:
            self.stage(self.staging + part * self.part_bytes, values)
        if const_expr(part == self.parts - 1):
            cute.arch.fence_view_async_shared()
            self.sync()
            column = first_column + self.group * (self.row_bytes // self.problem.out.bytes)
            for i in range_constexpr(self.parts):
                self.send(i, first_row, rows, column)
            if self.lane == 0:
                cute.arch.cp_async_bulk_commit_group()

    def sync(self):
        """Waits for the warpgroup."""
        cute.arch.barrier(barrier_id=3 + self.group, number_of_threads=WARPGROUP)

    @cute.jit
    def finish(self):
        if self.lane == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    def place(self, part: cute.Pointer, row: Int32, chunk: Int32):
        """The address of 16 bytes of a row of the warpgroup."""
        chunks = self.width // CHUNK
        swizzle = row % 8 if chunks == 8 else row // 2 % 4
        slice_ = chunk // chunks * (SLICE_ROWS * self.width)
        return part + (slice_ + row * self.width + ((chunk % chunks) ^ swizzle) * CHUNK)

    @cute.jit
    def stage_matrices(self, part: cute.Pointer, values: cute.Tensor):
        """Writes 16-bit outputs: one stmatrix per part, in 8 x 8 blocks."""
        count = cute.size(values)
        halves = self.config.warp_columns(self.problem) // 8
        packed = cute.make_rmem_tensor((count,), self.element)
        packed.store(values.load().to(self.element))
        words = cute.recast_tensor(packed, Int32)
        row = self.lane % 8 + self.lane // (8 * halves) % 2 * 8
        target = self.place(part, row, self.warp * halves + self.lane // 8 % halves)
        prims.stmatrix(
            target.to_llvm_ptr(), [words[i] for i in range(count // 2)], prims.MMALayout.COL
        )

    @cute.jit
    def stage_words(self, part: cute.Pointer, values: cute.Tensor):
        """Writes float32 outputs."""
        halves = self.config.warp_columns(self.problem) // 8
        for i in range_constexpr(cute.size(values)):
            row = i // (2 * halves) * 8 + self.lane % 4 * 2 + i % 2
            column = (self.warp * halves + i // 2 % halves) * 8 + self.lane // 4
            target = self.place(part, row, column // 4) + column % 4 * 4
            vector(target, Float32, 1, SMEM)[0] = values[i]

    @cute.jit
    def send(self, number: cutlass.Constexpr, first_row: Int32, rows: Int32, first_column: Int32):
        """Sends a part. first_row, rows: of the tile."""
        part = self.staging + number * self.part_bytes
        skipped = number * SLICE_ROWS
        if rows >= skipped + SLICE_ROWS:
            if self.warp == number % 4 and self.lane == 0:
                for i in range_constexpr(self.row_bytes // self.width):
                    column = first_column + i * (self.width // self.problem.out.bytes)
                    prims.cp_async_bulk_tensor_global_shared_cta(
                        tensor_map_address(self.output.out_map).to_llvm_ptr(),
                        (part + i * (SLICE_ROWS * self.width)).to_llvm_ptr(),
                        [column, first_row + skipped],
                    )
        elif rows > skipped:
            self.copy_out(part, first_row + skipped, rows - skipped, first_column)

    @cute.jit
    def copy_out(self, part: cute.Pointer, first_row: Int32, rows: Int32, first_column: Int32):
        """Stores a part's first `rows` rows; columns past the output's are not stored."""
        chunks = self.row_bytes // CHUNK
        thread = self.warp * 32 + self.lane
        column = first_column + thread % chunks * (CHUNK // self.problem.out.bytes)
        for i in range_constexpr(-(-SLICE_ROWS * chunks // WARPGROUP)):
            row = thread // chunks + i * (WARPGROUP // chunks)
            store = row < rows
            if const_expr(self.fragment.has_n_tail):
                store = store and column < self.problem.out_columns
            if store:
                words = cute.make_rmem_tensor((4,), Int32)
                source = self.place(part, row, thread % chunks)
                cute.autovec_copy(vector(source, Int32, 4, SMEM), words)
                target = Int64(first_row + row) * self.problem.out_columns + column
                cute.autovec_copy(words, vector(self.output.out + target, Int32, 4, GMEM))
