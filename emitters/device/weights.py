"""The templates' side of tensor maps: the host encodes them, a kernel finds and names them."""

from __future__ import annotations

import cutlass.cute as cute
import cutlass.utils as utils
from cutlass import Int32, Uint8
from cutlass._mlir import ir
from cutlass._mlir.dialects import cute_nvgpu
from cutlass.cute.nvgpu import cpasync
from cutlass.cutlass_dsl import dsl_user_op
from cutlass.experimental import primitives as prims

from emitters.spec.config_sm90 import SLICE_BYTES, SLICE_ROWS
from emitters.spec.gemm import GemmProblem, Major, WeightStorage
from emitters.spec.image import TENSOR_MAP_BYTES

WEIGHT_LAYOUT = {Major.K: utils.LayoutEnum.ROW_MAJOR, Major.N: utils.LayoutEnum.COL_MAJOR}
OPERAND_MAJOR = {
    Major.K: cute.nvgpu.OperandMajorMode.K,
    Major.N: cute.nvgpu.OperandMajorMode.MN,
}


@dsl_user_op
def tensor_map_address(atom, *, loc=None, ip=None):
    """Address of the tensor map that a TMA atom carries as a kernel parameter."""
    executable = cute_nvgpu.atom_make_exec_tma(atom._trait.value, loc=loc, ip=ip)
    kind = ir.Type.parse("!cute.ptr<!cute_nvgpu.tma_descriptor_tiled, generic, align<128>>")
    return cute_nvgpu.get_tma_desc_addr(kind, executable, loc=loc, ip=ip)


def make_out_map(problem: GemmProblem, out: cute.Tensor):
    """The TMA atom through which slices are stored. out: any [16, N]; the host says where."""
    box = (SLICE_ROWS, SLICE_BYTES // problem.out.bytes)
    layout = cute.make_layout(box, stride=(box[1], 1))
    atom, _ = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), out, layout, box)
    return atom


def find_weight_map(problem: GemmProblem, weight, expert: Int32):
    """Address of an expert's. weight: a TMA atom, or the pointer to a table of maps."""
    if problem.weight.storage is WeightStorage.STACKED:
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
