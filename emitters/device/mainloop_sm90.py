"""The main loop's products on SM90: WGMMA from shared memory into registers."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import warpgroup

from emitters.spec.dtypes import Accumulation, DType
from emitters.spec.gemm import GemmProblem


def sum_type(problem: GemmProblem) -> type:
    """What the tensor core sums products in."""
    return Int32 if problem.x is DType.INT8 else Float32


def make_sums(mma, tile: tuple[int, int], thread: Int32, problem: GemmProblem):
    """-> a thread's accumulators of a tile, and the sums that they are promoted to: the same
    registers but for two-level accumulation."""
    shape = mma.get_slice(thread).partition_C(cute.make_identity_tensor(tile)).shape
    acc = cute.make_rmem_tensor(shape, sum_type(problem))
    if problem.accumulation is Accumulation.TWO_LEVEL:
        return acc, cute.make_rmem_tensor(shape, sum_type(problem))
    return acc, acc


def begin_products():
    """Before the first WGMMA of a stage."""
    cute.arch.fence_view_async_shared()  # x was written through the generic proxy
    warpgroup.fence()


def issue(mma, acc: cute.Tensor, tCrA: cute.Tensor, tCrB: cute.Tensor, box: Int32):
    """Starts the WGMMAs of 128 bytes of K; all but the first add to what acc holds.

    The caller commits them. box: which 128 bytes, of all stages.
    """
    for k_block in range(cute.size(tCrA, mode=[2])):
        cute.gemm(mma, acc, tCrA[None, None, k_block, box], tCrB[None, None, k_block, box], acc)
        mma.set(warpgroup.Field.ACCUMULATE, True)


def promote(acc: cute.Tensor, sums: cute.Tensor):
    """Adds finished accumulators of 128 bytes of K to the sums: where scales that vary along K
    belong."""
    for i in range(cute.size(acc)):
        sums[i] = sums[i] + acc[i]
