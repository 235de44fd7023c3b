"""Stand-ins for a template's arguments when it is compiled, and the parameters they become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint8
from cutlass.cute.runtime import make_fake_compact_tensor, make_ptr

from emitters.device.epilogue.nodes import applied
from emitters.device.memory import ELEMENT
from emitters.device.parameters import Gate, Gathered, Gradient, Output, Rows, Scales
from emitters.spec.dtypes import DType
from emitters.spec.epilogue import NUMBERS, EpilogueNode
from emitters.spec.gemm import GemmProblem, Granularity, Major, WeightStorage
from emitters.spec.image import ParamKind, TensorMapBox
from emitters.spec.packing import Packing
from emitters.spec.staged_sm90 import K_TILE_BYTES, SLICE_BYTES, SLICE_ROWS
from emitters.spec.weight_map import weight_box


@dataclass(frozen=True)
class Argument:
    """An argument of a template's `__call__`.

    stand_in: what the template is compiled with. params: (name, kind) of the kernel parameters that
    it becomes, in order; empty for an absent argument.
    """

    stand_in: Any
    params: tuple[tuple[str, ParamKind], ...]


ABSENT = Argument(None, ())


def pointer(name: str, element: type, align: int) -> Argument:
    """A pointer to global memory. align: bytes."""
    stand_in = make_ptr(element, align, cute.AddressSpace.gmem, assumed_align=align)
    return Argument(stand_in, ((name, ParamKind.POINTER),))


def integer(name: str) -> Argument:
    return Argument(Int32(1), ((name, ParamKind.INT32),))


def several(*arguments: Argument, kind: Any = None) -> Argument:
    """A tuple of arguments, ABSENT if there are none. kind: the NamedTuple to make of them."""
    if not arguments:
        return ABSENT
    params = tuple(param for argument in arguments for param in argument.params)
    stand_ins = tuple(argument.stand_in for argument in arguments)
    return Argument(kind(*stand_ins) if kind else stand_ins, params)


def tensor_map(
    name: str, element: type, shape: tuple[int, ...], order: tuple[int, ...]
) -> Argument:
    """A tensor map, which the host encodes; the stand-in is a tensor of this shape and order."""
    stand_in = make_fake_compact_tensor(element, shape, stride_order=order, assumed_align=16)
    return Argument(stand_in, ((name, ParamKind.TENSOR_MAP),))


def gemm_arguments(
    problem: GemmProblem, dynamic: bool = False, tma_x: bool = False
) -> tuple[Argument, ...]:
    """The arguments of both templates of the grouped GEMM, except grid and stream.

    dynamic: whether the schedule takes units from a counter. tma_x: whether x, and its scales along
    K, have tensor maps.
    """
    element, stored, quantized = ELEMENT[problem.out], problem.stored, problem.quantized_out
    x = pointer("x", Uint8, 16)
    if tma_x:
        x = tensor_map("x", ELEMENT[problem.x], (SLICE_ROWS, problem.k), (1, 0))
    return (
        _weight(problem),
        several(
            pointer("starts", Int32, 4),
            pointer("offsets", Int32, 4),
            integer("num_rows"),
            integer("early"),
            kind=Rows,
        ),
        several(
            x,
            pointer("index", Int32, 4) if problem.gather else ABSENT,
            integer("num_tokens"),
            ABSENT if tma_x else integer("x_stride"),
            kind=Gathered,
        ),
        several(
            pointer("out", element, 16),
            tensor_map("out_map", element, (SLICE_ROWS, problem.out_columns), (1, 0)),
            pointer("h", element, 16) if stored else ABSENT,
            tensor_map("h_map", element, (SLICE_ROWS, problem.n), (1, 0)) if stored else ABSENT,
            pointer("out_scale", Float32, 4) if quantized else ABSENT,
            integer("out_scale_stride") if quantized else ABSENT,
            integer("out_scale_k_stride") if quantized else ABSENT,
            kind=Output,
        ),
        _gate(problem),
        _scales(problem, tma_x),
        several(*map(_applied, applied(problem))),
        pointer("counters", Int32, 8) if dynamic else ABSENT,
    )


def _gate(problem: GemmProblem) -> Argument:
    activation = problem.activation
    if activation is None or not activation.function.gated:
        return ABSENT
    numbers = [integer(n) if n in activation.numbers else ABSENT for n in NUMBERS]
    return several(integer("column_stride"), integer("gate_stride"), *numbers, kind=Gate)


def gradient_argument(problem: GemmProblem) -> Argument:
    """The argument of a product whose epilogue has an activation's gradient."""
    if not problem.gradient:
        return ABSENT
    element, columns = ELEMENT[problem.out], (SLICE_ROWS, problem.n)
    numbers = [integer(n) if n in problem.numbers else ABSENT for n in NUMBERS]
    return several(
        tensor_map("h_map", element, columns, (1, 0)),
        pointer("grad_h", element, 16),
        tensor_map("grad_h_map", element, columns, (1, 0)),
        pointer("topk_weights", Float32, 4),
        pointer("inverse", Int32, 4),
        pointer("shares", Float32, 4),
        integer("choices"),
        *numbers,
        kind=Gradient,
    )


def _scales(problem: GemmProblem, tma_x: bool) -> Argument:
    if not problem.block_rows:
        return ABSENT
    x = pointer("per_token_scale", Float32, 4)
    if tma_x:  # any tensor of such columns stands in for it
        x = tensor_map("per_token_scale", Float32, (SLICE_ROWS, SLICE_BYTES), (1, 0))
    return several(
        x,
        ABSENT if tma_x else integer("per_token_scale_stride"),
        ABSENT if tma_x else integer("per_token_scale_k_stride"),
        pointer("scale", Float32, 4),
        kind=Scales,
    )


def _weight(problem: GemmProblem) -> Argument:
    dtype = problem.weight.dtype
    if isinstance(dtype, Packing):
        return pointer("weight", Uint8, 16)
    if problem.weight.storage is WeightStorage.TABLE:
        return pointer("weight", Uint8, 64)
    return tensor_map(
        "weight",
        ELEMENT[dtype],
        (problem.n, problem.k, problem.num_experts),
        (1, 0, 2) if problem.weight.major is Major.K else (0, 1, 2),
    )


def _applied(node: Granularity | EpilogueNode) -> Argument:
    """The tensor that a scale or an epilogue node reads."""
    if isinstance(node, Granularity):
        name, element = "per_token_scale" if node is Granularity.TOKEN else "scale", DType.FP32
    else:
        name, element = node.operand, node.element
    return pointer(name, ELEMENT[element], 4)


def gemm_tensor_maps(
    problem: GemmProblem, columns: int, k: int, l2_promotion: int, slice_bytes: int = SLICE_BYTES
) -> tuple[TensorMapBox, ...]:
    """The tensor maps of the weights, unless they are packed, and of the outputs.

    columns, k: of the weights that one copy takes. l2_promotion: bytes that a read of weights
    brings into L2. slice_bytes: of a row of the output that one store writes.
    """
    columns_of_slice = slice_bytes // problem.out.bytes
    outputs = [TensorMapBox("out_map", (columns_of_slice, SLICE_ROWS), slice_bytes, 128)]
    box = (columns_of_slice, 1, SLICE_ROWS)
    for name in ("h_map", "grad_h_map")[: 2 if problem.gradient else 1 if problem.stored else 0]:
        outputs.append(TensorMapBox(name, box, SLICE_BYTES, 128))
    if problem.weight.packing:
        return tuple(outputs)
    box = weight_box(problem, columns, k)
    weight = TensorMapBox("weight", box=box, swizzle=K_TILE_BYTES, l2_promotion=l2_promotion)
    return weight, *outputs
