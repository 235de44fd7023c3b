"""The combine kernel, a layer's last: sums each token's rows of the product, weighted."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, range_constexpr
from cutlass.cute.math import fma

from emitters.device.dependent import launch_next, wait_for_previous
from emitters.device.memory import ELEMENT, GMEM, VECTOR, vector
from emitters.spec.layer_steps import ROW_VECTOR, CombineProblem, StepConfig
from emitters.templates.parameters import integer, pointer


class Combine:
    """Writes the kernel that sums each token's rows, weighted; a thread takes 8 columns of a token.

    It reads these columns of all the token's rows, 16 bytes at a time, and adds them in float32 in
    the order of the choices, by one fused multiply-add each.
    """

    smem_bytes, cluster = 0, 1

    def __init__(self, problem: CombineProblem, config: StepConfig):
        self.problem, self.config = problem, config
        self.element, self.weight_type = ELEMENT[problem.dtype], ELEMENT[problem.weights]
        self.row_vectors = problem.n // ROW_VECTOR
        self.words = ROW_VECTOR * problem.dtype.bytes // 4  # int32 per 8 columns

    def arguments(self):
        """The arguments of `__call__`, except grid and stream."""
        return (
            pointer("rows", self.element, 16),
            pointer("weights", self.weight_type, self.weight_type.width // 8),
            pointer("inverse", Int32, 4),
            pointer("residual", self.element, 16),
            pointer("out", self.element, 16),
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
        """Sums 8 columns of a token. row[j]: the row of choice j, skipped if outside [0, R)."""
        values = cute.make_rmem_tensor((self.words, self.problem.top_k), Int32)
        values.fill(0)
        for j in range_constexpr(self.problem.top_k):
            if row[j] >= 0 and row[j] < num_rows:
                self.read(rows, row[j], part, values[None, j])
            else:
                weight[j] = Float32(-0.0)  # -0 * 0 = -0 changes no sum, not even -0
        first = cute.make_rmem_tensor((self.words,), Int32)
        first.fill(0)
        if residual.toint() != 0:
            self.read(residual, token, part, first)
        sums = self.elements(first)
        for j in range_constexpr(self.problem.top_k):
            elements = self.elements(values[None, j])
            for i in range_constexpr(ROW_VECTOR):
                sums[i] = fma(weight[j], elements[i], sums[i])
        result = cute.make_rmem_tensor((ROW_VECTOR,), self.element)
        result.store(sums.load().to(self.element))
        target = vector(self.chunk(out, token, part), self.element, ROW_VECTOR, GMEM)
        cute.autovec_copy(result, target)

    def chunk(self, tensor: cute.Pointer, row: Int32, part: Int32):
        """The address of columns 8 * part to 8 * part + 7 of a row."""
        return tensor + (Int64(row) * self.problem.n + part * ROW_VECTOR)

    def elements(self, words: cute.Tensor):
        """Converts the words of 8 columns to float32."""
        elements = cute.make_rmem_tensor((ROW_VECTOR,), Float32)
        elements.store(cute.recast_tensor(words, self.element).load().to(Float32))
        return elements

    @cute.jit
    def read(self, tensor: cute.Pointer, row: Int32, part: Int32, words: cute.Tensor):
        for i in range_constexpr(self.words // 4):
            source = self.chunk(tensor, row, part) + i * (ROW_VECTOR // 2)
            chunk = cute.make_rmem_tensor((4,), Int32)
            cute.autovec_copy(vector(source, Int32, 4, GMEM), chunk)
            for j in range_constexpr(4):
                words[4 * i + j] = chunk[j]
