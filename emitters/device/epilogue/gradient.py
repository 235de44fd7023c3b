"""The gradient of an activation, as the last step of the product that is its result's gradient."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr, range_constexpr
from cutlass.cute.math import fma
from cutlass.experimental import primitives as prims

from emitters.device.epilogue.activations import activate_backward
from emitters.device.epilogue.rows import RowsFragment
from emitters.device.epilogue.store import SliceStore
from emitters.device.memory import ELEMENT, VECTOR, tensor_map_address
from emitters.device.parameters import Gradient, Output
from emitters.spec.config_sm90 import GemmSm90Config, staged_slices
from emitters.spec.epilogue import Activation
from emitters.spec.gemm import GemmProblem
from emitters.spec.staged_sm90 import SLICE_ROWS


class GradientStore(SliceStore):
    """Reads slices of columns before the activation, and stores gradients from where they lay.

    A warp has three slices of 16 rows x 128 bytes (two without a gate): of the output, of gates and
    of ups. It loads those of h by TMA: a tile's first when its main loop starts, all others when
    the stores of those before have read them.
    """

    def __init__(self, problem: GemmProblem, config: GemmSm90Config):
        super().__init__(problem)
        assert problem.gradient is not None
        self.node = Activation(problem.gradient.function)
        self.halves = staged_slices(problem) - 1  # of h
        self.tile_n, self.n_tiles = config.tile_n, config.n_tiles(problem)
        self.element = ELEMENT[problem.out]

    def attach_gradient(self, gradient: Gradient, loaded: cute.Pointer):
        """Binds what is read and written besides the output, and the warp's barrier."""
        self.gradient, self.loaded = gradient, loaded
        self.numbers = [bits.bitcast(Float32) for bits in gradient[-3:] if bits is not None]
        self.rounds = cute.make_rmem_tensor((1,), Int32)  # of loads
        self.rounds[0] = Int32(0)

    def attach(self, output: Output, fragment: RowsFragment, staging: cute.Pointer, lane: Int32):
        super().attach(output, fragment, staging, lane)
        self.halves_target = self.gradient.grad_h, self.gradient.grad_h_map
        count = fragment.token_count
        self.pairs = cute.make_rmem_tensor((count,), Int32)  # of the thread's rows; -1: none
        self.weights = cute.make_rmem_tensor((count,), Float32)
        self.sums = cute.make_rmem_tensor((count,), Float32)

    @cute.jit
    def begin(self, tokens: cute.Tensor, first_row: Int32, first_column: Int32):
        """Finds the pairs of the thread's rows, and starts loading a tile's first slices.

        The four lanes of a row look at every fourth choice of its token. What they read for all
        rows is under way at once, because the warp multiplies nothing meanwhile.
        """
        inverse = cute.make_tensor(self.gradient.inverse, cute.make_layout(VECTOR))
        weights = cute.make_tensor(self.gradient.topk_weights, cute.make_layout(VECTOR))
        count, choices, pairs = self.fragment.token_count, self.gradient.choices, self.pairs
        of_rows = [first_row + self.fragment.token_row(i) for i in range(count)]
        pairs.fill(-1)
        self.sums.fill(0.0)
        for choice in cutlass.range(self.lane % 4, choices, 4, unroll=1):
            found = cute.make_rmem_tensor((count,), Int32)
            for i in range_constexpr(count):
                found[i] = inverse[cutlass.max(tokens[i], 0) * choices + choice]
            for i in range_constexpr(count):
                if tokens[i] >= 0 and found[i] == of_rows[i]:
                    pairs[i] = tokens[i] * choices + choice
        for i in range_constexpr(count):
            for distance in (1, 2):
                pairs[i] = cutlass.max(pairs[i], cute.arch.shuffle_sync_bfly(pairs[i], distance))
            self.weights[i] = weights[cutlass.max(pairs[i], 0)]
        for i in range_constexpr(count):
            self.weights[i] = cutlass.select_(pairs[i] >= 0, self.weights[i], Float32(0.0))
        self.fetch(0, 0, first_row, first_column)

    @cute.jit
    def fetch(
        self,
        m: cutlass.Constexpr,
        part: cutlass.Constexpr,
        first_row: Int32,
        first_column: Int32,
    ):
        """Starts loading the slices of a part when the stores of those before have read them."""
        column = first_column + part * self.slice_columns
        row = first_row + m * 64 + self.fragment.warp_row
        if self.lane == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)
            cute.arch.mbarrier_arrive_and_expect_tx(self.loaded, self.halves * self.slice_bytes)
            for i in range_constexpr(self.halves):
                prims.cp_async_bulk_tensor_shared_cluster_global(
                    self.slice_of_h(i).to_llvm_ptr(),
                    tensor_map_address(self.gradient.h_map).to_llvm_ptr(),
                    [column, Int32(i), row],
                    self.loaded.to_llvm_ptr(),
                    [],
                )

    def slice_of_h(self, i: int) -> cute.Pointer:
        """The staging rows of gates and of ups, or of the columns without a gate."""
        return self.staging + (1 + i) * self.slice_bytes

    def all_slices(self) -> dict[int, cute.Pointer]:
        return {0: self.staging, **{1 + i: self.slice_of_h(i) for i in range(self.halves)}}

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
        cute.arch.mbarrier_wait(self.loaded, self.rounds[0] % 2)
        self.rounds[0] = self.rounds[0] + 1
        for block in range_constexpr(cute.size(values) // 4):
            for half in range_constexpr(2):
                self.differentiate(m, block, half, values)
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        row = first_row + m * 64 + self.fragment.warp_row
        left = rows - m * 64 - self.fragment.warp_row
        self.send(self.all_slices(), row, left, first_column + part * self.slice_columns)
        last_part = part == self.fragment.parts - 1
        following = (m + 1, 0) if last_part else (m, part + 1)
        if left < SLICE_ROWS:
            cute.arch.fence_view_async_shared()
            cute.arch.sync_warp()  # all lanes have stored what TMA did not
        if const_expr(following[0] < self.fragment.m_blocks):
            self.fetch(*following, first_row, first_column)
        if const_expr(last_part):
            self.store_shares(m, first_column)

    @cute.jit
    def differentiate(
        self, m: cutlass.Constexpr, block: cutlass.Constexpr, half: cutlass.Constexpr, values
    ):
        """Turns two neighbouring columns of h into their gradients, where they lie."""
        places = [self.slices.pair(self.slice_of_h(i), 0, block, half) for i in range(self.halves)]
        columns = [self.read(place) for place in places]
        slopes = [cute.make_rmem_tensor((2,), Float32) for _ in places]
        result = cute.make_rmem_tensor((2,), Float32)
        of_row = 2 * m + half
        weight = self.weights[of_row]
        for c in range_constexpr(2):
            gradient = values[4 * block + 2 * half + c]
            value, *by_column = activate_backward(
                self.node, self.numbers, *(column[c] for column in columns)
            )
            self.sums[of_row] = fma(gradient, value, self.sums[of_row])
            result[c] = value * weight
            for slope, by in zip(slopes, by_column, strict=True):
                slope[c] = gradient * weight * by
        for place, slope in zip(places, slopes, strict=True):
            self.write(place, slope)
        self.write(self.slices.pair(self.staging, 0, block, half), result)

    def read(self, place: cute.Tensor) -> cute.Tensor:
        pair = cute.make_rmem_tensor((2,), self.element)
        cute.autovec_copy(place, cute.recast_tensor(pair, Int32))
        found = cute.make_rmem_tensor((2,), Float32)
        found.store(pair.load().to(Float32))
        return found

    def write(self, place: cute.Tensor, values: cute.Tensor):
        pair = cute.make_rmem_tensor((2,), self.element)
        pair.store(values.load().to(self.element))
        cute.autovec_copy(cute.recast_tensor(pair, Int32), place)

    @cute.jit
    def store_shares(self, m: cutlass.Constexpr, first_column: Int32):
        """Stores the tile's share of the gradient of its rows' weights."""
        shares = cute.make_tensor(self.gradient.shares, cute.make_layout(VECTOR))
        for half in range_constexpr(2):
            total, pair = self.sums[2 * m + half], self.pairs[2 * m + half]
            for distance in (1, 2):
                total = total + cute.arch.shuffle_sync_bfly(total, distance)
            if pair >= 0 and self.lane % 4 == 0:
                shares[pair * self.n_tiles + first_column // self.tile_n] = total
