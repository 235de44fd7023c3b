"""The store of a quantised output: 8-bit values with a float32 scale per row and 128 columns."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from emitters.device.epilogue.store import SliceStore
from emitters.device.rounding import largest_magnitude
from emitters.spec.dtypes import LARGEST
from emitters.spec.gemm import K_BLOCK

_LEAST_SCALE = 2.0**-126  # the least float32 whose inverse is finite: smaller groups become zeros


class GroupStore(SliceStore):
    """Stores slices of 16 rows x 128 bytes, whose 128 values of a row share a scale: a group.

    A row's values are in four lanes, which find the largest magnitude by shuffles. They multiply by
    the scale's inverse, where `QuantizeGroups` divides: a value next to the middle between two
    8-bit ones may become the other one.
    """

    def put(
        self,
        m: int,
        part: int,
        output: int,
        values: cute.Tensor,
        first_row: Int32,
        rows: Int32,
        first_column: Int32,
    ):
        """As in `Store`. The parts of a slice wait for the last one, with which they are stored."""
        in_slice = part % self.slice_parts
        self.waiting = [values] if in_slice == 0 else [*self.waiting, values]
        if in_slice < self.slice_parts - 1:
            return
        scales = [self.scale(half) for half in range(2)]
        inverses = [1.0 / scale for scale in scales]
        for i, waiting in enumerate(self.waiting):
            for j in range(cute.size(waiting)):
                waiting[j] = waiting[j] * inverses[j // 2 % 2]
            first = part - in_slice
            super().put(m, first + i, output, waiting, first_row, rows, first_column)
        group = first_column // K_BLOCK + part // self.slice_parts
        for half, scale in enumerate(scales):
            row = m * 64 + self.fragment.row + 8 * half
            self.store_scale(scale, first_row + row, row < rows, group)

    def scale(self, half: int) -> Float32:
        """The scale of the thread's row in a half of the 16; 1 for a group of zeros."""
        of_row = (
            values[j]
            for values in self.waiting
            for j in range(cute.size(values))
            if j // 2 % 2 == half
        )
        scale = largest_magnitude(of_row, (1, 2)) / LARGEST[self.problem.out]
        return cutlass.select_(scale < _LEAST_SCALE, Float32(1.0), scale)

    @cute.jit
    def store_scale(self, scale: Float32, row: Int32, in_expert: cutlass.Boolean, group: Int32):
        """Stores a row's scale of a group, by one of its four lanes. row: of the output."""
        store = in_expert and self.lane % 4 == 0
        if const_expr(self.fragment.has_n_tail):
            store = store and group * K_BLOCK < self.problem.out_columns
        if store:
            at = Int64(row) * self.output.scale_stride + Int64(group) * self.output.scale_k_stride
            target = cute.make_tensor(self.output.scale + at, cute.make_layout(1))
            target[0] = scale
