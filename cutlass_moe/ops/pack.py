"""4-bit weights: from checkpoints' formats to the layout that kernels read, and back.

A packed tensor is plain uint8 [E, N / 32, K / 128, block bytes] that holds values and scales; its
last extent tells the formats apart. It can be sliced and concatenated along E, along N in blocks of
32 and along K in blocks of 128.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cutlass_moe.operands import FLOATS
from cutlass_moe.ops._packed import (
    block_sizes,
    dequantize_expert,
    pack_expert,
    packed_shape,
    packing_of,
    unpack_expert,
)
from cutlass_moe.ops._types import typed
from cutlass_moe.ops.activations import in_halves
from emitters.spec.packing import (
    BLOCK_K,
    BLOCK_ROWS,
    E2M1_VALUES,
    E8M0_LARGEST,
    INT4_LIMIT,
    Packing,
)

_BYTES = (torch.uint8, torch.int8)
_BIAS = 127  # of E8M0


@typed
def pack_weights(
    values: Tensor, scale: Tensor, *, interleaved: bool = False, out: Tensor | None = None
) -> Tensor:
    """Packs 4-bit weights as checkpoints hold them into the layout that kernels read.

      MXFP4 (gpt-oss, DeepSeek-V4)
        values  uint8 or int8 [E, N, K / 32, 16] or [E, N, K / 2]: two E2M1 per byte, the first in
                the low bits
        scale   [E, N, K / 32]: uint8 or float8_e8m0fnu, 2^(s - 127), or float32 powers of two; at
                most 2^33
      INT4 (compressed-tensors, "pack-quantized", symmetric)
        values  int32 [E, N, K / 8]: eight values + 8 per word, the first in the low bits
        scale   [E, N, K / 32] or [E, N, K / 128]: bfloat16, or float16 or float32 that bfloat16
                holds exactly; below 2^120. Kernels may take those below 2^-126 for 0

    N must be a multiple of 32 (with a gated activation, of 64). interleaved: rows are gate, up,
    gate, up, ... (gpt-oss) and become all gates, then all ups, which is the order of a packed
    tensor's rows; bias goes its own way. out: where to write, as returned. It takes little memory
    beside that, and works on the tensors' device.

    Returns uint8 [E, N / 32, K / 128 rounded up, 2112, 2304 or 2176]. Raises ValueError or
    TypeError that says what must be and what came.
    """
    packing = _format(values, scale)
    experts, n = values.shape[:2]
    multiple = 2 * BLOCK_ROWS if interleaved else BLOCK_ROWS
    if n % multiple:
        raise ValueError(f"N must be a multiple of {multiple}, got {n}: pad rows with zeros")
    k = scale.shape[2] * packing.group
    stored = _stored(scale, packing)
    shape = (experts, *packed_shape(packing, n, k))
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=values.device)
    elif out.shape != shape or out.dtype != torch.uint8 or out.device != values.device:
        raise ValueError(
            f"out must be uint8 {list(shape)} on {values.device}, got {out.dtype} "
            f"{list(out.shape)} on {out.device}"
        )
    for e in range(experts):
        codes = _codes(values[e].reshape(n, -1), packing)
        of_expert = stored[e]
        if interleaved:
            codes, of_expert = in_halves(codes), in_halves(of_expert)
        out[e] = pack_expert(codes, of_expert, packing)
    return out


@typed
def unpack_weights(
    packed: Tensor, k: int | None = None, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_weights`: (values, scale) as a checkpoint holds them, bit for bit.

    k: the K that was packed; default up to the end of the last block of 128. MXFP4 comes as uint8
    [E, N, K / 32, 16] and uint8 [E, N, K / 32], INT4 as int32 [E, N, K / 8] and bfloat16
    [E, N, K / group]. Raises ValueError if `packed` is not packed, or has no such K.
    """
    packing, k = _checked(packed, k)
    if packing is Packing.MXFP4 and k % 32:
        raise ValueError(f"k must be a multiple of 32 for MXFP4, got {k}")
    pairs = []
    for expert in packed:
        codes, scale = unpack_expert(expert, packing, k)
        if interleaved:
            codes, scale = (rows.unflatten(0, (2, -1)).transpose(0, 1) for rows in (codes, scale))
            codes, scale = codes.flatten(0, 1), scale.flatten(0, 1)
        if packing is Packing.MXFP4:
            values = (codes[:, ::2] | codes[:, 1::2] << 4).unflatten(1, (-1, 16))
        else:
            eight = codes.unflatten(1, (-1, 8)).int()
            values = sum(eight[..., i] << 4 * i for i in range(8))
        pairs.append((values, scale))
    values, scales = zip(*pairs, strict=True)
    return torch.stack(values), torch.stack(scales)


@typed
def dequantize_packed(
    packed: Tensor, k: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weights [E, N, K] that packed ones stand for; exact in float32 and float64.

    k: as in `unpack_weights`. Rows are in the packed tensor's order.
    """
    packing, k = _checked(packed, k)
    return torch.stack([dequantize_expert(expert, packing, k, dtype) for expert in packed])


@typed
def quantize_packed(weight: Tensor, format: str, *, interleaved: bool = False) -> Tensor:
    """Rounds weights [E, N, K] to 4 bits and packs them.

      "int4_g128", "int4_g32"   scale = max |w| / 7 of each 128 or 32 of K, rounded to bfloat16;
                                w / scale to the nearest integer, ties to even
      "mxfp4"                   scale = 2^(floor(log2(max |w|)) - 2) of each 32 of K, as the OCP MX
                                specification has it; w / scale to the nearest E2M1, at most 6

    weight: bfloat16, float16 or float32, on any device; N a multiple of 32 (with a gated
    activation, of 64), K of 8. interleaved and result: as in `pack_weights`. Raises ValueError or
    TypeError that says what must be and what came.
    """
    names = [str(packing) for packing in Packing]
    if format not in names:
        raise ValueError(f"format must be one of {', '.join(names)}, got {format!r}")
    if weight.dim() != 3 or weight.dtype not in FLOATS:
        raise ValueError(
            "weight must be [E, N, K], bfloat16, float16 or float32, got "
            f"{list(weight.shape)}, {weight.dtype}"
        )
    packing = Packing(format)
    experts, n, k = weight.shape
    multiple = 2 * BLOCK_ROWS if interleaved else BLOCK_ROWS
    if n % multiple or k % 8 or not k:
        raise ValueError(
            f"weight must have N a multiple of {multiple} and K a positive multiple of 8, got "
            f"{n} and {k}: pad with zeros"
        )
    shape = (experts, *packed_shape(packing, n, k))
    packed = torch.empty(shape, dtype=torch.uint8, device=weight.device)
    round_to = _round_e2m1 if packing is Packing.MXFP4 else _round_int4
    for e in range(experts):
        rows = in_halves(weight[e]) if interleaved else weight[e]
        groups = functional.pad(rows.float(), (0, -k % packing.group))
        codes, scale = round_to(groups.unflatten(1, (-1, packing.group)))
        packed[e] = pack_expert(codes.flatten(1)[:, :k].contiguous(), scale, packing)
    return packed


def _round_int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    scale = (groups.abs().amax(-1) / 7).bfloat16()
    scale = scale.where(scale != 0, 1.0)
    rounded = (groups / scale.float()[..., None]).round_().clamp_(-8, 7)
    return (rounded + 8).to(torch.uint8), scale


def _round_e2m1(groups: Tensor) -> tuple[Tensor, Tensor]:
    _, exponent = torch.frexp(groups.abs().amax(-1))  # of a mantissa in [0.5, 1)
    scale = (exponent - 3 + _BIAS).clamp(0, E8M0_LARGEST)
    magnitudes = torch.tensor(E2M1_VALUES, device=groups.device)
    limits = (magnitudes[1:] + magnitudes[:-1]) / 2
    scaled = torch.ldexp(groups, (_BIAS - scale)[..., None])
    # ties go to the even code: at an odd limit up, at an even one down
    down = torch.bucketize(scaled.abs(), limits)
    up = torch.bucketize(scaled.abs(), limits, right=True)
    codes = torch.where(up % 2 == 0, up, down)
    return (codes + 8 * torch.signbit(groups)).to(torch.uint8), scale.to(torch.uint8)


def _format(values: Tensor, scale: Tensor) -> Packing:
    """The format that values and scales have."""
    if values.dim() < 3 or scale.dim() != 3 or scale.shape[:2] != values.shape[:2]:
        raise ValueError(
            "values and scale must be [E, N, ...] and [E, N, groups], got "
            f"{list(values.shape)} and {list(scale.shape)}"
        )
    experts, n = values.shape[:2]
    count = values[0].numel() // n if experts and n else 0
    if values.dtype in _BYTES:
        if count != 16 * scale.shape[2] or values.dim() > 4 or not count:
            raise ValueError(
                "the values of MXFP4 must have 16 bytes per scale, got "
                f"{list(values.shape)} and scales {list(scale.shape)}"
            )
        return Packing.MXFP4
    if values.dtype != torch.int32:
        raise TypeError(f"values must be uint8 or int8 (MXFP4) or int32 (INT4), got {values.dtype}")
    for packing in (Packing.INT4_G128, Packing.INT4_G32):
        if values.dim() == 3 and count and 8 * count == packing.group * scale.shape[2]:
            return packing
    raise ValueError(
        "the values of INT4 must be [E, N, K / 8] with a scale per 32 or 128 of K, got "
        f"{list(values.shape)} and scales {list(scale.shape)}"
    )


def _stored(scale: Tensor, packing: Packing) -> Tensor:
    """The scales as `pack_expert` takes them, checked."""
    if packing is not Packing.MXFP4:
        if scale.dtype not in FLOATS:
            raise TypeError(f"scale must be bfloat16, float16 or float32, got {scale.dtype}")
        stored = scale.bfloat16()
        if not stored.isfinite().all() or not torch.equal(stored.to(scale.dtype), scale):
            raise ValueError(
                "scale must be finite and hold values of bfloat16, got others: scale.bfloat16() "
                "rounds them"
            )
        if scale.numel() and (largest := scale.abs().amax().item()) >= INT4_LIMIT:
            raise ValueError(f"scale must be below 2^120 for INT4, got {largest:g}")
        return stored
    if scale.dtype == torch.float32:
        mantissa, exponent = torch.frexp(scale)
        if not torch.equal(mantissa, torch.full_like(mantissa, 0.5)):
            raise ValueError("a float32 scale of MXFP4 must hold powers of two, got others")
        exponents = exponent + (_BIAS - 1)
        if scale.numel() and exponents.amin() < 0:
            raise ValueError(f"scale must be at least 2^-127, got {scale.amin().item():g}")
    elif scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponents = scale.view(torch.uint8)
    else:
        raise TypeError(
            f"scale must be uint8, float8_e8m0fnu or float32 for MXFP4, got {scale.dtype}"
        )
    if scale.numel() and exponents.amax() > E8M0_LARGEST:
        raise ValueError(
            f"scale must be at most 2^33 (E8M0 {E8M0_LARGEST}) for MXFP4, got E8M0 "
            f"{exponents.amax().item()}"
        )
    return exponents.to(torch.uint8)


def _codes(values: Tensor, packing: Packing) -> Tensor:
    """The codes [N, K] of one expert's values [N, bytes or words of K]."""
    if packing is Packing.MXFP4:
        both = values.view(torch.uint8)
        return torch.stack([both & 15, both >> 4], 2).flatten(1)
    return torch.stack([(values >> 4 * i & 15).to(torch.uint8) for i in range(8)], 2).flatten(1)


def _checked(packed: Tensor, k: int | None) -> tuple[Packing, int]:
    packing = packing_of(packed)
    if packing is None:
        raise ValueError(
            f"packed must be uint8 [E, N / 32, K / 128, block bytes] ({block_sizes()}), got "
            f"{packed.dtype} {list(packed.shape)}"
        )
    whole = packed.shape[2] * BLOCK_K
    k = whole if k is None else k
    if not whole - BLOCK_K < k <= whole or k % 8:
        raise ValueError(
            f"k must be a multiple of 8 from {whole - BLOCK_K + 1} to {whole} for these blocks, "
            f"got {k}"
        )
    return packing, k
