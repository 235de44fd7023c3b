"""Where the matrices of a layer's experts are in a checkpoint, and whether all is as it must be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod

import torch

from cutlass_moe.models.expert_weights import BLOCK, STORED, ceil_div
from cutlass_moe.models.shapes import MoeShape
from cutlass_moe.models.shards import Shards, some
from cutlass_moe.models.tensor_names import TensorNames
from cutlass_moe.operands import FLOATS, FP8_BLOCK
from emitters.spec.packing import Packing

JOINT = "gate_up_proj"
# How the names of 4-bit values, of their scales and of what else there is go on after the weight's.
_PACKED = (("_blocks", "_scales", ()), ("_packed", "_scale", ("_shape",)))
# How the name of a scale goes on after that of its weight; one form a layer.
_ENDINGS = ("_scale_inv", "_scale", "_weight_scale")
_QUANTS = {dtype: name for name, dtype in STORED.items() if name != FP8_BLOCK}


@dataclass(frozen=True)
class Matrix:
    """A projection of all experts: a tensor [rows, columns] of each, or one stacked tensor.

    name: of the tensor, or of its module, with {} for the expert's number unless it is stacked.
    transposed: the tensor has columns before rows.
    """

    name: str
    rows: int
    columns: int
    is_module: bool = True
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        return "{}" not in self.name

    def weight(self, expert: int) -> str:
        """The name of the tensor that holds this expert's weights."""
        return self.name.format(expert) + (".weight" if self.is_module else "")

    def bias(self, expert: int) -> str:
        return self.name.format(expert) + (".bias" if self.is_module else "_bias")

    @property
    def shape(self) -> tuple[int, int]:
        """Of one expert's part of the tensor."""
        shape = (self.rows, self.columns)
        return (shape[1], shape[0]) if self.transposed else shape

    @property
    def block_shape(self) -> tuple[int, int]:
        """Of one expert's part of the scales, if there is one for each block of 128 x 128."""
        return (ceil_div(self.shape[0], BLOCK), ceil_div(self.shape[1], BLOCK))


@dataclass(frozen=True)
class Layout:
    """The tensors of a layer's experts.

    up: the matrices of w13: gate and up, or one of both, or up alone. ending: what follows a
    weight's name in that of its scale, "" where there are none. values, others: the same for 4-bit
    values, "" where there are none, and for tensors that say nothing new. quant: as in
    `ExpertWeights`.
    """

    up: tuple[Matrix, ...]
    down: Matrix
    experts: int
    interleaved: bool = False
    bias: bool = False
    ending: str = ""
    quant: str = ""
    values: str = ""
    others: tuple[str, ...] = ()

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return (*self.up, self.down)

    @property
    def rows(self) -> int:
        """The number of rows of w13."""
        return sum(matrix.rows for matrix in self.up)

    def row_ranges(self, matrix: Matrix, start: int, stop: int) -> list[slice]:
        """The rows of a matrix of `up` that belong to [start, stop) of the intermediate size."""
        if matrix.rows == self.down.columns:
            return [slice(start, stop)]
        if self.interleaved:
            return [slice(2 * start, 2 * stop)]
        inter = self.down.columns
        return [slice(start, stop), slice(inter + start, inter + stop)]

    def names(self, experts: Iterable[int]) -> set[str]:
        """All tensors of these experts."""
        found: set[str] = set()
        for expert in experts:
            for matrix in self.matrices:
                weight = matrix.weight(expert)
                found.add(weight + self.values)
                found |= {weight + other for other in self.others}
                if self.ending:
                    found.add(weight + self.ending)
                if self.bias:
                    found.add(matrix.bias(expert))
        return found


def find_layout(
    prefix: str, names: set[str], tensors: TensorNames, shape: MoeShape, gated: bool
) -> Layout:
    """The layout of the layer that has these tensors, by their names alone.

    prefix: of the layer; names: without it. Raises ValueError where tensors are missing, or there
    are some that are not understood.
    """
    gate, up, down = tensors.projections
    inside = {name for name in names if name.startswith(f"{tensors.experts}.")}
    first = {name.removeprefix(f"{tensors.experts}.").partition(".")[0] for name in inside}

    def matrix(projection: str, rows: int, columns: int) -> Matrix:
        numbered = any(part.isdigit() for part in first)
        name = f"{tensors.experts}.{'{}.' if numbered else ''}{projection}"
        is_module = numbered or f"{name}.weight" in names
        return Matrix(prefix + name, rows, columns, is_module)

    hidden, inter = shape.hidden, shape.inter
    ups: tuple[Matrix, ...]
    if not gated:
        ups = (matrix(up, inter, hidden),)
    elif any(part.startswith(JOINT) for part in first):
        ups = (matrix(JOINT, 2 * inter, hidden),)
    else:
        ups = (matrix(gate, inter, hidden), matrix(up, inter, hidden))
    layout = Layout(
        ups,
        matrix(down, hidden, inter),
        shape.num_experts,
        tensors.interleaved and len(ups) == 1 and gated,
        shape.bias,
    )
    full = {prefix + name for name in inside}
    experts = range(shape.num_experts)
    for values, ending, others in _PACKED:
        if {m.weight(e) + values for m in layout.matrices for e in experts} & full:
            layout = replace(layout, values=values, ending=ending, others=others)
    for ending in () if layout.values else _ENDINGS:
        scales = {m.weight(e) + ending for m in layout.matrices for e in experts}
        if scales & full:
            layout = replace(layout, ending=ending)
            break
    _check_names(layout, full, prefix, tensors)
    return layout


def _check_names(layout: Layout, names: set[str], prefix: str, tensors: TensorNames) -> None:
    expected = layout.names(range(layout.experts))
    beside = (f"{prefix}{tensors.router}.", prefix + tensors.correction_bias)
    extra = {name for name in names - expected if not name.startswith(beside)}
    if tensors.more_experts:
        start = f"{prefix}{tensors.experts}."
        numbers = {name: name.removeprefix(start).partition(".")[0] for name in extra}
        extra = {n for n, e in numbers.items() if not (e.isdigit() and int(e) >= layout.experts)}
    missing = expected - names
    said = [f"tensors are missing: {some(missing)}"] if missing else []
    said += [f"tensors are not understood: {some(extra)}"] if extra else []
    if said:
        raise ValueError("; ".join(said))


def check_tensors(layout: Layout, shards: Shards, experts: range) -> Layout:
    """The layout with its orientation and quant, by the shapes and dtypes of the experts' tensors.

    Reads headers alone. Raises ValueError where they are not what they must be.
    """
    first = experts[0]
    if layout.values:
        layout = replace(layout, quant=_packed_quant(layout, shards, first))
        return _checked(layout, shards, experts, _wrong_packed)
    layout = _oriented(layout, shards)
    _, dtype = shards.header(layout.down.weight(first))
    quant = _QUANTS.get(dtype) if isinstance(dtype, torch.dtype) else None
    if quant is None:
        raise ValueError(
            f"{layout.down.weight(first)} must be bfloat16, float16, float8_e4m3fn or int8, "
            f"got {dtype}"
        )
    has_scales = quant in ("fp8", "int8")
    if has_scales != bool(layout.ending):
        scale = layout.down.weight(first) + (layout.ending or _ENDINGS[1])
        raise ValueError(
            f"{dtype} weights must have {'' if has_scales else 'no '}scales, "
            f"{scale} is {'missing' if has_scales else 'there'}"
        )
    if quant == "fp8":
        shape, _ = shards.header(layout.down.weight(first) + layout.ending)
        lead = (layout.experts,) if layout.down.stacked else ()
        if shape == (*lead, *layout.down.block_shape):
            quant = FP8_BLOCK
    return _checked(replace(layout, quant=quant), shards, experts, _wrong)


def _checked(
    layout: Layout,
    shards: Shards,
    experts: range,
    find_wrong: Callable[[Layout, Matrix, int, Shards], dict[str, str]],
) -> Layout:
    """The layout; raises ValueError where any of its tensors is wrong."""
    wrong: dict[str, str] = {}
    for matrix in layout.matrices:
        for expert in experts[:1] if matrix.stacked else experts:
            wrong |= find_wrong(layout, matrix, expert, shards)
    if wrong:
        names = sorted(wrong)
        raise ValueError(f"{names[0]} {wrong[names[0]]}" + _others(names[1:]))
    return layout


def _packed_quant(layout: Layout, shards: Shards, expert: int) -> str:
    """The format of 4-bit values, by the number of their scales."""
    if layout.values == "_blocks":
        return str(Packing.MXFP4)
    name = layout.down.weight(expert) + layout.ending
    scales = shards.header(name)[0][-1:]
    for packing in (Packing.INT4_G128, Packing.INT4_G32):
        if scales == (layout.down.columns // packing.group,):
            return str(packing)
    raise ValueError(
        f"{name} must have a scale per 32 or 128 of {layout.down.columns} columns, got "
        f"{', '.join(map(str, scales)) or 'one'}"
    )


def _wrong_packed(layout: Layout, matrix: Matrix, expert: int, shards: Shards) -> dict[str, str]:
    """What is wrong with the tensors of a matrix of 4-bit values, by their names."""
    packing, name = Packing(layout.quant), matrix.weight(expert)
    lead = (layout.experts,) if matrix.stacked else ()
    rows, columns = matrix.rows, matrix.columns
    kinds: tuple[str | torch.dtype, ...] = ("I32",)
    of_scales: tuple[str | torch.dtype, ...] = FLOATS
    of_values: tuple[int, ...] = (rows, columns // 8)
    if packing is Packing.MXFP4:
        kinds, of_scales, of_values = ("U8",), ("U8",), (rows, columns // 32, 16)
    expected = {
        name + layout.values: ((*lead, *of_values), kinds),
        name + layout.ending: ((*lead, rows, columns // packing.group), of_scales),
    }
    if layout.bias:
        expected[matrix.bias(expert)] = ((*lead, rows), FLOATS)
    wrong = {}
    for tensor, (shape, dtypes) in expected.items():
        found, dtype = shards.header(tensor)
        if found != shape or dtype not in dtypes:
            words = " or ".join(map(str, dtypes))
            wrong[tensor] = f"must be {words} {list(shape)}, got {dtype} {list(found)}"
    return wrong


def _others(names: list[str]) -> str:
    return f"; wrong too: {some(names)}" if names else ""


def _oriented(layout: Layout, shards: Shards) -> Layout:
    """Stacked matrices are transposed if that is what the shapes of all of them say."""
    if not layout.down.stacked:
        return layout
    turned = replace(
        layout,
        up=tuple(replace(matrix, transposed=True) for matrix in layout.up),
        down=replace(layout.down, transposed=True),
    )
    for one in (layout, turned):
        shapes = [shards.header(matrix.weight(0))[0] for matrix in one.matrices]
        if shapes == [(one.experts, *matrix.shape) for matrix in one.matrices]:
            return one
    return layout


def _wrong(layout: Layout, matrix: Matrix, expert: int, shards: Shards) -> dict[str, str]:
    """What is wrong with the tensors of a matrix, by their names."""
    lead = (layout.experts,) if matrix.stacked else ()
    wrong = {}
    name = matrix.weight(expert)
    shape, dtype = shards.header(name)
    if shape != (*lead, *matrix.shape) or dtype != STORED[layout.quant]:
        expected = f"{STORED[layout.quant]} {[*lead, *matrix.shape]}"
        turned = f" or {[*lead, *matrix.shape[::-1]]}" if matrix.stacked else ""
        wrong[name] = f"must be {expected}{turned}, got {dtype} {list(shape)}"
    if layout.ending:
        scale = name + layout.ending
        shape, dtype = shards.header(scale)
        inner = shape[len(lead) :]
        if layout.quant == FP8_BLOCK:
            right = inner == matrix.block_shape
            expected = str([*lead, *matrix.block_shape])
        else:
            right = prod(inner) in (1, matrix.rows)
            expected = f"{[*lead, matrix.rows, 1]} or one value for each expert"
        floats = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        if not (right and shape[: len(lead)] == lead and floats):
            wrong[scale] = f"must be floats {expected}, got {dtype} {list(shape)}"
    if layout.bias:
        shape, dtype = shards.header(matrix.bias(expert))
        if shape != (*lead, matrix.rows) or dtype not in FLOATS:
            expected = f"bfloat16, float16 or float32 {[*lead, matrix.rows]}"
            wrong[matrix.bias(expert)] = f"must be {expected}, got {dtype} {list(shape)}"
    return wrong
