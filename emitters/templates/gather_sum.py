"""The kernel that sums groups of rows of any size: the gradient of rows that were gathered."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, range_constexpr

from emitters.device.dependent import launch_next, wait_for_previous
from emitters.device.memory import ELEMENT, GMEM, VECTOR, vector
from emitters.spec.layer_steps import GatherSumProblem, StepConfig
from emitters.templates.parameters import integer, pointer

_TOGETHER = 4  # rows that a thread reads before it adds the first


class GatherSum:
    """Writes the kernel that sums the rows of each group; a thread takes 16 bytes of each.

    It adds them in float32, in the order in which the group names them, and reads several before it
    adds the first.
    """

    smem_bytes, cluster = 0, 1

    def __init__(self, problem: GatherSumProblem, config: StepConfig):
        self.problem, self.config = problem, config
        self.row_type, self.out_type = ELEMENT[problem.rows], ELEMENT[problem.out]
        self.columns = problem.columns
        self.row_vectors = problem.n // self.columns

    def arguments(self):
        """The arguments of `__call__`, except grid and stream."""
        return (
            pointer("rows", self.row_type, 16),
            pointer("order", Int32, 4),
            pointer("bounds", Int32, 4),
            pointer("out", self.out_type, 16),
            integer("num_groups"),
        )

    def tensor_maps(self):
        return ()

    @cute.jit
    def __call__(self, rows, order, bounds, out, num_groups, grid, stream):
        """Group g has the rows order[bounds[g]] to order[bounds[g + 1] - 1].

        grid: `GatherSumProblem.ctas`.
        """
        self.kernel(rows, order, bounds, out, num_groups).launch(
            grid=[grid, 1, 1], block=[self.config.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        rows: cute.Pointer,
        order: cute.Pointer,
        bounds: cute.Pointer,
        out: cute.Pointer,
        num_groups: Int32,
    ):
        wait_for_previous()
        launch_next()
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        at = block * self.config.threads + thread
        group, part = at // self.row_vectors, at % self.row_vectors
        if group < num_groups:
            bound = cute.make_tensor(bounds, cute.make_layout(VECTOR))
            end = bound[group + 1]
            sums = cute.make_rmem_tensor((self.columns,), Float32)
            sums.fill(0.0)
            for first in cutlass.range(bound[group], end, _TOGETHER, unroll=1):
                self.add(rows, order, (first, end), part, sums)
            result = cute.make_rmem_tensor((self.columns,), self.out_type)
            result.store(sums.load().to(self.out_type))
            target = vector(self.chunk(out, group, part), self.out_type, self.columns, GMEM)
            cute.autovec_copy(result, target)

    @cute.jit
    def add(self, rows: cute.Pointer, order: cute.Pointer, span, part: Int32, sums: cute.Tensor):
        """Adds the thread's columns of the next rows of a group, which ends where the span does."""
        first, end = span
        words = cute.make_rmem_tensor((4, _TOGETHER), Int32)
        words.fill(0)
        for i in range_constexpr(_TOGETHER):
            if first + i < end:
                row = cute.make_tensor(order, cute.make_layout(VECTOR))[first + i]
                found = cute.make_rmem_tensor((4,), Int32)
                cute.autovec_copy(vector(self.chunk(rows, row, part), Int32, 4, GMEM), found)
                for j in range_constexpr(4):
                    words[j, i] = found[j]
        for i in range_constexpr(_TOGETHER):
            if first + i < end:
                dense = cute.make_rmem_tensor((4,), Int32)
                for j in range_constexpr(4):
                    dense[j] = words[j, i]
                values = cute.recast_tensor(dense, self.row_type).load().to(Float32)
                sums.store(sums.load() + values)

    def chunk(self, tensor: cute.Pointer, row: Int32, part: Int32):
        """The address of a part of a row's columns."""
        return tensor + (Int64(row) * self.problem.n + part * self.columns)
