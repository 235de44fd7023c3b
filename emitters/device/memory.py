"""Typed views of memory on the device."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute

from emitters.spec.dtypes import DType

VECTOR = 1 << 30  # extent given to arrays whose length only the host knows

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
    """count elements at an address that is aligned to all of them."""
    aligned = cute.make_ptr(
        element, pointer.toint(), space, assumed_align=count * element.width // 8
    )
    return cute.make_tensor(aligned, cute.make_layout(count))
