"""The products of the main loop on SM90: WGMMA reads shared memory and adds into registers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Numeric
from cutlass.cute.nvgpu import warpgroup
from cutlass.cute.nvgpu.tcgen05.helpers import int_to_smem_descriptor, smem_descriptor_to_int

from emitters.spec.dtypes import DType
from emitters.spec.gemm import GemmProblem
from emitters.spec.staged_sm90 import WARPGROUP


def sum_type(problem: GemmProblem) -> type:
    """The type in which the tensor core sums products."""
    return Int32 if problem.x is DType.INT8 else Float32


def make_sums(
    mma, tile: tuple[int, int], part: tuple[int, int], thread: Int32, problem: GemmProblem
):
    """A thread's accumulators of a tile, and its sums.

    Two-level accumulation adds the accumulators of one part of the tile at a time to sums;
    otherwise both are the same registers, of the whole tile.
    """
    shape = part if problem.two_level else tile
    layout = mma.get_slice(thread).partition_C(cute.make_identity_tensor(shape)).shape
    acc = cute.make_rmem_tensor(layout, sum_type(problem))
    if not problem.two_level:
        return acc, acc
    parts = tile[0] * tile[1] // (part[0] * part[1])
    return acc, cute.make_rmem_tensor((parts * cute.size(acc),), sum_type(problem))


def fragments(mma, stages: tuple, layouts: tuple, split: int, consumer: Int32):
    """A consumer's views (tCrA, tCrB) of all stages of both operands.

    stages, layouts: of A and of B, the shared memory and its swizzled layout. split: the consumers
    that share a tile.
    """
    sA, sB = (
        memory.get_tensor(layout.outer, swizzle=layout.inner)
        for memory, layout in zip(stages, layouts, strict=True)
    )
    group = mma.get_slice(cute.make_layout(split, stride=WARPGROUP)(consumer % split))
    tCrA = mma.make_fragment_A(group.partition_A(sA))
    return tCrA, mma.make_fragment_B(group.partition_B(sB))


def unforeseen(value: Numeric) -> Numeric:
    """A value of 32 bits, computed here: what it is, the compiler can't tell, nor move it."""
    return cute.arch.inline_ptx(
        "mov.b32 {$w0}, {$r0};", write_only_types=[type(value)], read_only_args=[value]
    )


def computed_once(stages: cute.Tensor) -> cute.Tensor:
    """The same view of all stages of an operand, whose first descriptor is computed here.

    In two-level sums the compiler may compute it anew in each k-tile, while WGMMA has nothing to
    do. Its upper half, a constant, takes no register.
    """
    first = smem_descriptor_to_int(stages.iterator)
    low = unforeseen(Int32(first))
    whole = (first & ~0xFFFFFFFF) | (Int64(low) & 0xFFFFFFFF)
    return cute.make_tensor(int_to_smem_descriptor(whole), stages.layout)


def loop_steps(count: int):
    """The steps of a loop that adds to two-level sums. One step is a number that the compiler does
    not know, but that it is not 0.

    It would take a loop of one step apart, and copy accumulators between WGMMAs, which then wait
    for each other. A loop that may have no step at all makes 128x256 tiles spill registers.
    """
    if count != 1:
        return count
    return cutlass.max(unforeseen(Int32(1)), Int32(1))


def begin_products(copied: bool = True):
    """Fences that must come before the first WGMMA of a stage. copied: whether cp.async filled it,
    or a part of it; else TMA did."""
    if copied:
        cute.arch.fence_view_async_shared()  # because it wrote through the generic proxy
    warpgroup.fence()


def issue(mma, acc: cute.Tensor, tCrA: cute.Tensor, tCrB: cute.Tensor, box: Int32):
    """Starts the WGMMAs of 128 bytes of K; the caller commits them.

    The first adds to acc only if mma's ACCUMULATE is set; the others always do. box: the number of
    these 128 bytes, counted over all stages.
    """
    for k_block in range(cute.size(tCrA, mode=[2])):
        cute.gemm(mma, acc, tCrA[None, None, k_block, box], tCrB[None, None, k_block, box], acc)
        mma.set(warpgroup.Field.ACCUMULATE, True)


def add_products(
    mma,
    acc: cute.Tensor,
    sums: cute.Tensor,
    operands: tuple[cute.Tensor, cute.Tensor],
    box: Int32,
    factor: Callable[[int], Float32] | None,
    prepare_next: Callable[[], None],
    finished: Callable[[], None],
):
    """Adds the products of 128 bytes of K to two-level sums, one part of the tile after the other.

    mma's ACCUMULATE must not be set, and is when this returns. The fence of `begin_products` must
    have come before.

    acc: the accumulators of a part, 64 rows or columns of WGMMA's M by a share of its N. operands:
    (tCrA, tCrB). factor: that of each register of sums; None if all are 1. prepare_next: called
    while the tensor core works on the last part. finished: called when the operands have been read
    and only registers remain.
    """
    tCrA, tCrB = operands
    parts = tuple(product(*(range(cute.size(t, mode=[1])) for t in operands)))
    for i, (m, n) in enumerate(parts):
        if i > 0:
            mma.set(warpgroup.Field.ACCUMULATE, False)
        warpgroup.fence()
        for k_block in range(cute.size(tCrA, mode=[2])):
            a = cute.append_ones(tCrA[None, m, k_block, box], up_to_rank=2)
            b = cute.append_ones(tCrB[None, n, k_block, box], up_to_rank=2)
            cute.gemm(mma, acc, a, b, acc)
            mma.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()
        if i == len(parts) - 1:
            prepare_next()
        warpgroup.wait_group(0)
        if i == len(parts) - 1:
            finished()
        first = i * cute.size(acc)
        for r in range(cute.size(acc)):
            value = acc[r] if factor is None else acc[r] * factor(first + r)
            sums[first + r] = sums[first + r] + value
