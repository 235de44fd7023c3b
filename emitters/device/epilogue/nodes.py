"""The epilogue visitor: applies scales and nodes to accumulators on their way to global memory.

A scale or node knows its tensor, how to load it and its formula. It is called at two points of a
tile, the scales first, then the nodes in the order of `problem.epilogue`:

  load     some k-tiles before the last; the WGMMAs that follow hide the latency
  apply    on the float32 values of part `part` of the thread's m-th 64 rows; returns new values

An activation, which reads no tensor, comes last (activations.py). If it is gated, a thread holds
both gate and up of an output. `fragment.py` maps registers to rows and columns, `store.py` writes
the results.

A new node takes changes in three places, none of them in a template:

  1. a frozen dataclass with `kind`, `operand` and `element` (emitters/spec/epilogue.py), in NODES
  2. a class like those below: made of (node, fragment, tensor), with `load` and `apply`
  3. its entry in NODES here
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr, range_constexpr

from emitters.device.epilogue.activations import activate
from emitters.device.epilogue.fragment import Fragment
from emitters.device.epilogue.store import Store
from emitters.device.memory import VECTOR
from emitters.device.parameters import Gate, Gathered, Output
from emitters.spec.epilogue import Bias, EpilogueNode
from emitters.spec.gemm import GemmProblem, Granularity
from emitters.spec.registry import GemmConfig

_FEW_CHANNELS = 8  # up to this many values of a bias a thread keeps in registers from `load` on


class Multiply:
    """Multiplies by scales: one per row's token, one per column or one for the expert.

    Those of columns are read part by part if registers can't hold a tile's beside two-level sums.
    """

    def __init__(self, granularity: Granularity, fragment: Fragment, scale: cute.Pointer):
        self.granularity, self.fragment, self.scale = granularity, fragment, scale
        self.late = granularity is Granularity.CHANNEL and fragment.few_registers
        count = {
            Granularity.TOKEN: fragment.token_count,
            Granularity.CHANNEL: fragment.part_channels if self.late else fragment.channel_count,
            Granularity.EXPERT: 1,
        }[granularity]
        self.values = cute.make_rmem_tensor((count,), Float32)

    @cute.jit
    def load(self, tokens: cute.Tensor, expert: Int32, first_column: Int32):
        scale = cute.make_tensor(self.scale, cute.make_layout(VECTOR))
        if const_expr(self.granularity is Granularity.TOKEN):
            for i in range_constexpr(self.fragment.token_count):
                value = Float32(0.0)
                if tokens[i] >= 0:
                    value = scale[tokens[i]]
                self.values[i] = value
        elif const_expr(self.granularity is Granularity.EXPERT):
            self.values[0] = scale[expert]
        elif const_expr(not self.late):
            self.fragment.read_channels(self.scale, self.values, 0, expert, first_column)

    def apply(self, m: int, part: int, values: cute.Tensor, expert: Int32, first_column: Int32):
        if self.late:
            first = part * self.fragment.part_channels
            self.fragment.read_channels(self.scale, self.values, first, expert, first_column)
            part = 0
        for i, factor in enumerate(self.factors(m, part)):
            values[i] = values[i] * factor
        return values

    def factors(self, m: int, part: int) -> list:
        """The scale of each register of a part."""
        if self.granularity is Granularity.TOKEN:
            return self.fragment.by_row(self.values, m, part)
        if self.granularity is Granularity.CHANNEL:
            return self.fragment.by_channel(self.values, m, part)
        return [self.values[0]] * self.fragment.part_registers


class AddBias:
    """Adds a bias to each column.

    It is read part by part if registers can't hold the bias of a whole tile beside its scales.
    """

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


NODES = {Bias: AddBias}


def applied(problem: GemmProblem) -> list[Granularity | EpilogueNode]:
    """The scales, and the nodes that read a tensor, in the order in which they are applied.

    Scales that vary along K are applied in the main loop instead.
    """
    scales = [] if problem.block_rows else [problem.x_scale, problem.weight_scale]
    scales = [scale for scale in scales if scale]
    return [*scales, *(node for node in problem.epilogue if node.operand)]


def make_node(node: Granularity | EpilogueNode, fragment: Fragment, tensor: cute.Pointer):
    """The object that applies a scale or node. tensor: the one that it reads."""
    kind = Multiply if isinstance(node, Granularity) else NODES[type(node)]
    return kind(node, fragment, tensor)


class Epilogue:
    """Applies scales and nodes to a consumer warp's share of a tile and stores the result.

    A row with an index outside [0, T) is stored as zeros.
    """

    def __init__(self, problem: GemmProblem, config: GemmConfig, fragment: type, store: Store):
        """Keeps what is known when compiling. fragment: the implementation of `Fragment` to use."""
        self.problem, self.config = problem, config
        self.make_fragment, self.target = fragment, store

    def attach(
        self, tensors, gate: Gate | None, gathered: Gathered, output: Output, staging, warp, lane
    ):
        """Binds the tensors, the output and this warp's staging memory.

        tensors: those that `applied` lists, or None if there are none. gate: of a gated problem,
        else None. staging: the shared memory of all consumer warps; warp: its number among them.
        """
        strides, numbers = (gate[:2], gate[2:]) if self.problem.gated else (None, ())
        self.numbers = [bits.bitcast(Float32) for bits in numbers if bits is not None]
        fragment = self.make_fragment(self.problem, self.config, strides, warp, lane)
        self.fragment = fragment
        self.nodes = [
            make_node(node, fragment, tensor)
            for node, tensor in zip(applied(self.problem), tensors or (), strict=True)
        ]
        self.target.attach(output, fragment, staging + warp * self.target.staging_bytes, lane)
        self.gathered = gathered
        self.tokens = cute.make_rmem_tensor((fragment.token_count,), Int32)

    @cute.jit
    def begin(self, first_row: Int32, rows: Int32, column: Int32):
        """Starts reading the tokens of the thread's rows; called when a tile's main loop starts.

        rows: from first_row to the expert's end. column: the tile's first column of N.
        """
        for i in range_constexpr(cute.size(self.tokens)):
            row = self.fragment.token_row(i)
            token = Int32(-1)
            if row < rows:
                token = first_row + row
                if const_expr(self.problem.gather):
                    index = cute.make_tensor(self.gathered.index, cute.make_layout(VECTOR))
                    token = index[first_row + row]
            self.tokens[i] = token
        if const_expr(self.problem.gradient is not None):
            self.leave_out_others()
            self.target.begin(self.tokens, first_row, self.out_column(column))

    def out_column(self, column: Int32) -> Int32:
        """The output column where a tile starts that starts at `column` of N."""
        return column // 2 if self.problem.gated else column

    @cute.jit
    def leave_out_others(self):
        """Marks rows whose token is not below T by -1."""
        tokens = self.tokens
        for i in range_constexpr(cute.size(tokens)):
            if tokens[i] >= self.gathered.num_tokens:
                tokens[i] = Int32(-1)

    @cute.jit
    def load(self, expert: Int32, column: Int32):
        """Loads what scales and nodes read. column: the tile's first column of N."""
        first_column = self.out_column(column)
        self.leave_out_others()
        for node in self.nodes:
            node.load(self.tokens, expert, first_column)

    def store(self, acc: cute.Tensor, expert: Int32, first_row: Int32, rows: Int32, column: Int32):
        """Applies everything to the accumulators, part by part, and stores the parts."""
        first_column = self.out_column(column)
        missing = self.some_missing()
        together = self.target.slice_parts
        for first in range(0, self.fragment.m_blocks * self.fragment.parts, together):
            parts: dict[tuple[int, int], cute.Tensor] = {}
            for output in range(self.target.outputs):
                for i in range(first, first + together):
                    place = i // self.fragment.parts, i % self.fragment.parts
                    if output == 0:
                        parts[place] = self.part(acc, *place, missing, expert, first_column)
                    values = self.columns(parts[place], output)
                    self.target.put(*place, output, values, first_row, rows, first_column)

    @cute.jit
    def part(
        self,
        acc: cute.Tensor,
        m: cutlass.Constexpr,
        part: cutlass.Constexpr,
        missing: Int32,
        expert: Int32,
        first_column: Int32,
    ):
        """A part of the accumulators after scales and nodes, before the activation."""
        count = self.fragment.part_registers
        first = (m * self.fragment.parts + part) * count
        values = cute.make_rmem_tensor((count,), Float32)
        some = min(count, cute.size(acc) - first)  # fewer if the tile ends within the part
        if const_expr(some < count):
            values.fill(0)
        for j in range_constexpr(some):
            values[j] = acc[self.fragment.register(first + j)].to(Float32)
        for node in self.nodes:
            values = node.apply(m, part, values, expert, first_column)
        if const_expr(self.problem.gather):
            self.clear_missing(m, part, missing, values)
        return values

    def columns(self, values: cute.Tensor, output: int):
        """What a part stores in an output: see `Store.put`."""
        if output == 0:
            return values if self.problem.activation is None else self.activate(values)
        if not self.problem.gated:
            return values
        pairs = self.fragment.gates_and_ups(values)
        found = cute.make_rmem_tensor((len(pairs),), Float32)
        for i, pair in enumerate(pairs):
            found[i] = pair[output - 1]
        return found

    def activate(self, values: cute.Tensor):
        """The activation's results, one per output; 0 for zeros, so rows without a token stay 0."""
        columns = [(values[i],) for i in range(cute.size(values))]
        if self.problem.gated:
            columns = self.fragment.gates_and_ups(values)
        result = cute.make_rmem_tensor((len(columns),), Float32)
        for i, columns_of in enumerate(columns):
            result[i] = activate(self.problem.activation, self.numbers, *columns_of)
        return self.fragment.in_order(result) if self.problem.gated else result

    def some_missing(self):
        """Nonzero if any row of the warp has no token."""
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
        """Sets rows with an index outside [0, T) to zero, even where weights are NaN."""
        if missing != 0:
            tokens = self.fragment.by_row(self.tokens, m, part)
            for i in range_constexpr(cute.size(values)):
                if tokens[i] < 0:
                    values[i] = Float32(0.0)

    def finish(self):
        """Called after the last tile."""
        self.target.finish()
