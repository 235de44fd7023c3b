"""The parameters of a grouped GEMM, grouped as device code passes them on."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32


class Rows(NamedTuple):
    """The rows of the product that each expert has.

    starts, offsets: the experts' first rows and ends; starts is null if each expert starts at the
    end of the one before. num_rows: rows of the output. early: nonzero if starts and offsets are
    already final, so that they may be read before `wait_for_previous`.
    """

    starts: cute.Pointer
    offsets: cute.Pointer
    num_rows: Int32
    early: Int32


class Gathered(NamedTuple):
    """x [T, K], and the row of it that each row of the product reads.

    x: bytes; where TMA loads rows, as `Output` has tensor maps. index: None where rows are taken
    in order. x_stride: units of 16 bytes from a row to the next; None where TMA loads rows.
    """

    x: cute.Pointer | cute.CopyAtom
    index: cute.Pointer | None
    num_tokens: Int32
    x_stride: Int32 | None


class Scales(NamedTuple):
    """Scales that vary along K.

    x: [T, K / 128], with strides in elements, from a token to the next and along K; None where TMA
    loads rows, which has a tensor map as `Output` does. weight: dense [E, blocks of N, K / 128].
    """

    x: cute.Pointer | cute.CopyAtom
    x_stride: Int32 | None
    x_k_stride: Int32 | None
    weight: cute.Pointer


class Gate(NamedTuple):
    """The launch parameters of a gated activation.

    column_stride, gate_stride: where gate and up columns are in weight, scale and bias (see
    `gate_strides`). limit, alpha, beta: bits of float32, None but for a clamped SwiGLU.
    """

    column_stride: Int32
    gate_stride: Int32
    limit: Int32 | None
    alpha: Int32 | None
    beta: Int32 | None


class Gradient(NamedTuple):
    """What the gradient of an activation reads and writes besides the product.

    h_map: as in `Output`. grad_h, grad_h_map: the gradient of what it shows. topk_weights, inverse:
    [T, choices]. shares: [T, choices, N tiles]. limit, alpha, beta: as in `Gate`.
    """

    h_map: cute.CopyAtom
    grad_h: cute.Pointer
    grad_h_map: cute.CopyAtom
    topk_weights: cute.Pointer
    inverse: cute.Pointer
    shares: cute.Pointer
    choices: Int32
    limit: Int32 | None
    alpha: Int32 | None
    beta: Int32 | None


class Output(NamedTuple):
    """The output and its tensor map, and those of the columns before the activation if stored.

    out_map, h_map: in a template's `__call__` a [16, N] tensor that stands in for it; in the kernel
    the TMA atom that carries it. scale: of a quantised output, [rows, columns / 128], with strides
    in elements, from a row to the next and along the columns.
    """

    out: cute.Pointer
    out_map: cute.CopyAtom
    h: cute.Pointer | None = None
    h_map: cute.CopyAtom | None = None
    scale: cute.Pointer | None = None
    scale_stride: Int32 | None = None
    scale_k_stride: Int32 | None = None
