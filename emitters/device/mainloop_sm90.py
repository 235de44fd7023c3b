"""The products of the main loop on SM90: WGMMA reads shared memory and adds into registers."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import warpgroup

from emitters.spec.dtypes import Accumulation, DType
from emitters.spec.gemm import GemmProblem


def sum_type(problem: GemmProblem) -> type:
    """The type in which the tensor core sums products."""
    return Int32 if problem.x is DType.INT8 else Float32


def make_sums(mma, tile: tuple[int, int], thread: Int32, problem: GemmProblem):
    """A thread's accumulators of a tile, and its sums.

    Two-level accumulation adds accumulators to sums; otherwise both are the same registers.
    """
    shape = mma.get_slice(thread).partition_C(cute.make_identity_tensor(tile)).shape
    acc = cute.make_rmem_tensor(shape, sum_type(problem))
    if problem.accumulation is Accumulation.TWO_LEVEL:
        return acc, cute.make_rmem_tensor(shape, sum_type(problem))
    return acc, acc


def begin_products():
    """Fences that must come before the first WGMMA of a stage."""
    cute.arch.fence_view_async_shared()  # because cp.async wrote x through the generic proxy
    warpgroup.fence()


def issue(mma, acc: cute.Tensor, tCrA: cute.Tensor, tCrB: cute.Tensor, box: Int32):
    """Starts the WGMMAs of 128 bytes of K; the caller commits them.

    The first adds to acc only if mma's ACCUMULATE is set; the others always do. box: the number of
    these 128 bytes, counted over all stages.
    """
    for k_block in range(cute.size(tCrA, mode=[2])):
        cute.gemm(mma, acc, tCrA[None, None, k_block, box], tCrB[None, None, k_block, box], acc)
        mma.set(warpgroup.Field.ACCUMULATE, True)


def promote(acc: cute.Tensor, sums: cute.Tensor):
    """Adds the finished accumulators of 128 bytes of K to the sums."""
    for i in range(cute.size(acc)):
        sums[i] = sums[i] + acc[i]
