"""Packed 4-bit weights of one expert: codes and scales to and from the kernels' layout.

codes: uint8 [N, K], the four bits of each weight. scale: as the format stores it, bfloat16
[N, K / group] or, for MXFP4, the bytes of E8M0. The layout is that of emitters/spec/packing.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from emitters.spec.packing import (
    BLOCK_K,
    BLOCK_ROWS,
    E2M1_VALUES,
    E8M0_OFFSET,
    UNIT_ROWS,
    UNITS,
    VALUE_BYTES,
    Packing,
)

_ZERO_CODE = {Packing.MXFP4: 0}  # 8, a zero, for integers
_VALUES = {
    Packing.MXFP4: (*E2M1_VALUES, *(-value for value in E2M1_VALUES)),
}
_INTEGERS = tuple(float(code - 8) for code in range(16))


def packing_of(weight: Tensor) -> Packing | None:
    """The format of packed weights, uint8 [E, N / 32, K / 128, block bytes]; None for others."""
    if weight.dim() != 4 or weight.dtype != torch.uint8:
        return None
    return next((one for one in Packing if one.block_bytes == weight.shape[3]), None)


def packed_shape(packing: Packing, n: int, k: int) -> tuple[int, int, int]:
    """The shape of one expert's packed weights [N, K]; N is a multiple of 32."""
    return (*packing.blocks(n, k), packing.block_bytes)


def columns(weight: Tensor) -> int:
    """N of weights [E, N, K] or of packed ones."""
    return weight.shape[1] if packing_of(weight) is None else weight.shape[1] * BLOCK_ROWS


def block_sizes() -> str:
    """The block bytes of all formats, for errors."""
    return ", ".join(f"{packing.block_bytes} for {packing}" for packing in Packing)


def pack_expert(codes: Tensor, scale: Tensor, packing: Packing) -> Tensor:
    """Packs the weights of one expert: uint8 [N / 32, K / 128, block bytes]."""
    n, k = codes.shape
    n_blocks, k_blocks = packing.blocks(n, k)
    codes = functional.pad(codes, (0, -k % BLOCK_K), value=_ZERO_CODE.get(packing, 8))
    # K is word, pair, t, c of emitters/spec/packing.py; rows are unit, g
    by_pair = codes.view(n_blocks, UNITS, UNIT_ROWS, k_blocks, 4, 4, 4, 2)
    by_pair = by_pair.permute(5, 0, 3, 1, 2, 6, 4, 7)
    halves = torch.zeros(by_pair.shape[1:], dtype=torch.int32, device=codes.device)
    for pair, positions in enumerate(packing.positions):
        bits = by_pair[pair].int()
        for shift, mask, other in _moves(positions):
            moved = (bits & mask) << shift
            halves |= moved.flip(-1) if other else moved
    shape = (n_blocks, k_blocks, UNITS, -1)
    values = halves.to(torch.int16).reshape(shape).view(torch.uint8)
    scale = functional.pad(scale, (0, k_blocks * packing.groups - scale.shape[1]))
    if packing is Packing.MXFP4:
        exponent = scale + E8M0_OFFSET
        scale = exponent >> 1 | exponent << 7
    scale = scale.view(torch.uint8)
    scale = scale.view(n_blocks, UNITS, UNIT_ROWS, k_blocks, -1).permute(0, 3, 1, 2, 4)
    return torch.cat([values, scale.reshape(shape)], 3).flatten(2)


def unpack_expert(packed: Tensor, packing: Packing, k: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_expert`: (codes, scale) of the first k of K."""
    n_blocks, k_blocks, _ = packed.shape
    units = packed.unflatten(2, (UNITS, -1))
    shape = (n_blocks, k_blocks, UNITS, UNIT_ROWS, 4, 4, 2)
    halves = units[..., :VALUE_BYTES].contiguous().view(torch.int16).view(shape).int()
    codes = torch.zeros((4, *shape), dtype=torch.uint8, device=packed.device)
    for pair, positions in enumerate(packing.positions):
        for shift, mask, other in _moves(positions):
            moved = (halves >> shift & mask).to(torch.uint8)
            codes[pair] |= moved.flip(-1) if other else moved
    codes = codes.permute(1, 3, 4, 2, 6, 0, 5, 7).reshape(n_blocks * BLOCK_ROWS, -1)
    scale = units[..., VALUE_BYTES:].unflatten(3, (UNIT_ROWS, -1)).permute(0, 2, 3, 1, 4)
    scale = scale.reshape(len(codes), -1)
    if packing is Packing.MXFP4:
        scale = (scale << 1 | scale >> 7) - E8M0_OFFSET
    else:
        scale = scale.view(torch.bfloat16)
    return codes[:, :k].contiguous(), scale[:, : -(-k // packing.group)].contiguous()


def dequantize_expert(packed: Tensor, packing: Packing, k: int, dtype: torch.dtype) -> Tensor:
    """The weights [N, K] that kernels multiply by: exact in float32 and float64."""
    codes, scale = unpack_expert(packed, packing, k)
    values = torch.tensor(_VALUES.get(packing, _INTEGERS), dtype=dtype, device=packed.device)
    factors = scale.to(dtype)
    if packing is Packing.MXFP4:
        factors = torch.exp2(factors - 127)
    return values[codes.int()] * factors.repeat_interleave(packing.group, 1)[:, :k]


def _moves(positions: tuple[int, ...]) -> list[tuple[int, int, bool]]:
    """The (shift, mask, whether to the other element) by which a code's bits go to positions."""
    masks: dict[tuple[int, bool], int] = {}
    for bit, position in enumerate(positions):
        move = position % 16 - bit, position >= 16
        masks[move] = masks.get(move, 0) | 1 << bit
    return [(shift, mask, other) for (shift, other), mask in masks.items()]
