"""The quantisation kernel with a scale per group: rows -> 8-bit values, a float32 per 128 of K."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, range_constexpr

from emitters.device.dependent import launch_next, wait_for_previous
from emitters.device.memory import ELEMENT, GMEM, VECTOR, vector
from emitters.device.rounding import Divisor, largest_magnitude, narrow, round_up_to_power_of_two
from emitters.spec.dtypes import LARGEST
from emitters.spec.gemm import K_BLOCK
from emitters.spec.layer_steps import (
    GROUPS_PER_THREAD,
    ROW_VECTOR,
    QuantizeGroupsProblem,
    StepConfig,
)
from emitters.templates.parameters import integer, pointer, several

_THREADS = K_BLOCK // ROW_VECTOR  # per group


class QuantizeGroups:
    """Writes the kernel that quantises rows with a scale per 128 of K.

    Sixteen neighbouring threads take a group, eight values each, and find its largest magnitude by
    shuffles. Each takes GROUPS_PER_THREAD groups and reads them all first, so that many reads are
    under way. Groups are numbered along the rows. The last group of a row may be shorter.
    """

    cluster = 1
    smem_bytes = 0

    def __init__(self, problem: QuantizeGroupsProblem, config: StepConfig):
        self.problem, self.config = problem, config
        self.source = ELEMENT[problem.source]
        self.words = ROW_VECTOR * problem.source.bytes // 4  # int32 per thread and group
        self.groups = config.threads // _THREADS  # per CTA, at a time
        self.columns = problem.k + ROW_VECTOR * problem.padded  # of q

    def arguments(self):
        """The arguments of `__call__`, except grid and stream."""
        return (
            pointer("source", Uint8, 16),
            pointer("end", Int32, 4),
            pointer("q", Uint8, ROW_VECTOR),
            several(
                pointer("scale", Float32, 4), integer("scale_stride"), integer("scale_k_stride")
            ),
            integer("num_rows"),
            integer("source_stride"),
            integer("power_of_two"),
            integer("early"),
        )

    def tensor_maps(self):
        return ()

    @cute.jit
    def __call__(
        self, source, end, q, scales, num_rows, source_stride, power_of_two, early, grid, stream
    ):
        """end, early, source_stride: as in `Quantize`. scales: their address, and the elements from
        a row's scale to the next row's and to the same row's next. power_of_two: nonzero to round
        scales up to powers of two.

        grid: `QuantizeGroupsProblem.ctas`.
        """
        self.kernel(source, end, q, scales, num_rows, source_stride, power_of_two, early).launch(
            grid=[grid, 1, 1], block=[self.config.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        source: cute.Pointer,
        end: cute.Pointer,
        q: cute.Pointer,
        scales: tuple,
        num_rows: Int32,
        source_stride: Int32,
        power_of_two: Int32,
        early: Int32,
    ):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        if end.toint() != 0:
            num_rows = min(num_rows, cute.make_tensor(end, cute.make_layout(VECTOR))[0])
        launch_next()
        if early == 0:
            wait_for_previous()
        first = block * (self.groups * GROUPS_PER_THREAD) + thread // _THREADS
        count = num_rows * self.problem.groups
        lane = thread % _THREADS
        values = cute.make_rmem_tensor((GROUPS_PER_THREAD * self.words,), Int32)
        values.fill(0)
        for i in range_constexpr(GROUPS_PER_THREAD):
            group = first + i * self.groups
            if group < count:
                row, column = self.place(group, lane)
                if column < self.problem.k:
                    at = source + (Int64(row) * source_stride + column * self.problem.source.bytes)
                    for part in range_constexpr(self.words // 4):
                        words = cute.make_rmem_tensor((4,), Int32)
                        cute.autovec_copy(vector(at + 16 * part, Int32, 4, GMEM), words)
                        for j in range_constexpr(4):
                            values[i * self.words + 4 * part + j] = words[j]
        for i in range_constexpr(GROUPS_PER_THREAD):
            group = first + i * self.groups
            elements = self.elements(values, i)
            largest = largest_magnitude((elements[j] for j in range(ROW_VECTOR)), (8, 4, 2, 1))
            divisor = largest / LARGEST[self.problem.target]
            if divisor == 0:  # a group of zeros, or so small that the division gives 0
                divisor = Float32(1.0)
            if power_of_two != 0:
                divisor = round_up_to_power_of_two(divisor)
            Divisor(divisor).divide(elements)
            if group < count:
                row, column = self.place(group, lane)
                if column < self.columns:  # zeros from K on
                    target = q + (Int64(row) * self.columns + column)
                    quantized = narrow(elements, self.problem.target)
                    cute.autovec_copy(quantized, vector(target, Int32, 2, GMEM))
                if lane == 0:
                    scale, stride, k_stride = scales
                    at = Int64(row) * stride + Int64(column // K_BLOCK) * k_stride
                    cute.make_tensor(scale + at, cute.make_layout(1))[0] = divisor
        if early != 0:
            wait_for_previous()

    def place(self, group: Int32, lane: Int32):
        """The row of a group, and the thread's first column."""
        row = group // self.problem.groups
        return row, group % self.problem.groups * K_BLOCK + lane * ROW_VECTOR

    def elements(self, values: cute.Tensor, i: int):
        """The thread's values of its i-th group, converted to float32."""
        words = cute.make_rmem_tensor((self.words,), Int32)
        for j in range(self.words):
            words[j] = values[i * self.words + j]
        elements = cute.make_rmem_tensor((ROW_VECTOR,), Float32)
        elements.store(cute.recast_tensor(words, self.source).load().to(Float32))
        return elements
