"""The epilogue visitor: what happens to an accumulator tile between the last WGMMA and global
memory.

A node knows its tensor, its load and its formula, and is called at two points of a tile, in the
order of `problem.epilogue`:

  load     some k-steps before the last, whose WGMMAs hide the latency
  apply    on the float32 values of part `part` of the thread's m-th 64 rows; returns new ones

An activation, which reads no tensor, comes last (emitters/activations.py). Where it is gated,
blocks of 8 columns of the accumulators alternate between gate and up: a thread holds both of an
output.

A new node is a dataclass in `problem`, a class here and its entry in `NODES`; the templates know
none.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr, range_constexpr
from cutlass.experimental import primitives as prims

from emitters.device.epilogue.activations import activate
from emitters.device.memory import ELEMENT, GMEM, SMEM, VECTOR, vector
from emitters.device.weights import tensor_map_address
from emitters.spec.config_sm90 import SLICE_BYTES, SLICE_ROWS, GemmSm90Config
from emitters.spec.dtypes import DType
from emitters.spec.gemm import (
    N_MAJOR_BLOCK,
    Bias,
    EpilogueNode,
    GemmProblem,
    Granularity,
    Major,
)

CHUNK = 16  # bytes of one global store
_FEW_CHANNELS = 8  # that a thread keeps of a bias from `load` on


class Fragment:
    """Which part of a tile a consumer thread's accumulator holds.

    WGMMA gives a thread two rows of 64, 8 apart, and of every 8 columns two neighbours: register
    m * tile_n / 2 + 4 * block + 2 * half + c is row 64 * m + 8 * half + `row`, column
    8 * block + `column` + c. Where gated, the blocks 2 * b and 2 * b + 1 are gate and up of the
    b-th 8 outputs; of N-major weights eight blocks and the next eight are, whose registers
    `register` has in that order.
    """

    def __init__(self, problem: GemmProblem, config: GemmSm90Config, warp_row: Int32, lane: Int32):
        self.warp_row = warp_row  # first of the warp's 16 rows of the tile, or of every 64
        self.row = self.warp_row + lane // 4
        self.m_blocks = config.warpgroup_rows // 64
        self.column = lane % 4 * 2
        self.blocks = config.tile_n // 8
        self.gated = problem.gated
        self.by_blocks = problem.gated and problem.weight.major is Major.N  # gate and up
        self.part_blocks = SLICE_BYTES // problem.out.bytes // 8
        self.n, self.out_columns = problem.n, problem.out_columns
        self.has_n_tail = problem.n % config.tile_n != 0
        self.strides = None  # of a gated problem's channels, see `gate_strides`
        self.token_count = 2 * self.m_blocks  # rows whose tokens a thread reads
        self.channel_count = 2 * self.blocks  # columns of the tile that a thread holds
        self.part_channels = 2 * self.part_blocks  # and of a part

    def register(self, i: int) -> int:
        """Of the accumulators, which is the i-th where blocks are gate and up by turns."""
        if not self.by_blocks:
            return i
        block, c = divmod(i, 4)
        box = N_MAJOR_BLOCK // 8  # blocks of one
        two, in_pairs = divmod(block, 2 * box)
        return 4 * (2 * box * two + box * (in_pairs % 2) + in_pairs // 2) + c

    def token_row(self, i: int):
        """Row of the tile whose token a thread reads as its i-th."""
        return self.row + i // 2 * 64 + i % 2 * 8

    def by_row(self, values: cute.Tensor, m: int, part: int):
        """values[token_count] -> for each register of a part, its row's."""
        return [values[2 * m + i // 2 % 2] for i in range(4 * self.part_blocks)]

    def by_channel(self, values: cute.Tensor, m: int, part: int):
        """values[channel_count] -> for each register of a part, its column's."""
        first = part * self.part_channels
        if self.gated:
            return [self.gate_or_up(values, first, i) for i in range(4 * self.part_blocks)]
        return [values[first + i // 4 * 2 + i % 2] for i in range(4 * self.part_blocks)]

    def gate_pairs(self, count: int) -> list[tuple[int, int]]:
        """Of `count` registers of a part, those of gate and up for each output."""
        return [(i, i + 4) for block in range(0, count, 8) for i in range(block, block + 4)]

    def read_channels(
        self,
        pointer: cute.Pointer,
        values: cute.Tensor,
        first: int,
        expert: Int32,
        first_column: Int32,
    ):
        """[E, N] values of the thread's columns from its `first` on; past N none are read."""
        if self.gated:
            self.read_gate_and_up(pointer, values, first, expert, first_column)
        else:
            self.read_pairs(pointer, values, first, expert, first_column)

    @cute.jit
    def read_gate_and_up(
        self,
        pointer: cute.Pointer,
        values: cute.Tensor,
        first: cutlass.Constexpr,
        expert: Int32,
        first_column: Int32,
    ):
        """Of two neighbouring outputs, gates and ups or, interleaved, one's and the other's."""
        column_stride, gate_stride = self.strides
        second = gate_stride
        if gate_stride == 1:
            second = Int32(2)
        column = first_column + first // 4 * 8 + self.column
        source = pointer + (expert * self.n + column * column_stride)
        for pairs in range_constexpr(cute.size(values) // 4):
            four = cute.make_rmem_tensor((2, 2), pointer.dtype)
            four.fill(0)
            if const_expr(self.has_n_tail):
                if column + pairs * 8 < self.out_columns:
                    for i in range_constexpr(2):
                        pair = vector(source + i * second, pointer.dtype, 2, GMEM)
                        cute.autovec_copy(pair, four[None, i])
            else:
                for i in range_constexpr(2):
                    pair = vector(source + i * second, pointer.dtype, 2, GMEM)
                    cute.autovec_copy(pair, four[None, i])
            for i in range_constexpr(4):
                values[4 * pairs + i] = four[i]
            source = source + 8 * column_stride

    def gate_or_up(self, values: cute.Tensor, first: int, register: int):
        """What `read_gate_and_up` found for a part's register. Not sooner than it is needed."""
        half, c = register // 4 % 2, register % 2
        four = first + register // 8 * 4
        halves, interleaved = values[four + 2 * half + c], values[four + 2 * c + half]
        if half == c:
            return halves
        chosen = cutlass.select_(self.strides[1] == 1, interleaved, halves)
        return values.element_type(chosen)

    @cute.jit
    def read_pairs(
        self,
        pointer: cute.Pointer,
        values: cute.Tensor,
        first: cutlass.Constexpr,
        expert: Int32,
        first_column: Int32,
    ):
        """Two neighbours at a time."""
        for block in range_constexpr(cute.size(values) // 2):
            column = first_column + (first // 2 + block) * 8 + self.column
            pair = cute.make_rmem_tensor((2,), pointer.dtype)
            pair.fill(0)
            source = pointer + (expert * self.n + column)
            if const_expr(self.has_n_tail):
                if column < self.n:
                    cute.autovec_copy(vector(source, pointer.dtype, 2, GMEM), pair)
            else:
                cute.autovec_copy(vector(source, pointer.dtype, 2, GMEM), pair)
            values[2 * block] = pair[0]
            values[2 * block + 1] = pair[1]


class PerTokenScaleNode:
    def __init__(self, node: Granularity, fragment: Fragment, scale: cute.Pointer):
        self.fragment = fragment
        self.scale = cute.make_tensor(scale, cute.make_layout(VECTOR))
        self.values = cute.make_rmem_tensor((fragment.token_count,), Float32)

    @cute.jit
    def load(self, tokens: cute.Tensor, expert: Int32, first_column: Int32):
        for i in range_constexpr(self.fragment.token_count):
            value = Float32(0.0)
            if tokens[i] >= 0:
                value = self.scale[tokens[i]]
            self.values[i] = value

    def apply(self, m: int, part: int, values: cute.Tensor, expert: Int32, first_column: Int32):
        for i, scale in enumerate(self.fragment.by_row(self.values, m, part)):
            values[i] = values[i] * scale
        return values


class ChannelScaleNode:
    def __init__(self, node: Granularity, fragment: Fragment, scale: cute.Pointer):
        self.fragment, self.scale = fragment, scale
        self.values = cute.make_rmem_tensor((fragment.channel_count,), Float32)

    def load(self, tokens: cute.Tensor, expert: Int32, first_column: Int32):
        self.fragment.read_channels(self.scale, self.values, 0, expert, first_column)

    def apply(self, m: int, part: int, values: cute.Tensor, expert: Int32, first_column: Int32):
        for i, scale in enumerate(self.fragment.by_channel(self.values, m, part)):
            values[i] = values[i] * scale
        return values


class ExpertScaleNode:
    def __init__(self, node: Granularity, fragment: Fragment, scale: cute.Pointer):
        self.scale = cute.make_tensor(scale, cute.make_layout(VECTOR))
        self.value = cute.make_rmem_tensor((1,), Float32)

    def load(self, tokens: cute.Tensor, expert: Int32, first_column: Int32):
        self.value[0] = self.scale[expert]

    def apply(self, m: int, part: int, values: cute.Tensor, expert: Int32, first_column: Int32):
        for i in range(cute.size(values)):
            values[i] = values[i] * self.value[0]
        return values


class BiasNode:
    """Read part by part where registers do not hold a tile's bias beside its scales."""

    def __init__(self, node: Bias, fragment: Fragment, bias: cute.Pointer):
        self.fragment, self.bias = fragment, bias
        self.late = fragment.channel_count > _FEW_CHANNELS
        count = fragment.part_channels if self.late else fragment.channel_count
        self.values = cute.make_rmem_tensor((count,), bias.dtype)

    def load(self, tokens: cute.Tensor, expert: Int32, first_column: Int32):
        if not self.late:
            self.fragment.read_channels(self.bias, self.values, 0, expert, first_column)

    def apply(self, m: int, part: int, values: cute.Tensor, expert: Int32, first_column: Int32):
        f = self.fragment
        if self.late:
            first = part * f.part_channels
            f.read_channels(self.bias, self.values, first, expert, first_column)
        for i, bias in enumerate(f.by_channel(self.values, m, 0 if self.late else part)):
            values[i] = values[i] + bias.to(Float32)
        return values


NODES = {
    Granularity.TOKEN: PerTokenScaleNode,
    Granularity.CHANNEL: ChannelScaleNode,
    Granularity.EXPERT: ExpertScaleNode,
    Bias: BiasNode,
}


def tensor_nodes(problem: GemmProblem):
    """The scales and the nodes that read a tensor, in the order in which they are applied."""
    scales = [scale for scale in (problem.x_scale, problem.weight_scale) if scale]
    return [*scales, *(node for node in problem.epilogue if node.operand)]


def node_operand(node: Granularity | EpilogueNode) -> str:
    """The name of the tensor a node reads."""
    if isinstance(node, Granularity):
        return "per_token_scale" if node is Granularity.TOKEN else "scale"
    return node.operand


def node_element(node: Granularity | EpilogueNode) -> type:
    """Element type of the tensor a node reads."""
    return Float32 if isinstance(node, Granularity) else ELEMENT[node.element]


class Epilogue:
    """Runs the nodes over a consumer warp's part of a tile and stores it.

    A part is as many columns of the accumulators as make a slice, 128 bytes of a row; where gated,
    half of one. Slices go through 16 staging rows of the warp's own, in the 128-byte swizzle:
    no other warp is waited for. A TMA store takes them from there. Where the expert ends within the
    16 rows, lanes store them instead, 16 bytes each and eight lanes a row. Columns past N are not
    stored; a row whose index lies outside [0, T) is stored as zeros.
    """

    def __init__(self, problem: GemmProblem, config: GemmSm90Config):
        self.problem, self.config = problem, config
        self.element = ELEMENT[problem.out]
        self.slice_columns = SLICE_BYTES // problem.out.bytes
        self.parts = config.tile_n // self.slice_columns
        self.slice_parts = 2 if problem.gated else 1
        self.staging_bytes = SLICE_ROWS * SLICE_BYTES  # of a warp

    def make_fragment(self, warp: Int32, lane: Int32):
        warp_of_tile = warp % (4 * self.config.warpgroups_per_tile)
        return Fragment(self.problem, self.config, warp_of_tile * 16, lane)

    def attach(
        self, node_tensors, gate_strides, out, out_map, index, num_tokens, staging, warp, lane
    ):
        """gate_strides: of a gated problem's channels, else None. staging: staging_bytes of shared
        memory for each consumer warp. warp: its number among them."""
        self.fragment = self.make_fragment(warp, lane)
        self.fragment.strides = gate_strides
        self.nodes = [
            NODES[node if isinstance(node, Granularity) else type(node)](
                node, self.fragment, tensor
            )
            for node, tensor in zip(tensor_nodes(self.problem), node_tensors or (), strict=True)
        ]
        self.out, self.out_map = out, out_map
        self.index, self.num_tokens, self.lane = index, num_tokens, lane
        self.staging = staging + warp * self.staging_bytes
        self.tokens = cute.make_rmem_tensor((self.fragment.token_count,), Int32)

    @cute.jit
    def begin(self, first_row: Int32, rows: Int32):
        """As a tile's main loop starts: asks for the tokens of the thread's rows."""
        for i in range_constexpr(cute.size(self.tokens)):
            row = self.fragment.token_row(i)
            token = Int32(-1)
            if row < rows:
                token = first_row + row
                if const_expr(self.problem.gather):
                    token = cute.make_tensor(self.index, cute.make_layout(VECTOR))[first_row + row]
            self.tokens[i] = token

    def out_column(self, column: Int32) -> Int32:
        """Of the output, where a tile starts at `column` of N."""
        return column // 2 if self.problem.gated else column

    @cute.jit
    def load(self, expert: Int32, column: Int32):
        """column: of N, the tile's first."""
        first_column = self.out_column(column)
        tokens = self.tokens
        for i in range_constexpr(cute.size(tokens)):
            if tokens[i] >= self.num_tokens:
                tokens[i] = Int32(-1)
        for node in self.nodes:
            node.load(self.tokens, expert, first_column)

    @cute.jit
    def store(self, acc: cute.Tensor, expert: Int32, first_row: Int32, rows: Int32, column: Int32):
        first_column = self.out_column(column)
        count = 4 * self.fragment.part_blocks
        missing = self.some_missing()
        for i in range_constexpr(self.fragment.m_blocks * self.parts):
            m, part = i // self.parts, i % self.parts
            values = cute.make_rmem_tensor((count,), Float32)
            for j in range_constexpr(count):
                values[j] = acc[self.fragment.register(i * count + j)].to(Float32)
            for node in self.nodes:
                values = node.apply(m, part, values, expert, first_column)
            if const_expr(self.problem.gather):
                self.clear_missing(m, part, missing, values)
            if const_expr(self.problem.activation is not None):
                values = self.activate(values)
            self.put(m, part, values, first_row, rows, first_column)

    def activate(self, values: cute.Tensor):
        """-> of each output; zero of zeros, so that rows without a token stay zero"""
        count = cute.size(values)
        columns = [(i,) for i in range(count)]
        if self.problem.gated:
            columns = self.fragment.gate_pairs(count)
        result = cute.make_rmem_tensor((len(columns),), Float32)
        for i, registers in enumerate(columns):
            result[i] = activate(self.problem.activation, *(values[r] for r in registers))
        return result

    @cute.jit
    def put(
        self,
        m: cutlass.Constexpr,
        part: cutlass.Constexpr,
        values: cute.Tensor,
        first_row: Int32,
        rows: Int32,
        first_column: Int32,
    ):
        """A part by way of shared memory to its place: where it ends a slice, with that."""
        in_slice = part % self.slice_parts
        if const_expr(in_slice == 0):
            if self.lane == 0:
                cute.arch.cp_async_bulk_wait_group(0, read=True)
            cute.arch.sync_warp()  # the slice before has left shared memory
        self.stage(values, in_slice * (SLICE_BYTES // CHUNK // self.slice_parts))
        if const_expr(in_slice == self.slice_parts - 1):
            cute.arch.fence_view_async_shared()
            cute.arch.sync_warp()
            self.send(
                first_row + m * 64 + self.fragment.warp_row,
                rows - m * 64 - self.fragment.warp_row,
                first_column + part // self.slice_parts * self.slice_columns,
            )

    def stage(self, values: cute.Tensor, first: int = 0):
        """Into the warp's own staging rows, from their chunk `first` on."""
        if self.problem.out is DType.FP32:
            self.stage_words(values, first)
        else:
            self.stage_matrices(values, first)

    @cute.jit
    def finish(self):
        """After the last tile: shared memory outlives the stores that read it."""
        if self.lane == 0:
            cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def send(self, first_row: Int32, rows: Int32, first_column: Int32):
        """rows: from first_row to the expert's end."""
        if rows >= SLICE_ROWS:
            if self.lane == 0:
                prims.cp_async_bulk_tensor_global_shared_cta(
                    tensor_map_address(self.out_map).to_llvm_ptr(),
                    self.staging.to_llvm_ptr(),
                    [first_column, first_row],
                )
                cute.arch.cp_async_bulk_commit_group()
        else:
            self.copy_out(first_row, rows, first_column)

    def some_missing(self):
        """Not zero where a row of the warp has no token."""
        missing = self.tokens[0] < 0
        for i in range(1, cute.size(self.tokens)):
            missing = missing | (self.tokens[i] < 0)
        return cute.arch.vote_ballot_sync(missing)

    @cute.jit
    def clear_missing(
        self,
        m: cutlass.Constexpr,
        part: cutlass.Constexpr,
        missing: Int32,
        values: cute.Tensor,
    ):
        """Rows of an index outside [0, T): not even the weights' NaNs are left."""
        if missing != 0:
            tokens = self.fragment.by_row(self.tokens, m, part)
            for i in range_constexpr(cute.size(values)):
                if tokens[i] < 0:
                    values[i] = Float32(0.0)

    def chunk(self, row: Int32, chunk: Int32):
        """Where 16 bytes of a slice lie: the 128-byte swizzle of a 1024-byte aligned buffer."""
        return self.staging + (row * SLICE_BYTES + (chunk ^ (row % 8)) * CHUNK)

    @cute.jit
    def stage_matrices(self, values: cute.Tensor, first: cutlass.Constexpr):
        """16-bit outputs: two blocks of 8 columns and both row halves in one stmatrix."""
        for pair in range_constexpr(cute.size(values) // 8):
            part = cute.make_rmem_tensor((8,), Float32)
            packed = cute.make_rmem_tensor((8,), self.element)
            for i in range_constexpr(8):
                part[i] = values[8 * pair + i]
            packed.store(part.load().to(self.element))
            words = cute.recast_tensor(packed, Int32)
            target = self.chunk(self.lane % 16, first + 2 * pair + self.lane // 16)
            prims.stmatrix(
                target.to_llvm_ptr(),
                [words[0], words[1], words[2], words[3]],
                prims.MMALayout.ROW,
            )

    @cute.jit
    def stage_words(self, values: cute.Tensor, first: cutlass.Constexpr):
        """float32 outputs: a thread's two neighbours at once."""
        f = self.fragment
        for block in range_constexpr(cute.size(values) // 4):
            for half in range_constexpr(2):
                pair = cute.make_rmem_tensor((2,), Float32)
                for c in range_constexpr(2):
                    pair[c] = values[4 * block + 2 * half + c]
                row = f.row - f.warp_row + 8 * half
                target = self.chunk(row, first + 2 * block + f.column // 4)
                cute.autovec_copy(pair, vector(target + f.column % 4 * 4, Float32, 2, SMEM))

    @cute.jit
    def copy_out(self, first_row: Int32, rows: Int32, first_column: Int32):
        chunk = self.lane % (SLICE_BYTES // CHUNK)
        column = first_column + chunk * (CHUNK // self.problem.out.bytes)
        for i in range_constexpr(SLICE_ROWS // 4):
            row = self.lane // 8 + 4 * i
            store = row < rows
            if const_expr(self.fragment.has_n_tail):
                store = store and column < self.problem.out_columns
            if store:
                words = cute.make_rmem_tensor((4,), Int32)
                source = self.chunk(row, chunk)
                cute.autovec_copy(vector(source, Int32, 4, SMEM), words)
                target = self.out + (Int64(first_row + row) * self.problem.out_columns + column)
                cute.autovec_copy(words, vector(target, Int32, 4, GMEM))
