"""The quantisation kernel: rows of floating point -> 8-bit values, a float32 scale per row."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import Float32, Int32, Int64, Uint8, const_expr, range_constexpr

from emitters.device.dependent import launch_next, wait_for_previous
from emitters.device.memory import ELEMENT, GMEM, VECTOR, vector
from emitters.device.rounding import Divisor, largest_magnitude, narrow
from emitters.spec.dtypes import LARGEST
from emitters.spec.layer_steps import ROW_VECTOR, QuantizeProblem, StepConfig
from emitters.templates.parameters import integer, pointer


class Quantize:
    """Writes the kernel that quantises rows, each with a scale of its own.

    A power of two of neighbouring threads reads a row once and keeps it in registers. If they are
    more than one warp, they exchange their maxima through shared memory.
    """

    cluster = 1

    def __init__(self, problem: QuantizeProblem, config: StepConfig):
        self.problem, self.config = problem, config
        self.source = ELEMENT[problem.source]
        self.row_threads = threads = problem.row_threads(config.threads)
        self.row_vectors = problem.k // ROW_VECTOR
        self.vectors = -(-problem.q_vectors // threads)  # per thread
        self.words = ROW_VECTOR * problem.source.bytes // 4  # int32 per vector
        self.rows = config.threads // threads  # per CTA
        self.smem_bytes = 4 * config.threads // 32 if threads > 32 else 0

    def arguments(self):
        """The arguments of `__call__`, except grid and stream."""
        return (
            pointer("source", Uint8, 16),
            pointer("end", Int32, 4),
            pointer("q", Uint8, ROW_VECTOR),
            pointer("scale", Float32, 4),
            pointer("static_scale", Float32, 4),
            integer("num_rows"),
            integer("source_stride"),
            integer("early"),
        )

    def tensor_maps(self):
        return ()

    @cute.jit
    def __call__(
        self, source, end, q, scale, static_scale, num_rows, source_stride, early, grid, stream
    ):
        """end: null, or the address of an int32; rows from there on are left alone. It is read
        before `wait_for_previous`. static_scale: null, or the scale of every row; values beyond
        the target's range are clamped. source_stride: bytes from a row to the next. early: nonzero
        if source is already final and no earlier kernel still uses q and scale, so that all work
        may be done before `wait_for_previous`.

        grid: `QuantizeProblem.ctas`.
        """
        self.kernel(source, end, q, scale, static_scale, num_rows, source_stride, early).launch(
            grid=[grid, 1, 1], block=[self.config.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        source: cute.Pointer,
        end: cute.Pointer,
        q: cute.Pointer,
        scale: cute.Pointer,
        static_scale: cute.Pointer,
        num_rows: Int32,
        source_stride: Int32,
        early: Int32,
    ):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        row = block * self.rows + thread // self.row_threads
        if end.toint() != 0:
            num_rows = min(num_rows, cute.make_tensor(end, cute.make_layout(VECTOR))[0])
        launch_next()
        if early == 0:
            wait_for_previous()
        if block * self.rows < num_rows:
            rows = (source, source_stride, static_scale)
            self.quantize(rows, q, scale, row, row < num_rows, thread)
        if early != 0:
            wait_for_previous()

    @cute.jit
    def quantize(self, rows, q, scale, row: Int32, counts: cutlass.Boolean, thread: Int32):
        """Quantises a row. counts: whether this thread's row exists."""
        source, source_stride, static_scale = rows
        first = thread % self.row_threads
        values = cute.make_rmem_tensor((self.vectors * self.words,), Int32)
        values.fill(0)
        for i in range_constexpr(self.vectors):
            at = first + i * self.row_threads
            if counts and self.inside(i, at, self.row_vectors):
                offset = Int64(row) * source_stride + at * (4 * self.words)
                for half in range_constexpr(self.words // 4):
                    part = cute.make_rmem_tensor((4,), Int32)
                    cute.autovec_copy(vector(source + offset + 16 * half, Int32, 4, GMEM), part)
                    for j in range_constexpr(4):
                        values[i * self.words + 4 * half + j] = part[j]
        largest = self.row_maximum(values, thread)
        divisor = largest / LARGEST[self.problem.target]
        beyond = Float32(0.0)  # not 0: magnitudes are clamped to it
        if static_scale.toint() != 0:
            divisor = cute.make_tensor(static_scale, cute.make_layout(1))[0]
            beyond = divisor * LARGEST[self.problem.target]
        if divisor == 0:  # rows of zeros, or so small that the division gives 0
            divisor = Float32(1.0)
        if counts and first == 0:
            cute.make_tensor(scale, cute.make_layout(VECTOR))[row] = divisor
        by = Divisor(divisor)
        for i in range_constexpr(self.vectors):
            at = first + i * self.row_threads
            elements = self.elements(values, i)
            if beyond != 0:
                for j in range_constexpr(ROW_VECTOR):
                    less = cute.arch.fmin(elements[j], beyond, nan=True)
                    elements[j] = cute.arch.fmax(less, -beyond, nan=True)
            by.divide(elements)
            if counts and self.inside(i, at, self.problem.q_vectors):
                target = q + (Int64(row) * self.problem.q_vectors + at) * ROW_VECTOR
                cute.autovec_copy(
                    narrow(elements, self.problem.target), vector(target, Int32, 2, GMEM)
                )

    def inside(self, i: int, at: Int32, count: int):
        """Whether the thread's i-th vector, number `at` of the row, is among the row's first."""
        return True if (i + 1) * self.row_threads <= count else at < count

    def elements(self, values: cute.Tensor, i: int):
        """The thread's i-th vector, converted to float32."""
        words = cute.make_rmem_tensor((self.words,), Int32)
        for j in range(self.words):
            words[j] = values[i * self.words + j]
        elements = cute.make_rmem_tensor((ROW_VECTOR,), Float32)
        elements.store(cute.recast_tensor(words, self.source).load().to(Float32))
        return elements

    def warp_maximum(self, values: cute.Tensor) -> Float32:
        """The largest magnitude of a row in this warp, or NaN if there is one."""
        vectors = (self.elements(values, i) for i in range(self.vectors))
        sharing = min(self.row_threads, 32)
        distances = [distance for distance in (16, 8, 4, 2, 1) if distance < sharing]
        return largest_magnitude((v[j] for v in vectors for j in range(ROW_VECTOR)), distances)

    @cute.jit
    def row_maximum(self, values: cute.Tensor, thread: Int32):
        """The largest magnitude of a row, or NaN if the row has one."""
        largest = self.warp_maximum(values)
        if const_expr(self.row_threads > 32):
            maxima = utils.SmemAllocator().allocate_array(Float32, self.config.threads // 32)
            maxima = cute.make_tensor(maxima, cute.make_layout(self.config.threads // 32))
            if thread % 32 == 0:
                maxima[thread // 32] = largest
            cute.arch.sync_threads()
            first_warp = thread // self.row_threads * (self.row_threads // 32)
            for i in range_constexpr(self.row_threads // 32):
                largest = cute.arch.fmax(largest, maxima[first_warp + i], nan=True)
        return largest
