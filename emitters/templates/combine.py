"""The combine kernel, a layer's last: sums each token's rows of the product, weighted."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr, range_constexpr
from cutlass.cute.math import fma

from emitters.device.dependent import launch_next, wait_for_previous
from emitters.device.memory import ELEMENT, GMEM, VECTOR, vector
from emitters.spec.layer_steps import CombineProblem, StepConfig
from emitters.templates.parameters import integer, pointer


class Combine:
    """Writes the kernel that sums each token's rows, weighted; a thread takes 16 bytes of each.

    It reads these columns of all the token's rows, and adds them in float32 in the order of the
    choices, by one fused multiply-add each.
    """

    smem_bytes, cluster = 0, 1

    def __init__(self, problem: CombineProblem, config: StepConfig):
        self.problem, self.config = problem, config
        self.row_type, self.out_type = ELEMENT[problem.rows], ELEMENT[problem.out]
        self.weight_type = ELEMENT[problem.weights]
        self.columns = problem.columns
        self.row_vectors = problem.n // self.columns

    def arguments(self):
        """The arguments of `__call__`, except grid and stream."""
        return (
            pointer("rows", self.row_type, 16),
            pointer("weights", self.weight_type, self.weight_type.width // 8),
            pointer("inverse", Int32, 4),
            pointer("residual", self.out_type, 16),
            pointer("out", self.out_type, 16),
            integer("num_rows"),
            integer("num_tokens"),
            integer("weight_stride"),
        )

    def tensor_maps(self):
        return ()

    @cute.jit
    def __call__(
        self, rows, weights, inverse, residual, out, num_rows, num_tokens, weight_stride, grid,
        stream,
    ):  # fmt: skip
        """weights, residual: may be null; without weights all are 1. weight_stride: elements from
        a token's weights to the next token's. weights and inverse are read before
        `wait_for_previous`.

        grid: `CombineProblem.ctas`.
        """
        self.kernel(
            rows, weights, inverse, residual, out, num_rows, num_tokens, weight_stride
        ).launch(
            grid=[grid, 1, 1],
            block=[self.config.threads, 1, 1],
            min_blocks_per_mp=1,  # else the compiler saves registers and reads rows one by one
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        rows: cute.Pointer,
        weights: cute.Pointer,
        inverse: cute.Pointer,
        residual: cute.Pointer,
        out: cute.Pointer,
        num_rows: Int32,
        num_tokens: Int32,
        weight_stride: Int32,
    ):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        at = block * self.config.threads + thread
        token, part = at // self.row_vectors, at % self.row_vectors
        count = self.problem.top_k
        row = cute.make_rmem_tensor((count,), Int32)
        weight = cute.make_rmem_tensor((count,), Float32)
        row.fill(-1)
        if token < num_tokens:
            for j in range_constexpr(count):
                pair = token * count + j
                row[j] = cute.make_tensor(inverse, cute.make_layout(VECTOR))[pair]
                weight[j] = Float32(1.0)
                if weights.toint() != 0:
                    given = cute.make_tensor(weights, cute.make_layout(VECTOR))
                    weight[j] = Float32(given[token * weight_stride + j])
        wait_for_previous()
        launch_next()
        if token < num_tokens:
            self.sum(rows, residual, out, num_rows, token, part, row, weight)

    @cute.jit
    def sum(
        self,
        rows: cute.Pointer,
        residual: cute.Pointer,
        out: cute.Pointer,
        num_rows: Int32,
        token: Int32,
        part: Int32,
        row: cute.Tensor,
        weight: cute.Tensor,
    ):
        """Sums part of a token's columns. row[j]: the row of choice j, skipped outside [0, R)."""
        values = cute.make_rmem_tensor((self.words(self.row_type), self.problem.top_k), Int32)
        values.fill(0)
        for j in range_constexpr(self.problem.top_k):
            if row[j] >= 0 and row[j] < num_rows:
                self.read(rows, row[j], part, values[None, j])
            else:
                weight[j] = Float32(-0.0)  # -0 * 0 = -0 changes no sum, not even -0
        first = cute.make_rmem_tensor((self.words(self.out_type),), Int32)
        first.fill(0)
        if residual.toint() != 0:
            self.read(residual, token, part, first)
        sums = self.elements(first, self.out_type)
        for j in range_constexpr(self.problem.top_k):
            elements = self.elements(values[None, j], self.row_type)
            for i in range_constexpr(self.columns):
                sums[i] = fma(weight[j], elements[i], sums[i])
        result = cute.make_rmem_tensor((self.columns,), self.out_type)
        result.store(sums.load().to(self.out_type))
        target = vector(self.chunk(out, token, part), self.out_type, self.columns, GMEM)
        cute.autovec_copy(result, target)

    def chunk(self, tensor: cute.Pointer, row: Int32, part: Int32):
        """The address of a part of a row's columns."""
        return tensor + (Int64(row) * self.problem.n + part * self.columns)

    def words(self, element):
        """The number of int32 that a part's columns take in this type."""
        return self.columns * element.width // 32

    def elements(self, words: cute.Tensor, element):
        """Converts the words of a part, of this type, to float32."""
        elements = cute.make_rmem_tensor((self.columns,), Float32)
        elements.store(cute.recast_tensor(words, element).load().to(Float32))
        return elements

    @cute.jit
    def read(self, tensor: cute.Pointer, row: Int32, part: Int32, words: cute.Tensor):
        count = const_expr(min(4, cute.size(words)))  # at a time
        for i in range_constexpr(cute.size(words) // count):
            source = self.chunk(tensor, row, part) + i * (self.columns // 2)
            chunk = cute.make_rmem_tensor((count,), Int32)
            cute.autovec_copy(vector(source, Int32, count, GMEM), chunk)
            for j in range_constexpr(count):
                words[count * i + j] = chunk[j]
