"""Stores of the epilogue's results: from registers through shared memory to the output."""

from __future__ import annotations

from typing import Protocol

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr, range_constexpr
from cutlass.cute.nvgpu import cpasync
from cutlass.experimental import primitives as prims

from emitters.device.epilogue.columns import ColumnsFragment
from emitters.device.epilogue.fragment import Fragment
from emitters.device.epilogue.rows import RowsFragment
from emitters.device.epilogue.slices import CHUNK, Slices
from emitters.device.memory import ELEMENT, GMEM, SMEM, tensor_map_address, vector
from emitters.device.parameters import Output
from emitters.spec.config_sm90 import SLICE_BYTES, SLICE_ROWS, staged_slices
from emitters.spec.config_swap_sm90 import GemmSwapSm90Config
from emitters.spec.dtypes import DType
from emitters.spec.gemm import GemmProblem


class Store(Protocol):
    """The interface through which the epilogue writes its results.

    Each consumer warp has `staging_bytes` of shared memory to itself, so it waits for no other.
    """

    staging_bytes: int  # per warp

    def attach(self, output: Output, fragment: Fragment, staging: cute.Pointer, lane: Int32):
        """Binds the output, and the shared memory of this warp, `staging`."""

    def put(
        self,
        m: int,
        part: int,
        values: cute.Tensor,
        before: cute.Tensor,
        first_row: Int32,
        rows: Int32,
        column: Int32,
    ):
        """Stores part `part` of the thread's m-th 64 rows or columns.

        values: the output's; before: those before the activation, where they are stored too.
        first_row, column: where the tile starts in the output. rows: from first_row to the
        expert's end. Rows past these, and columns past the output's, are not stored.
        """

    def finish(self):
        """Waits, after the last tile, until stores have read the shared memory."""


def make_out_map(problem: GemmProblem, out: cute.Tensor):
    """The TMA atom that stores slices. out: any [16, N] tensor; the host encodes the real one."""
    box = (SLICE_ROWS, SLICE_BYTES // problem.out.bytes)
    layout = cute.make_layout(box, stride=(box[1], 1))
    atom, _ = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), out, layout, box)
    return atom


class SliceStore:
    """Stores slices of 16 rows x 128 bytes by TMA.

    A part fills a slice, or half of one in a gated problem. The warp writes a slice to its 16
    staging rows, in the 128-byte swizzle, and one TMA store sends it from there. If the expert ends
    within the 16 rows, lanes store them instead: 16 bytes per lane, eight lanes per row.

    Where columns before the activation are stored too, a warp has staging rows for a slice of them
    as well, in a gated problem for a slice of gates and one of ups, and sends all of them together.
    """

    def __init__(self, problem: GemmProblem):
        self.problem = problem
        self.slice_columns = SLICE_BYTES // problem.out.bytes
        self.slice_parts = 2 if problem.gated else 1
        self.slice_bytes = SLICE_ROWS * SLICE_BYTES
        self.halves = staged_slices(problem) - 1  # of h
        self.staging_bytes = (1 + self.halves) * self.slice_bytes
        self.slices = Slices(problem.out)

    def attach(self, output: Output, fragment: RowsFragment, staging: cute.Pointer, lane: Int32):
        self.output, self.halves_target = output, output[2:]
        self.fragment, self.staging, self.lane = fragment, staging, lane
        self.slices.attach(lane)

    @cute.jit
    def put(
        self,
        m: cutlass.Constexpr,
        part: cutlass.Constexpr,
        values: cute.Tensor,
        before: cute.Tensor,
        first_row: Int32,
        rows: Int32,
        first_column: Int32,
    ):
        in_slice = part % self.slice_parts
        if const_expr(in_slice == 0):
            if self.lane == 0:
                cute.arch.cp_async_bulk_wait_group(0, read=True)
            cute.arch.sync_warp()  # the previous slices have left shared memory
        first = in_slice * (SLICE_BYTES // CHUNK // self.slice_parts)
        self.slices.write(self.staging, values, first)
        if const_expr(self.problem.stored):
            for i, columns in enumerate(self.gates_and_ups(before)):
                self.slices.write(self.slice_of_h(i), columns, first)
        if const_expr(in_slice == self.slice_parts - 1):
            cute.arch.fence_view_async_shared()
            cute.arch.sync_warp()
            self.send(
                first_row + m * 64 + self.fragment.warp_row,
                rows - m * 64 - self.fragment.warp_row,
                first_column + part // self.slice_parts * self.slice_columns,
            )

    def slice_of_h(self, i: int) -> cute.Pointer:
        """The staging rows of gates and of ups, or of the columns without a gate."""
        return self.staging + (1 + i) * self.slice_bytes

    def gates_and_ups(self, values: cute.Tensor) -> list[cute.Tensor]:
        """The gates and the ups of a part, each in the order of its outputs; or the whole part."""
        if not self.problem.gated:
            return [values]
        pairs = self.fragment.gates_and_ups(values)
        found = [cute.make_rmem_tensor((len(pairs),), Float32) for _ in range(2)]
        for i, pair in enumerate(pairs):
            for columns, value in zip(found, pair, strict=True):
                columns[i] = value
        return found

    @cute.jit
    def finish(self):
        if self.lane == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def send(self, first_row: Int32, rows: Int32, column: Int32):
        """Sends the slices to the outputs. rows: from first_row to the expert's end."""
        out, out_map = self.output[:2]
        if rows >= SLICE_ROWS:
            if self.lane == 0:
                self.send_slice(out_map, self.staging, [column, first_row])
                for i in range_constexpr(self.halves):
                    slice_, corner = self.slice_of_h(i), [column, Int32(i), first_row]
                    self.send_slice(self.halves_target[1], slice_, corner)
                cute.arch.cp_async_bulk_commit_group()
        else:
            columns = self.problem.out_columns
            self.copy_out(self.staging, out, columns, first_row, rows, column)
            for i in range_constexpr(self.halves):
                target, pitch = self.halves_target[0] + i * columns, self.halves * columns
                self.copy_out(self.slice_of_h(i), target, pitch, first_row, rows, column)

    def send_slice(self, target, slice_: cute.Pointer, corner: list):
        """Starts a slice's store; by one thread. target: the atom of a tensor map."""
        prims.cp_async_bulk_tensor_global_shared_cta(
            tensor_map_address(target).to_llvm_ptr(), slice_.to_llvm_ptr(), corner
        )

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
        self.staging_bytes = config.staging_bytes(problem) // (4 * config.column_groups)
        self.stage = self.stage_words if problem.out is DType.FP32 else self.stage_matrices

    def attach(self, output: Output, fragment: ColumnsFragment, staging: cute.Pointer, lane: Int32):
        self.out = output.out
        self.fragment, self.staging, self.lane = fragment, staging, lane

    @cute.jit
    def put(
        self,
        m: cutlass.Constexpr,
        part: cutlass.Constexpr,
        values: cute.Tensor,
        before: cute.Tensor,
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
