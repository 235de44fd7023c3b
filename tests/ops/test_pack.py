"""Packed 4-bit weights against unpackers written here from the formats' definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cutlass_moe.ops._packed import packing_of
from cutlass_moe.ops.pack import (
    dequantize_packed,
    pack_weights,
    quantize_packed,
    unpack_weights,
)
from emitters.spec.packing import Packing

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    size = torch.empty((), dtype=dtype).itemsize
    shape = (*shape[:-1], shape[-1] * size)
    bits = torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)
    return bits.view(dtype)


def mxfp4(experts: int, n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Blocks and scales as gpt-oss's checkpoint has them; every byte and every legal scale."""
    scale = torch.randint(0, 161, (experts, n, k // 32), generator=generator(seed))
    return random_bits((experts, n, k // 32, 16), torch.uint8, seed), scale.to(torch.uint8)


def int4(experts: int, n: int, k: int, group: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    scale = torch.randn((experts, n, k // group), generator=generator(seed)).bfloat16()
    return random_bits((experts, n, k // 8), torch.int32, seed), scale


def decode_mxfp4(blocks: Tensor, scale: Tensor) -> Tensor:
    """The definition, float64 [N, K], of one expert, byte by byte."""
    rows = []
    for row, exponents in zip(blocks.tolist(), scale.tolist(), strict=True):
        values = []
        for block, exponent in zip(row, exponents, strict=True):
            for byte in block:
                for nibble in (byte & 15, byte >> 4):
                    magnitude = E2M1[nibble & 7] * 2.0 ** (exponent - 127)
                    values.append(-magnitude if nibble & 8 else magnitude)
        rows.append(values)
    return torch.tensor(rows, dtype=torch.float64)


def decode_int4(words: Tensor, scale: Tensor) -> Tensor:
    """The definition, float64 [N, K], of one expert, word by word."""
    group = 8 * words.shape[1] // scale.shape[1]
    rows = []
    for row, scales in zip(words.tolist(), scale.double().tolist(), strict=True):
        codes = [(word >> 4 * i & 15) - 8 for word in row for i in range(8)]
        rows.append([code * scales[k // group] for k, code in enumerate(codes)])
    return torch.tensor(rows, dtype=torch.float64)


FORMATS = {
    "mxfp4": lambda n, k: (mxfp4(2, n, k), decode_mxfp4),
    "int4_g32": lambda n, k: (int4(2, n, k, 32), decode_int4),
    "int4_g128": lambda n, k: (int4(2, n, k, 128), decode_int4),
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (64, 384), (192, 256)])
@pytest.mark.parametrize("name", FORMATS)
def test_packed_weights_are_those_of_the_checkpoint(
    name: str, n: int, k: int, interleaved: bool
) -> None:
    (values, scale), decode = FORMATS[name](n, k)
    packed = pack_weights(values, scale, interleaved=interleaved)
    assert packing_of(packed) == Packing(name)
    assert packed.shape == (2, n // 32, k // 128, Packing(name).block_bytes)
    wanted = torch.stack([decode(*pair) for pair in zip(values, scale, strict=True)])
    if interleaved:
        wanted = torch.cat([wanted[:, ::2], wanted[:, 1::2]], 1)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(dequantize_packed(packed, dtype=dtype).double(), wanted)
    back = unpack_weights(packed, interleaved=interleaved)
    for got, given in zip(back, (values, scale), strict=True):
        assert got.dtype == given.dtype and torch.equal(got, given)


@pytest.mark.parametrize("name", ["mxfp4", "int4_g32"])
def test_k_is_padded_to_whole_blocks(name: str) -> None:
    (values, scale), decode = FORMATS[name](32, 160)
    packed = pack_weights(values, scale)
    assert packed.shape[2] == 2
    whole = dequantize_packed(packed)
    assert torch.equal(whole[0, :, :160].double(), decode(values[0], scale[0]))
    assert not whole[:, :, 160:].any()
    assert torch.equal(dequantize_packed(packed, 160), whole[:, :, :160])
    back = unpack_weights(packed, 160)
    assert torch.equal(back[0], values) and torch.equal(back[1], scale)


def test_experts_rows_and_blocks_of_k_are_slices() -> None:
    values, scale = int4(3, 96, 384, 128)
    packed = pack_weights(values, scale)
    assert torch.equal(pack_weights(values[1:], scale[1:]), packed[1:])
    assert torch.equal(pack_weights(values[:, 32:], scale[:, 32:]), packed[:, 1:])
    part = pack_weights(values[:, :, 16:].contiguous(), scale[:, :, 1:].contiguous())
    assert torch.equal(part, packed[:, :, 1:])


def test_other_forms_of_the_same_numbers() -> None:
    blocks, scale = mxfp4(2, 32, 128)
    scale.clamp_(1)
    packed = pack_weights(blocks, scale)
    assert torch.equal(pack_weights(blocks.flatten(2).view(torch.int8), scale), packed)
    assert torch.equal(pack_weights(blocks, scale.view(torch.float8_e8m0fnu)), packed)
    assert torch.equal(pack_weights(blocks, torch.exp2(scale.float() - 127)), packed)
    words, bf16 = int4(2, 32, 128, 32)
    assert torch.equal(pack_weights(words, bf16.float()), pack_weights(words, bf16))


def test_out_is_written_in_place() -> None:
    values, scale = mxfp4(2, 32, 128)
    room = torch.empty((4, 1, 1, 2176), dtype=torch.uint8)
    assert pack_weights(values, scale, out=room[1:3]).data_ptr() == room[1].data_ptr()
    assert torch.equal(room[1:3], pack_weights(values, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", FORMATS)
def test_quantised_weights_are_the_nearest(name: str, dtype: torch.dtype) -> None:
    weight = torch.randn((2, 64, 264), generator=generator()).to(dtype)
    weight[0, 0] = 0
    packed = quantize_packed(weight, name)
    got, wide = dequantize_packed(packed, 264, torch.float64), weight.double()
    packing = Packing(name)
    groups = torch.nn.functional.pad(wide, (0, -264 % packing.group))
    largest = groups.unflatten(2, (-1, packing.group)).abs().amax(3)
    _, scale = unpack_weights(packed)
    scale = scale[:, :, : largest.shape[2]]
    if packing is Packing.MXFP4:
        wanted = torch.exp2(torch.floor(torch.log2(largest)) - 2)
        steps = torch.exp2(scale.double() - 127)
        assert torch.equal(steps[largest > 0], wanted[largest > 0])
        levels = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float64)
    else:
        steps = scale.double()
        levels = torch.arange(-8, 8).double()
    factors = steps.repeat_interleave(packing.group, 2)[:, :, :264]
    distance = (wide[..., None] / factors[..., None] - levels).abs().amin(3)
    assert torch.allclose((wide - got).abs() / factors, distance, rtol=0, atol=1e-6)
    assert not got[0, 0].any()


def test_mxfp4_ties_go_to_even_codes() -> None:
    values = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.9, 4.0])
    weight = torch.zeros((1, 32, 32))
    weight[0, 0, :9], weight[0, 1, :9] = values, -values
    got = dequantize_packed(quantize_packed(weight, "mxfp4"), 32)
    wanted = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 4.0])
    assert torch.equal(got[0, 0, :9], wanted) and torch.equal(got[0, 1, :9], -wanted)


def test_interleaved_weights_are_quantised_in_halves() -> None:
    weight = torch.randn((1, 64, 128), generator=generator())
    halves = torch.cat([weight[:, ::2], weight[:, 1::2]], 1)
    packed = quantize_packed(weight, "int4_g128", interleaved=True)
    assert torch.equal(packed, quantize_packed(halves, "int4_g128"))


BLOCKS, E8M0 = mxfp4(1, 32, 128)
WORDS, BF16 = int4(1, 32, 128, 128)
ERRORS = [
    ("ragged N", (BLOCKS[:, :24], E8M0[:, :24]), ValueError, "multiple of 32, got 24"),
    ("fewer scales", (BLOCKS, E8M0[:, :, :3]), ValueError, "16 bytes per scale"),
    ("rows apart", (BLOCKS, E8M0[:, :16]), ValueError, r"\[E, N, groups\]"),
    ("groups of 64", (WORDS, BF16.repeat(1, 1, 2)), ValueError, "32 or 128 of K"),
    ("float values", (WORDS.float(), BF16), TypeError, "int32"),
    ("large scale", (BLOCKS, E8M0 + 127), ValueError, r"at most 2\^33"),
    ("odd float scale", (BLOCKS, E8M0.float() + 3), ValueError, "powers of two"),
    ("bfloat16 scale of MXFP4", (BLOCKS, BF16.repeat(1, 1, 4)), TypeError, "float8_e8m0fnu"),
    ("wide scale", (WORDS, BF16.float() + 2**-20), ValueError, "hold values of bfloat16"),
    ("infinite scale", (WORDS, BF16 / 0), ValueError, "finite"),
    ("large integer scale", (WORDS, BF16 * 2.0**125), ValueError, r"below 2\^120"),
    ("integer scale", (WORDS, E8M0[:, :, :1]), TypeError, "bfloat16, float16 or float32"),
]


@pytest.mark.parametrize(
    ("arguments", "kind", "words"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS]
)
def test_what_cannot_be_packed_is_refused(
    arguments: tuple[Tensor, Tensor], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        pack_weights(*arguments)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="multiple of 64, got 32"):
        pack_weights(WORDS, BF16, interleaved=True)
    with pytest.raises(ValueError, match=r"out must be uint8 \[1, 1, 1, 2112\]"):
        pack_weights(WORDS, BF16, out=torch.empty(3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="2112 for int4_g128"):
        unpack_weights(WORDS)
    with pytest.raises(ValueError, match="from 1 to 128"):
        unpack_weights(pack_weights(WORDS, BF16), 136)
    with pytest.raises(ValueError, match="multiple of 32 for MXFP4"):
        unpack_weights(pack_weights(BLOCKS, E8M0), 120)
    with pytest.raises(ValueError, match="int4_g128, int4_g32, mxfp4"):
        quantize_packed(torch.zeros(1, 32, 32), "int4")
    with pytest.raises(ValueError, match="K a positive multiple of 8"):
        quantize_packed(torch.zeros(1, 32, 36), "mxfp4")
    with pytest.raises(ValueError, match="bfloat16, float16 or float32"):
        quantize_packed(torch.zeros((1, 32, 32), dtype=torch.float64), "mxfp4")
    with pytest.raises(TypeError, match="values must be a tensor"):
        pack_weights([WORDS], BF16)
