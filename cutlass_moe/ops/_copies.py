"""Copies of what kernels cannot read where it lies.

One rule for every product: weights are never copied, all other operands are if need be. A copy has
other strides, an address that is a multiple of what kernels load at once, or another dtype that
holds the same values. It is made anew in every call and costs a launch (int64 values cost two).
Only a copy for the sake of an address warns, once. It is made on every device, so that a call gives
the same answer on all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from cutlass_moe.operands import Operands
from cutlass_moe.runtime.fallback import announce_copy
from cutlass_moe.runtime.parameters import alignment, misaligned

T = TypeVar("T", Tensor, Tensor | None)

NARROW = (torch.bfloat16, torch.float16)  # scales of these dtypes are converted to float32
LARGEST_INT32 = 2**31 - 1


def as_int32(tensor: Tensor) -> Tensor:
    """Contiguous int32 values of int64 ones; what int32 cannot hold stays out of any range."""
    if tensor.dtype == torch.int64:
        tensor = tensor.clamp(-1, LARGEST_INT32).int()
    return tensor.contiguous()


def token_scale(scale: Tensor, tokens: int) -> Tensor:
    """per_token_scale as kernels read it: float32 [T] or [T, 1]; one value stands for all T.

    [T, K / 128] is read by its strides.
    """
    scale = _float32(scale)
    if scale.dim() == 2 and scale.shape[1] > 1:
        return scale
    if scale.dim() == 0 or (scale.dim() < 3 and scale.numel() == 1 and tokens != 1):
        scale = scale.reshape(1).expand(tokens)
    return scale.contiguous()


def weight_scale(scale: Tensor, experts: int) -> Tensor:
    """scale as kernels read it: float32 [E, N], [E, N, 1] or [E].

    [E, 1] and [E, 1, 1] become [E], as a view; one value of any shape stands for all experts.
    """
    scale = _float32(scale)
    if scale.dim() in (2, 3) and scale.numel() == experts == scale.shape[0]:
        scale = scale.flatten()
    elif scale.dim() == 0 or (scale.numel() == 1 and experts != 1):
        scale = scale.reshape(1).expand(experts)
    return scale.contiguous()


def _float32(scale: Tensor) -> Tensor:
    return scale.float() if scale.dtype in NARROW else scale


def aligned(operands: Operands) -> Operands:
    """The operands at addresses that kernels can read.

    Raises ValueError for weights that are not, because weights are not copied.
    """
    refuse_misaligned("weight", operands.weight)
    return Operands(*map(at_address, Operands._fields, operands))  # type: ignore[arg-type]


@contextmanager
def writable(out: Tensor) -> Iterator[Tensor]:
    """`out` if a kernel can write to it, else a copy that is written back at the end."""
    room = at_address("out", out.contiguous())
    yield room
    if room is not out:
        out.copy_(room)


def at_address(name: str, tensor: T, multiple: int | None = None) -> T:
    """The tensor, or a copy of it if kernels need another address; warns once of each name.

    A copy has the same strides, for which the call's kernel was chosen. multiple: of this many
    bytes the address must be; default what a GEMM's operand needs.
    """
    if tensor is None:
        return tensor
    multiple = multiple or alignment(name, tensor)
    if tensor.data_ptr() % multiple == 0:
        return tensor
    announce_copy(name, multiple)
    if tensor.is_contiguous():
        return tensor.clone()
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    extent = 1 + sum((size - 1) * stride for size, stride in pairs)
    return tensor.as_strided((extent,), (1,)).clone().as_strided(tensor.shape, tensor.stride())


def refuse_misaligned(name: str, tensor: Tensor, multiple: int | None = None) -> None:
    """Raises ValueError for a tensor at an address that kernels cannot read.

    name: of the operand, or "name[e]" for expert e's part of it. multiple: as in `at_address`.
    """
    multiple = multiple or alignment(name.partition("[")[0], tensor)
    address = tensor.data_ptr()
    if address % multiple:
        raise misaligned(name, multiple, address)


def refuse_other_devices(tensors: Mapping[str, Tensor | None], device: torch.device) -> None:
    """Raises ValueError unless all tensors are on this device.

    Signatures do not tell the CPU from the meta device.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {device}, got one on {tensor.device}")
