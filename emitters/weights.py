"""Boxes of weights by TMA, out of one tensor of all experts or one tensor an expert."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, const_expr
from cutlass._mlir import ir
from cutlass._mlir.dialects import cute_nvgpu
from cutlass.cutlass_dsl import dsl_user_op
from cutlass.experimental import primitives as prims

from emitters.image import TENSOR_MAP_BYTES
from emitters.problem import GemmProblem, WeightStorage

_EVICT_FIRST = 0x12F0000000000000  # the L2 policy that createpolicy makes of evict_first


@dsl_user_op
def _tensor_map_address(atom, *, loc=None, ip=None):
    """Address of the tensor map that a TMA atom carries as a kernel parameter."""
    executable = cute_nvgpu.atom_make_exec_tma(atom._trait.value, loc=loc, ip=ip)
    kind = ir.Type.parse("!cute.ptr<!cute_nvgpu.tma_descriptor_tiled, generic, align<128>>")
    return cute_nvgpu.get_tma_desc_addr(kind, executable, loc=loc, ip=ip)


class WeightBoxes:
    """Finds an expert's tensor map and issues the copies of its boxes."""

    def __init__(self, problem: GemmProblem, evict_first: bool):
        self.stacked = problem.weights is WeightStorage.STACKED
        self.evict_first = evict_first

    def attach(self, weight):
        """weight: a TMA atom, or the pointer to a table of tensor maps."""
        self.weight = weight

    @cute.jit
    def prefetch(self):
        """Fetches the tensor map of all experts ahead of its first use, by the calling thread."""
        if const_expr(self.stacked):
            prims.prefetch_tensormap(_tensor_map_address(self.weight).to_llvm_ptr())

    @cute.jit
    def map_of(self, expert: Int32):
        if const_expr(self.stacked):
            return _tensor_map_address(self.weight)
        entry = cute.make_ptr(
            Uint8,
            self.weight.toint() + expert * TENSOR_MAP_BYTES,
            cute.AddressSpace.generic,
            assumed_align=64,
        )
        # the table was written through the generic proxy
        prims.fence_proxy_acquire(prims.MemScope.SYS, entry.to_llvm_ptr(), TENSOR_MAP_BYTES)
        return entry

    def load(self, stage, weight_map, k, column, expert, barrier):
        """The box at element k of K and at `column`, by the calling thread."""
        if not self.stacked:
            expert = Int32(0)
        prims.cp_async_bulk_tensor_shared_cluster_global(
            stage.to_llvm_ptr(),
            weight_map.to_llvm_ptr(),
            [k, column, expert],
            barrier.to_llvm_ptr(),
            [],
            l2_cache_hint=Int64(_EVICT_FIRST) if self.evict_first else None,
        )
