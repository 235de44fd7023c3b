"""The weight loader: copies weights to shared memory by TMA."""

from __future__ import annotations

import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import Int16, Int32, Int64, Uint8
from cutlass.cute.nvgpu import cpasync
from cutlass.experimental import primitives as prims

from emitters.device.memory import tensor_map_address
from emitters.spec.gemm import GemmProblem, Major, WeightStorage
from emitters.spec.image import TENSOR_MAP_BYTES
from emitters.spec.staged_sm90 import K_TILE_BYTES
from emitters.spec.weight_map import weight_corners

WEIGHT_LAYOUT = {Major.K: utils.LayoutEnum.ROW_MAJOR, Major.N: utils.LayoutEnum.COL_MAJOR}
OPERAND_MAJOR = {
    Major.K: cute.nvgpu.OperandMajorMode.K,
    Major.N: cute.nvgpu.OperandMajorMode.MN,
}
EVICT_FIRST = 0x12F0000000000000  # the L2 policy that createpolicy returns for evict_first


class WeightLoader:
    """Copies columns of weights, one k-tile of them at a time.

    evict_first: weights leave L2 before its older contents.
    """

    def __init__(self, problem: GemmProblem, evict_first: bool = False):
        self.problem = problem
        self.stacked = problem.weight.storage is WeightStorage.STACKED
        self.l2_hint = Int64(EVICT_FIRST) if evict_first else None

    def carrier(self, weight, stage_layout, box: tuple[int, int]):
        """The kernel's argument for a [N, K, E] tensor of weights: a TMA atom.

        It reserves a parameter of 128 bytes, in which the host encodes the tensor map. For a table
        of tensor maps the argument is the pointer to the table.
        """
        if not self.stacked:
            return weight
        copy = cpasync.CopyBulkTensorTileG2SOp()
        atom, _ = cpasync.make_tiled_tma_atom(copy, weight, stage_layout, box)
        return atom

    def prefetch_map(self, weight):
        if self.stacked:
            cpasync.prefetch_descriptor(weight)

    def find_map(self, weight, expert: Int32) -> cute.Pointer:
        """The address of the tensor map of an expert's weights. weight: the kernel's argument."""
        if self.stacked:
            return tensor_map_address(weight)
        entry = cute.make_ptr(
            Uint8,
            weight.toint() + expert * TENSOR_MAP_BYTES,
            cute.AddressSpace.generic,
            assumed_align=64,
        )
        # the host wrote the table through the generic proxy
        prims.fence_proxy_acquire(prims.MemScope.SYS, entry.to_llvm_ptr(), TENSOR_MAP_BYTES)
        return entry

    def copy(self, stage, weight_map, corner, columns: int, barrier, ctas: Int16 | None = None):
        """Starts the copies of a tile's columns; by one thread.

        corner: (element of K, first column, expert). ctas: a mask of the cluster's CTAs to write
        to; None: only this one.
        """
        corners = weight_corners(self.problem, *corner[:2], columns, corner[2])
        for i, corner in enumerate(corners):
            prims.cp_async_bulk_tensor_shared_cluster_global(
                (stage + i * (columns * K_TILE_BYTES // len(corners))).to_llvm_ptr(),
                weight_map.to_llvm_ptr(),
                [Int32(coordinate) for coordinate in corner],
                barrier.to_llvm_ptr(),
                [],
                multicast_mask=ctas,
                l2_cache_hint=self.l2_hint,
            )
