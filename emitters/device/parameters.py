"""The parameters of a grouped GEMM as they travel on the device."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32


class Rows(NamedTuple):
    """Which rows of the product belong to which expert.

    starts: may be null where every expert starts at the previous one's end. offsets: the experts'
    ends. num_rows: rows of the output. early: nonzero if starts and offsets are already final, so
    that they may be read before `wait_for_previous`.
    """

    starts: cute.Pointer
    offsets: cute.Pointer
    num_rows: Int32
    early: Int32


class Gathered(NamedTuple):
    """x, bytes of [T, K], and the row of it that each row of the product reads: index, None where
    rows are taken in order."""

    x: cute.Pointer
    index: cute.Pointer | None
    num_tokens: Int32


class Output(NamedTuple):
    """out, and its tensor map: in a template's `__call__` a [16, N] tensor that stands for it, in
    the kernel the TMA atom that carries it."""

    out: cute.Pointer
    out_map: cute.CopyAtom
