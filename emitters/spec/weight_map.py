"""The tensor map through which a kernel reads weights.

The host encodes extents and strides (`weight_view`), the image records the box of one copy
(`weight_box`), and the kernel computes where its copies start (`weight_corners`). All three list
the dimensions in the same order, innermost first:

  weights          dimensions                            a box
  K-major          K, N, E                               128 bytes of K, the columns of a tile
  K-major, gated   K, 8 columns, gate or up, N / 16, E   128 bytes of K, 8 gates, 8 ups, 8 gates, ..
  N-major          N, K, E                               64 columns, the K of a k-tile
  N-major, gated   N / 2, K, gate or up, E               64 columns, the K of a k-tile

An alternating problem's N-major weights are read as those without a gate.
"""

from __future__ import annotations

from typing import Any

from emitters.spec.gemm import GATE_BLOCK, N_MAJOR_BLOCK, GemmProblem, Major, WeightStorage


def gate_strides(n: int, interleaved: bool) -> tuple[int, int]:
    """Two distances among n columns: from a gate to the next output's gate, and to its own up."""
    return (2, 1) if interleaved else (1, n // 2)


def weight_view(
    problem: GemmProblem, strides: tuple[int, ...], interleaved: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The extents of the weights' tensor map, and the strides of all but its innermost dimension.

    Both in elements, innermost first. strides: of E, N and K. interleaved: whether the rows of a
    gated problem's K-major weights are gate, up, gate, up, ... instead of all gates, then all ups.
    """
    experts = problem.num_experts if problem.weight.storage is WeightStorage.STACKED else 1
    expert_stride, row_stride, k_stride = strides
    if experts == 1:
        expert_stride = max(row_stride, k_stride)  # never used, but checked
    if problem.weight.major is Major.N:
        if not problem.gated or problem.alternating:
            return (problem.n, problem.k, experts), (k_stride, expert_stride)
        half = problem.out_columns
        return (half, problem.k, 2, experts), (k_stride, half, expert_stride)
    if not problem.gated:
        return (problem.k, problem.n, experts), (row_stride, expert_stride)
    column, gate = (stride * row_stride for stride in gate_strides(problem.n, interleaved))
    extents = (problem.k, GATE_BLOCK, 2, problem.out_columns // GATE_BLOCK, experts)
    return extents, (column, gate, GATE_BLOCK * column, expert_stride)


def weight_box(problem: GemmProblem, columns: int, k: int) -> tuple[int, ...]:
    """The extents of one copy, of up to `columns` columns and k elements of K."""
    if problem.weight.major is Major.N:
        halves = problem.gated and not problem.alternating
        return (N_MAJOR_BLOCK, k, 1, 1) if halves else (N_MAJOR_BLOCK, k, 1)
    if problem.gated:
        return (k, GATE_BLOCK, 2, columns // (2 * GATE_BLOCK), 1)
    return (k, columns, 1)


def weight_corners(
    problem: GemmProblem, k: Any, column: Any, columns: int, expert: Any
) -> list[list[Any]]:
    """The coordinates of the boxes that hold `columns` columns from `column` on, at element k of K.

    The boxes follow each other in shared memory. k, column, expert: integers on the host or on the
    device. columns: known when a kernel is compiled.
    """
    if problem.weight.storage is WeightStorage.TABLE:
        expert = 0
    if problem.weight.major is Major.N:
        block = N_MAJOR_BLOCK
        firsts = [column + first for first in range(0, columns, block)]
        if problem.gated and not problem.alternating:
            return [[c // (2 * block) * block, k, c // block % 2, expert] for c in firsts]
        return [[c, k, expert] for c in firsts]
    if problem.gated:
        return [[k, 0, 0, column // (2 * GATE_BLOCK), expert]]
    return [[k, column, expert]]
