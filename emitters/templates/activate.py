"""The kernels between a layer's products in training: its activation, and that one's gradients."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr, range_constexpr
from cutlass.cute.math import fma

from emitters.device.dependent import launch_next, wait_for_previous
from emitters.device.epilogue.activations import activate, activate_backward
from emitters.device.memory import ELEMENT, GMEM, VECTOR, vector
from emitters.spec.epilogue import Activation
from emitters.spec.layer_steps import ROW_VECTOR, ActivateProblem, StepConfig
from emitters.templates.parameters import integer, pointer, several

_MOST = 3  # vectors of a row that a thread reads before it uses the first; with four some spill


class Activate:
    """Writes the kernel that applies an activation to rows; a warp takes a pair's row.

    A thread takes eight columns of the result at a time, which are a vector of a row; its next are
    32 vectors on. It reads several vectors before it writes the first, so that many reads are under
    way.
    """

    smem_bytes, cluster = 0, 1

    def __init__(self, problem: ActivateProblem, config: StepConfig):
        self.problem, self.config = problem, config
        self.node = Activation(problem.function)
        self.element = ELEMENT[problem.dtype]
        self.chunks = problem.columns // problem.inter  # of h, for a vector of the result
        self.vectors = problem.inter // ROW_VECTOR
        turns = -(-self.vectors // 32)  # of a thread, a vector each
        self.trips = -(-turns // _MOST)
        self.together = -(-turns // self.trips)

    def arguments(self):
        """The arguments of `__call__`, except grid and stream."""
        return (
            pointer("h", self.element, 16),
            pointer("inverse", Int32, 4),
            pointer("active", self.element, 16),
            integer("num_rows"),
            integer("num_pairs"),
            several(*map(integer, self.problem.numbers)),
        )

    def tensor_maps(self):
        return ()

    @cute.jit
    def __call__(self, h, inverse, active, num_rows, num_pairs, numbers, grid, stream):
        """inverse: the row of each pair; a pair with one outside [0, num_rows) has no row.

        grid: `ActivateProblem.ctas`.
        """
        self.kernel(h, inverse, active, num_rows, num_pairs, numbers).launch(
            grid=[grid, 1, 1], block=[self.config.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        h: cute.Pointer,
        inverse: cute.Pointer,
        active: cute.Pointer,
        num_rows: Int32,
        num_pairs: Int32,
        numbers: tuple | None,
    ):
        wait_for_previous()
        launch_next()
        pair, lane = self.place()
        if pair < num_pairs:
            row = cute.make_tensor(inverse, cute.make_layout(VECTOR))[pair]
            if row >= 0 and row < num_rows:
                for trip in cutlass.range(self.trips, unroll=1):
                    self.apply(h, active, row, self.first(trip, lane), self.floats(numbers))

    @cute.jit
    def apply(self, h: cute.Pointer, active: cute.Pointer, row: Int32, first: Int32, numbers):
        """Writes a thread's vectors of a row, of which `first` is the first."""
        words = self.read_h(h, row, first)
        for i in range_constexpr(self.together):
            at = first + 32 * i
            columns = self.columns(words, i)
            result = cute.make_rmem_tensor((ROW_VECTOR,), Float32)
            for j in range_constexpr(ROW_VECTOR):
                result[j] = activate(self.node, numbers, *(column[j] for column in columns))
            if at < self.vectors:
                self.write(active, self.result_at(row, at), result)

    # Shared with the gradients.

    def place(self):
        """The warp's pair, and the thread's lane."""
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        return block * (self.config.threads // 32) + thread // 32, thread % 32

    def first(self, trip: Int32, lane: Int32):
        """The thread's first vector in a trip."""
        return trip * (32 * self.together) + lane

    def floats(self, numbers):
        """The activation's numbers, from their bits."""
        return tuple(bits.bitcast(Float32) for bits in numbers or ())

    @cute.jit
    def read_h(self, h: cute.Pointer, row: Int32, first: Int32):
        """The words of h that the thread's vectors need; zeros past the row's end."""
        words = cute.make_rmem_tensor((4, self.chunks, self.together), Int32)
        words.fill(0)
        for i in range_constexpr(self.together):
            at = first + 32 * i
            if at < self.vectors:
                for chunk in range_constexpr(self.chunks):
                    self.read(h + self.h_at(row, at, chunk), words[None, chunk, i])
        return words

    @cute.jit
    def read(self, source: cute.Pointer, words: cute.Tensor):
        part = cute.make_rmem_tensor((4,), Int32)
        cute.autovec_copy(vector(source, Int32, 4, GMEM), part)
        for j in range_constexpr(4):
            words[j] = part[j]

    def columns(self, words: cute.Tensor, i: int):
        """Float32 values of gate and up, or of the one column, for the thread's i-th vector."""
        chunks = [self.elements(words[None, chunk, i]) for chunk in range(self.chunks)]
        if not self.problem.interleaved:
            return chunks
        values = [chunk[j] for chunk in chunks for j in range(ROW_VECTOR)]
        return [values[part::2] for part in range(2)]

    def elements(self, words: cute.Tensor):
        """The eight values in four words, converted to float32."""
        dense = cute.make_rmem_tensor((4,), Int32)
        for j in range(4):
            dense[j] = words[j]
        elements = cute.make_rmem_tensor((ROW_VECTOR,), Float32)
        elements.store(cute.recast_tensor(dense, self.element).load().to(Float32))
        return elements

    def h_at(self, row: Int32, at: Int32, chunk: int):
        """The offset in h of a chunk of eight columns that a vector of the result needs."""
        column = at * ROW_VECTOR + chunk * self.problem.inter
        if self.problem.interleaved:
            column = (2 * at + chunk) * ROW_VECTOR
        return Int64(row) * self.problem.columns + column

    def result_at(self, row: Int32, at: Int32):
        """The offset of a vector of the result, and of all that has its shape."""
        return Int64(row) * self.problem.inter + at * ROW_VECTOR

    @cute.jit
    def write(self, target: cute.Pointer, offset: Int64, elements: cute.Tensor):
        rounded = cute.make_rmem_tensor((ROW_VECTOR,), self.element)
        rounded.store(elements.load().to(self.element))
        cute.autovec_copy(rounded, vector(target + offset, self.element, ROW_VECTOR, GMEM))


class ActivateBackward(Activate):
    """Writes the kernel of an activation's gradients; a warp takes a pair's row, as `Activate`.

    What it writes may lie where it reads: grad_h on h, and active on grad_active. A thread reads
    each vector before it writes it, and no other thread reads it.
    """

    def arguments(self):
        """The arguments of `__call__`, except grid and stream."""
        return (
            pointer("h", self.element, 16),
            pointer("grad_active", self.element, 16),
            pointer("weights", Float32, 4),
            pointer("inverse", Int32, 4),
            several(
                pointer("grad_h", self.element, 16),
                pointer("active", self.element, 16),
                pointer("grad_weights", Float32, 4),
            ),
            integer("num_rows"),
            integer("num_pairs"),
            several(*map(integer, self.problem.numbers)),
        )

    @cute.jit
    def __call__(
        self, h, grad_active, weights, inverse, written, num_rows, num_pairs, numbers, grid, stream
    ):
        """written: grad_h, active and grad_weights; active may be null. weights, grad_weights: one
        per pair; the gradient of a pair without a row is 0. inverse: as in `Activate`.

        grid: `ActivateBackwardProblem.ctas`.
        """
        self.kernel(h, grad_active, weights, inverse, written, num_rows, num_pairs, numbers).launch(
            grid=[grid, 1, 1], block=[self.config.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        h: cute.Pointer,
        grad_active: cute.Pointer,
        weights: cute.Pointer,
        inverse: cute.Pointer,
        written: tuple,
        num_rows: Int32,
        num_pairs: Int32,
        numbers: tuple | None,
    ):
        wait_for_previous()
        launch_next()
        pair, lane = self.place()
        if pair < num_pairs:
            row = cute.make_tensor(inverse, cute.make_layout(VECTOR))[pair]
            total = Float32(0.0)
            if row >= 0 and row < num_rows:
                weight = cute.make_tensor(weights, cute.make_layout(VECTOR))[pair]
                for trip in cutlass.range(self.trips, unroll=1):
                    total = self.differentiate(
                        (h, grad_active, written), row, self.first(trip, lane), weight,
                        self.floats(numbers), total,
                    )  # fmt: skip
            for i in range_constexpr(5):
                total = total + cute.arch.shuffle_sync_bfly(total, 16 >> i)
            if lane == 0:
                cute.make_tensor(written[2], cute.make_layout(VECTOR))[pair] = total

    @cute.jit
    def differentiate(self, tensors, row: Int32, first: Int32, weight: Float32, numbers, total):
        """Writes a thread's vectors of a row; adds to `total` their share of the weight's gradient.

        The order of the sum is that of the columns of a thread, and does not depend on the launch.
        """
        h, grad_active, (grad_h, active, _) = tensors
        words = self.read_h(h, row, first)
        given = cute.make_rmem_tensor((4, self.together), Int32)
        given.fill(0)
        for i in range_constexpr(self.together):
            if first + 32 * i < self.vectors:
                offset = self.result_at(row, first + 32 * i)
                self.read(grad_active + offset, given[None, i])
        for i in range_constexpr(self.together):
            at = first + 32 * i
            columns, grads = self.columns(words, i), self.elements(given[None, i])
            weighted = cute.make_rmem_tensor((ROW_VECTOR,), Float32)
            slopes = cute.make_rmem_tensor((self.chunks * ROW_VECTOR,), Float32)
            for j in range_constexpr(ROW_VECTOR):
                value, *by_column = activate_backward(
                    self.node, numbers, *(column[j] for column in columns)
                )
                total = fma(grads[j], value, total)
                weighted[j] = value * weight
                for chunk, slope in enumerate(by_column):
                    place = chunk * ROW_VECTOR + j
                    if const_expr(self.problem.interleaved):
                        place = 2 * j + chunk
                    slopes[place] = grads[j] * weight * slope
            if at < self.vectors:
                self.write_slopes(grad_h, row, at, slopes)
                if active.toint() != 0:
                    self.write(active, self.result_at(row, at), weighted)
        return total

    @cute.jit
    def write_slopes(self, grad_h: cute.Pointer, row: Int32, at: Int32, slopes: cute.Tensor):
        for chunk in range_constexpr(self.chunks):
            part = cute.make_rmem_tensor((ROW_VECTOR,), Float32)
            for j in range_constexpr(ROW_VECTOR):
                part[j] = slopes[chunk * ROW_VECTOR + j]
            self.write(grad_h, self.h_at(row, at, chunk), part)
