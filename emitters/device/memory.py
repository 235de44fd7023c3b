"""Helpers to address memory in kernels: element types, typed views, tensor maps."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass._mlir import ir
from cutlass._mlir.dialects import cute_nvgpu
from cutlass.cute.nvgpu import cpasync
from cutlass.cutlass_dsl import dsl_user_op
from cutlass.experimental import primitives as prims

from emitters.spec.dtypes import DType
from emitters.spec.staged_sm90 import SLICE_BYTES, SLICE_ROWS

VECTOR = 1 << 30  # extent given to arrays whose length only the host knows
CHUNK = 16  # bytes of the largest cp.async, and of the largest store of a thread

ELEMENT = {
    DType.E4M3: cutlass.Float8E4M3FN,
    DType.E5M2: cutlass.Float8E5M2,
    DType.INT8: cutlass.Int8,
    DType.BF16: cutlass.BFloat16,
    DType.FP16: cutlass.Float16,
    DType.FP32: cutlass.Float32,
}
GMEM, SMEM = cute.AddressSpace.gmem, cute.AddressSpace.smem


def vector(
    pointer: cute.Pointer, element: type, count: int, space: cute.AddressSpace
) -> cute.Tensor:
    """A tensor of `count` elements at an address that is a multiple of their size together."""
    aligned = cute.make_ptr(
        element, pointer.toint(), space, assumed_align=count * element.width // 8
    )
    return cute.make_tensor(aligned, cute.make_layout(count))


def copy_chunk(target: cute.Pointer, source: cute.Pointer, size: cutlass.Int32):
    """Starts a copy of CHUNK bytes to shared memory; zeros follow the first `size` of them."""
    prims.cp_async_shared_global(
        target.to_llvm_ptr(),
        source.to_llvm_ptr(),
        CHUNK,
        prims.LoadCacheModifier.CG,
        cp_size=size,
    )


def map_carrier(tensor: cute.Tensor):
    """A TMA atom as an argument of a kernel: it reserves the 128 bytes of a tensor map.

    tensor: any [16, columns] one of the elements; the host encodes the map of the real one.
    """
    box = (SLICE_ROWS, SLICE_BYTES * 8 // tensor.element_type.width)
    layout = cute.make_layout(box, stride=(box[1], 1))
    atom, _ = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), tensor, layout, box)
    return atom


@dsl_user_op
def tensor_map_address(atom, *, loc=None, ip=None):
    """The address of the tensor map that a TMA atom carries as a kernel parameter."""
    executable = cute_nvgpu.atom_make_exec_tma(atom._trait.value, loc=loc, ip=ip)
    kind = ir.Type.parse("!cute.ptr<!cute_nvgpu.tma_descriptor_tiled, generic, align<128>>")
    return cute_nvgpu.get_tma_desc_addr(kind, executable, loc=loc, ip=ip)
