"""The values of kernels' parameters, by their names in launch records.

There is a function per kind of kernel. addresses: of its tensors, by parameter; those that are not
known yet may be missing. A kernel takes only the values that it has a parameter for, so tensors
that it does not read do no harm.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from cutlass_moe.runtime.tensor_map import View
from emitters.spec.gemm import GemmProblem
from emitters.spec.weight_grad import RAGGED_ROWS, WeightGradProblem, ragged_view
from emitters.spec.weight_map import gate_strides, weight_view

Addresses = Mapping[str, int]
_X_SCALE_STRIDES = ("per_token_scale_stride", "per_token_scale_k_stride")
_OUT_SCALE_STRIDES = ("out_scale_stride", "out_scale_k_stride")
# The alignment of the addresses of a GEMM's tensors, in bytes; 4 for all others. Scales of tokens
# that are `in_columns` or `in_rows` need 16.
ALIGNMENTS = {"x": 16, "weight": 16, "out": 16, "scale": 8, "bias": 8}
_COLUMN_UNIT = 4  # float32: 16 bytes, of which a multiple lies between two columns, or rows


class Strides(NamedTuple):
    """The strides of what a GEMM reads by token, in elements; None: dense.

    x: from a row of x to the next. x_scale: both of a per_token_scale [T, K / 128]. out_scale: both
    of the scales [rows, columns / 128] that are written with a quantised output.
    """

    x: int | None = None
    x_scale: tuple[int, ...] | None = None
    out_scale: tuple[int, int] | None = None


DENSE = Strides()


def column_stride(tokens: int) -> int:
    """From a column of per_token_scale [T, K / 128] to the next, in elements, where columns are
    dense and TMA can read them."""
    return -(-tokens // _COLUMN_UNIT) * _COLUMN_UNIT


def in_columns(tokens: int, strides: tuple[int, ...]) -> bool:
    """Whether TMA can read per_token_scale [T, K / 128], its address aside: the scales of
    neighbouring tokens are neighbours, and columns a multiple of 16 bytes apart."""
    if len(strides) != 2:
        return False
    of_token, of_column = strides
    return of_token == 1 and of_column % _COLUMN_UNIT == 0 and of_column >= max(tokens, 1)


def in_rows(strides: tuple[int, ...]) -> bool:
    """Whether rows of per_token_scale [T, K / 128] can be read 16 bytes at a time, its address
    aside."""
    return len(strides) == 2 and strides[1] == 1 and strides[0] % _COLUMN_UNIT == 0


def alignment(name: str, tensor: Tensor) -> int:
    """The bytes of which the address of a GEMM's tensor must be a multiple."""
    strides = tensor.stride()
    if name == "per_token_scale" and (in_columns(len(tensor), strides) or in_rows(strides)):
        return 16
    return ALIGNMENTS.get(name, 4)


def gemm_values(
    problem: GemmProblem,
    addresses: Addresses,
    num_tokens: int,
    num_rows: int,
    *,
    strides: Strides = DENSE,
    interleaved: bool = False,
    numbers: tuple[float, ...] = (),
    early: bool = False,
) -> dict[str, int]:
    """The values for a grouped GEMM.

    num_tokens: rows of x. num_rows: rows of the product. interleaved: as in `grouped_matmul`.
    numbers: the values of the activation's `numbers`. early: in a dependent launch, offsets and
    starts are already final, so they may be read before the previous kernel has ended.
    """
    chunks = (strides.x or problem.k) * problem.x.bytes // 16
    if num_tokens * chunks >= 2**32:
        raise ValueError(
            f"x must span less than 64 GiB, got {num_tokens} rows of {16 * chunks} bytes"
        )
    x_scale = {}
    if problem.block_rows:
        of_scale = strides.x_scale or (problem.scale_blocks[1], 1)
        if num_tokens * of_scale[0] + problem.scale_blocks[1] * of_scale[1] >= 2**31:
            raise ValueError(f"per_token_scale must span less than 2^31 elements, got {of_scale}")
        x_scale = dict(zip(_X_SCALE_STRIDES, of_scale, strict=True))
    out_scale = {}
    if problem.quantized_out:
        of_scale = strides.out_scale or (problem.out_groups, 1)
        out_scale = dict(zip(_OUT_SCALE_STRIDES, of_scale, strict=True))
    column_stride, gate_stride = gate_strides(problem.n, interleaved)
    names = problem.numbers
    return {
        "starts": 0,
        "out_map": addresses.get("out", 0),
        "counters": 0,  # the kernel's own
        **addresses,
        "num_tokens": num_tokens,
        "num_rows": num_rows,
        "x_stride": chunks,
        **x_scale,
        **out_scale,
        **{name: _float_bits(number) for name, number in zip(names, numbers, strict=True)},
        "early": int(early),
        "column_stride": column_stride,
        "gate_stride": gate_stride,
    }


def gemm_views(
    problem: GemmProblem,
    weight_strides: tuple[int, ...],
    num_tokens: int,
    num_rows: int,
    *,
    strides: Strides = DENSE,
    interleaved: bool = False,
) -> dict[str, View]:
    """The views for the tensor maps of x, out, h if there is one, of weight unless packed, and of
    per_token_scale if it has columns.

    weight_strides: of E, N and K, in elements; for weights in a table, those of one expert's.
    num_tokens: rows of x. num_rows: rows of the product.
    """
    columns = problem.out_columns
    views = {
        "x": View((problem.k, num_tokens), (strides.x or problem.k,), problem.x.bytes),
        "out_map": View((columns, num_rows), (columns,), problem.out.bytes),
    }
    if strides.x_scale is not None:
        extents = num_tokens, problem.scale_blocks[1]
        views["per_token_scale"] = View(extents, strides.x_scale[1:], 4)
    if problem.stored:
        views["h_map"] = gates_and_ups(problem.n, columns, num_rows, problem.out.bytes)
    if problem.gradient:
        halves = 2 if problem.gradient.function.gated else 1
        of_h = gates_and_ups(halves * columns, columns, num_rows, problem.out.bytes)
        views["h_map"] = views["grad_h_map"] = of_h
    if not problem.weight.packing:
        view = weight_view(problem, weight_strides, interleaved)
        views["weight"] = View(*view, problem.x.bytes)
    return views


def gates_and_ups(n: int, outputs: int, num_rows: int, size: int) -> View:
    """The view of rows of n columns: all gates, then all ups, of so many outputs each; or, where
    these are n, of columns without a gate. size: bytes of an element."""
    return View((outputs, n // outputs, num_rows), (outputs, n), size)


def weight_grad_values(
    problem: WeightGradProblem,
    addresses: Addresses,
    num_tokens: int,
    num_rows: int,
    gathered_stride: int,
) -> dict[str, int]:
    """The values for a grouped weight gradient.

    addresses: left, right, offsets, out and, if there is one, starts and index. num_tokens: rows of
    the gathered operand; gathered_stride: from one to the next, in elements.
    """
    chunks = gathered_stride * problem.operand.bytes // 16
    if num_tokens * chunks >= 2**32:
        raise ValueError(
            f"{problem.gathered} must span less than 64 GiB, got {num_tokens} rows of "
            f"{16 * chunks} bytes"
        )
    if num_rows > RAGGED_ROWS:
        raise ValueError(f"rows must be at most {RAGGED_ROWS}, got {num_rows}")
    return {
        "starts": 0,
        **addresses,
        "num_tokens": num_tokens,
        "num_rows": num_rows,
        "gathered_stride": chunks,
    }


def weight_grad_views(
    problem: WeightGradProblem, left_stride: int, right_stride: int
) -> dict[str, View]:
    """The views for the tensor maps of the operands that are read in order, and of out.

    left_stride, right_stride: from a row to the next, in elements.
    """
    m, n, experts = problem.m, problem.n, problem.num_experts
    size = problem.operand.bytes
    return {
        "left": View(*ragged_view(m, left_stride), size),
        "right": View(*ragged_view(n, right_stride), size),
        "out": View((n, m, experts), (n, m * n), problem.out.bytes),
    }


class MisalignedAddress(ValueError):
    """A tensor lies where a kernel cannot read or write it."""


def misaligned(name: str, multiple: int, address: int) -> MisalignedAddress:
    """The error for a tensor at an address that is not aligned as a kernel needs."""
    return MisalignedAddress(
        f"the address of {name} must be a multiple of {multiple} bytes, got {address:#x}; a clone "
        "of the tensor has such an address"
    )


def route_values(
    addresses: Addresses,
    *,
    num_ids: int,
    pairs: int,
    choices: int,
    capacity: int,
    max_rows: int | None = None,
) -> dict[str, int]:
    """The values of a route kernel, except `phase`, which differs from launch to launch.

    num_ids: experts that ids may name;
    choices: per token; capacity: the most rows of an expert; max_rows: of all together. overflow is
    among the addresses where the rows dropped for max_rows are counted."""
    return {
        "expert_map": 0,
        "overflow": 0,
        **addresses,
        "max_rows": pairs if max_rows is None else max_rows,
        "num_ids": num_ids,
        "pairs": pairs,
        "choices": choices,
        "capacity": capacity,
    }


def router_values(
    addresses: Addresses,
    *,
    num_tokens: int,
    k: int,
    topk_groups: int,
    renormalize: bool,
    scale: float,
    threshold: float | None,
) -> dict[str, int]:
    return {
        "correction_bias": 0,
        **addresses,
        "num_tokens": num_tokens,
        "k": k,
        "topk_groups": topk_groups,
        "renormalize": int(renormalize),
        "scale": _float_bits(scale),
        "threshold": _float_bits(-1.0 if threshold is None else threshold),
    }


def quantize_values(
    addresses: Addresses, num_rows: int, source_stride: int, *, early: bool = False
) -> dict[str, int]:
    """The values of a quantize kernel.

    addresses: source, q, scale, and `end`, of an int32: rows from there on are left alone;
    without it none are. static_scale, of one float32: the scale of every row, instead of its own.
    source_stride: bytes from a row to the next. In a dependent launch end is read before the kernel
    before is waited for, and with `early` source is too, and q and scale are written."""
    return {
        "end": 0,
        "static_scale": 0,
        **addresses,
        "num_rows": num_rows,
        "source_stride": source_stride,
        "early": int(early),
    }


def quantize_groups_values(
    addresses: Addresses,
    num_rows: int,
    source_stride: int,
    scale_strides: tuple[int, ...],
    *,
    power_of_two: bool = False,
    early: bool = False,
) -> dict[str, int]:
    """The values of a kernel that quantises with a scale per group.

    addresses, source_stride, early: as in `quantize_values`. scale_strides: elements from a row's
    scale to the next row's, and to the next of the same row."""
    return {
        "end": 0,
        **addresses,
        "num_rows": num_rows,
        "source_stride": source_stride,
        "scale_stride": scale_strides[0],
        "scale_k_stride": scale_strides[1],
        "power_of_two": int(power_of_two),
        "early": int(early),
    }


def combine_values(
    addresses: Addresses, num_rows: int, num_tokens: int, weight_stride: int
) -> dict[str, int]:
    """The values of a combine kernel.

    addresses: rows, weights (without them all are 1), inverse, out and, if there is one,
    residual. weight_stride: elements from a token's weights to the next. In a dependent launch
    weights and inverse are read before the kernel before is waited for."""
    return {
        "residual": 0,
        "weights": 0,
        **addresses,
        "num_rows": num_rows,
        "num_tokens": num_tokens,
        "weight_stride": weight_stride,
    }


def gather_sum_values(addresses: Addresses, num_groups: int) -> dict[str, int]:
    """The values of a gather_sum kernel. addresses: rows, order, bounds and out."""
    return {**addresses, "num_groups": num_groups}


def activate_values(
    addresses: Addresses, num_rows: int, num_pairs: int, numbers: Mapping[str, float]
) -> dict[str, int]:
    """The values of a kernel that applies an activation, or of one for its gradients.

    addresses: h, inverse and active; for gradients also grad_active, weights, grad_h and
    grad_weights, and active may be 0: it is then not written. numbers: of a clamped SwiGLU."""
    return {
        **addresses,
        "num_rows": num_rows,
        "num_pairs": num_pairs,
        **{name: _float_bits(number) for name, number in numbers.items()},
    }


def _float_bits(value: float) -> int:
    """The bits of a float32, as an int32."""
    return struct.unpack("<i", struct.pack("<f", value))[0]
