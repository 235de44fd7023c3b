"""The weights of one layer's experts, as a checkpoint or one rank's share of it has them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cutlass_moe.layer.pad import pad_experts
from cutlass_moe.models.problems import block_rows
from cutlass_moe.operands import FP8_BLOCK, NAMED_DTYPES, PACKINGS, Experts
from cutlass_moe.ops._packed import columns, packed_shape
from cutlass_moe.ops.activations import in_halves
from cutlass_moe.ops.pack import dequantize_packed, quantize_packed
from cutlass_moe.ops.quantize import quantize_per_token_reference
from cutlass_moe.ops.quantize_groups import quantize_per_block
from emitters.spec.packing import Packing

BLOCK = 128  # rows and columns of a weight that share a scale
# What names the weights' dtype in `ExpertWeights.quant`.
STORED = {**NAMED_DTYPES, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)  # tensors are not compared
class ExpertWeights:
    """Weights, scales and biases of E experts, whose intermediate size is I, or a rank's part of I.

    w13 [E, 2I, H]: gate, then up; interleaved: gate, up, gate, up, ... A model without a gate has
      w13 [E, I, H]. w2 [E, H, I]. Both are contiguous.
    quant: "bf16", "fp16", "fp8", "int8" or "fp8_block", which says what w13 and w2 are:
      bf16, fp16        values in that dtype, no scales
      fp8, int8         float8_e4m3fn or int8; w13_scale float32 [E, 2I or I], w2_scale [E, H]
      int4_g128, int4_g32, mxfp4
                        packed 4-bit weights, uint8, that hold their scales (`pack_weights`); rows
                        are gates, then ups, also of w13_bias, and inter is I
      fp8_block         float8_e4m3fn; a float32 scale per block:
                        w13_scale [E, 2 ceil(I / block_inter), ceil(H / 128)], w2_scale
                        [E, ceil(H / 128), ceil(I / 128)]
    block_inter: how many rows of w13 share a scale: 128, or 64 or 32 where one of these divides I
      and 128 does not, as in shares of tensor parallelism. All other sides of blocks are 128. gate
      and up have ceil(I / block_inter) rows of scales each. Without a gate, and interleaved, there
      is one part: ceil(rows of w13 / block_inter) rows of scales.
    w13_bias [E, 2I or I], w2_bias [E, H]: in the dtype of the checkpoint. With tensor parallelism
      w2_bias is that of the model on rank 0 and zeros elsewhere: it is added once in the sum.
    expert_map: int32 [experts of all ranks], the index of each here, or -1; None without expert
      parallelism.
    """

    w13: Tensor
    w2: Tensor
    w13_scale: Tensor | None
    w2_scale: Tensor | None
    quant: str
    block_inter: int | None = None
    interleaved: bool = False
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    expert_map: Tensor | None = None
    inter: int | None = None

    @property
    def experts(self) -> Experts:
        """The tensors alone, as `pad_experts` takes and gives them."""
        return Experts(
            self.w13, self.w2, self.w13_scale, self.w2_scale, self.w13_bias, self.w2_bias
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `fused_moe` that the weights are."""
        options = {"interleaved": self.interleaved, "expert_map": self.expert_map}
        quant = None if self.w13_scale is None else self.quant
        return {**self.experts._asdict(), **options, "quant": quant}

    def padded(self) -> ExpertWeights:
        """With the intermediate size that kernels take, as `pad_experts` makes it."""
        if self.quant in PACKINGS:
            return self  # their rows are whole blocks
        padded = pad_experts(**self.experts._asdict(), interleaved=self.interleaved)
        return replace(self, **padded._asdict())

    @property
    def parts(self) -> int:
        """How many parts of w13 have rows of scales of their own: 2 for gate and up."""
        gated = self.w13.shape[1] == 2 * self.w2.shape[2]
        return 2 if gated and not self.interleaved else 1

    def dense(self, expert: int) -> tuple[Tensor, Tensor]:
        """w13 [2I or I, H] and w2 [H, I] of an expert, in float32, scales applied."""
        if self.quant in PACKINGS:
            w13 = dequantize_packed(self.w13[expert, None], columns(self.w2))[0]
            return w13, dequantize_packed(self.w2[expert, None], self.inter)[0]
        w13, w2 = self.w13[expert].float(), self.w2[expert].float()
        if self.w13_scale is None or self.w2_scale is None:
            return w13, w2
        scale13, scale2 = self.w13_scale[expert], self.w2_scale[expert]
        if self.block_inter is None:
            return w13 * scale13[:, None], w2 * scale2[:, None]
        rows = [
            _repeat(part, self.block_inter, BLOCK, (len(w13) // self.parts, w13.shape[1]))
            for part in scale13.chunk(self.parts)
        ]
        return w13 * torch.cat(rows), w2 * _repeat(scale2, BLOCK, BLOCK, w2.shape)

    def store(self, index: int, other: ExpertWeights, other_index: int) -> None:
        """Writes an expert of other weights here, from its values in float32. quant is "bf16",
        "fp16", or another, whose values are quantised."""
        for values, weight, scale in zip(
            other.dense(other_index), (self.w13, self.w2), (self.w13_scale, self.w2_scale),
            strict=True,
        ):  # fmt: skip
            if self.quant in PACKINGS:
                order = other.interleaved and weight is self.w13
                weight[index] = quantize_packed(values[None], self.quant, interleaved=order)[0]
            elif scale is None:
                weight[index] = values
            elif self.block_inter is not None:
                up = weight is self.w13
                q, scales = quantize_per_block(
                    values[None],
                    weight.dtype,
                    rows=self.block_inter if up else BLOCK,
                    gated=up and self.parts == 2,
                )
                weight[index], scale[index] = q[0], scales[0]
            else:
                # in plain torch, with the kernel's bits: at load there may be no image for float32
                weight[index], scale[index] = quantize_per_token_reference(values, weight.dtype)
        if self.w13_bias is not None and other.w13_bias is not None:
            bias = other.w13_bias[other_index]
            if self.quant in PACKINGS and other.interleaved:
                bias = in_halves(bias)
            self.w13_bias[index] = bias
        if self.w2_bias is not None and other.w2_bias is not None:
            self.w2_bias[index] = other.w2_bias[other_index]

    def empty_like(self, experts: int, quant: str) -> ExpertWeights:
        """So many experts of the same sizes, not filled. quant: as `requantized` takes it."""
        bias = None if self.w13_bias is None else self.w13_bias.dtype
        sizes = (*self.w13.shape[1:], self.w2.shape[2])
        if self.quant in PACKINGS:
            assert self.inter is not None
            sizes = (columns(self.w13), columns(self.w2), self.inter)
        block = block_rows(sizes[-1]) if quant == FP8_BLOCK else None
        return allocate(
            experts, sizes, quant, self.w13.device, block, interleaved=self.interleaved, bias=bias
        )

    def requantized(self, quant: str) -> ExpertWeights:
        """The same experts as "bf16", or quantised again as "fp8" or "int8" with a scale per
        channel, as "fp8_block", or as packed 4-bit weights, one expert after the other.

        Weights that were quantised already become less exact by it. Raises ValueError for another
        quant.
        """
        if quant == self.quant:
            return self
        check_requantized(quant)
        new = self.empty_like(len(self.w13), quant)
        for expert in range(len(self.w13)):
            new.store(expert, self, expert)
        return replace(new, expert_map=self.expert_map)


def check_requantized(quant: str) -> None:
    """Raises ValueError unless weights can be quantised again as this."""
    names = (*NAMED_DTYPES, *PACKINGS)
    if quant not in names:
        raise ValueError(f"quant must be one of {', '.join(names)}, got {quant!r}")


def allocate(
    experts: int,
    sizes: tuple[int, ...],
    quant: str,
    device: torch.device,
    block_inter: int | None = None,
    interleaved: bool = False,
    bias: torch.dtype | None = None,
) -> ExpertWeights:
    """Experts that are not filled. sizes: rows of w13, H and I. bias: the dtype of biases."""
    rows, hidden, inter = sizes

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty((experts, *shape), dtype=dtype, device=device)

    packing = Packing(quant) if quant in PACKINGS else None
    dtype = torch.uint8 if packing else STORED[quant]
    shapes: tuple[tuple[int, ...], ...] = ((rows, hidden), (hidden, inter))
    if packing:
        shapes = tuple(packed_shape(packing, *shape) for shape in shapes)
    weights = ExpertWeights(
        w13=empty(dtype, *shapes[0]),
        w2=empty(dtype, *shapes[1]),
        w13_scale=None,
        w2_scale=None,
        quant=quant,
        block_inter=block_inter,
        interleaved=interleaved and not packing,
        w13_bias=None if bias is None else empty(bias, rows),
        w2_bias=None if bias is None else empty(bias, hidden),
        inter=inter if packing else None,
    )
    if packing or dtype.itemsize > 1:
        return weights
    shape13: tuple[int, ...] = (rows,)
    shape2: tuple[int, ...] = (hidden,)
    if block_inter is not None:
        blocks = weights.parts * ceil_div(rows // weights.parts, block_inter)
        shape13 = (blocks, ceil_div(hidden, BLOCK))
        shape2 = (ceil_div(hidden, BLOCK), ceil_div(inter, BLOCK))
    scales = empty(torch.float32, *shape13), empty(torch.float32, *shape2)
    return replace(weights, w13_scale=scales[0], w2_scale=scales[1])


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _repeat(scale: Tensor, rows: int, columns: int, shape: tuple[int, ...]) -> Tensor:
    """Scales of blocks [ceil(N / rows), ceil(K / columns)] for each value of [N, K]."""
    wide = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return wide[: shape[0], : shape[1]]
