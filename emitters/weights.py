"""Where the templates find an expert's weights."""

from __future__ import annotations

import cutlass.cute as cute
from cutlass import Int32, Uint8
from cutlass.experimental import primitives as prims

from emitters.epilogue import tensor_map_address
from emitters.image import TENSOR_MAP_BYTES
from emitters.problem import GemmProblem, WeightStorage


def find_weight_map(problem: GemmProblem, weight, expert: Int32):
    """Address of the tensor map. weight: a TMA atom, or the pointer to a table of maps."""
    if problem.weights is WeightStorage.STACKED:
        return tensor_map_address(weight)
    entry = cute.make_ptr(
        Uint8,
        weight.toint() + expert * TENSOR_MAP_BYTES,
        cute.AddressSpace.generic,
        assumed_align=64,
    )
    # the table was written through the generic proxy
    prims.fence_proxy_acquire(prims.MemScope.SYS, entry.to_llvm_ptr(), TENSOR_MAP_BYTES)
    return entry
