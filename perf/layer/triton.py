"""A whole MoE layer in Triton, the peer of `fused_moe`: the steps that most serving systems launch.

Quantise the tokens, align (pairs sorted by expert, each expert's padded to whole blocks), the up
projection, SwiGLU and quantisation, the down projection, and each token's weighted sum: seven
kernels, six for bf16. The projections are those of `perf.product.triton`. Products stay in the
order of the (token, expert) pairs, so that the sum reads a token's rows in one piece.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from cutlass_moe.models.shapes import DTYPES, MoeShape
from cutlass_moe.operands import NAMED_DTYPES
from cutlass_moe.ops.quantize import LARGEST
from perf.layer.operands import LayerWeights
from perf.product.triton import Tiling, moe_kernel

CHUNKS = 64  # of the pairs, at most: every program of `list_kernel` reads all their counts
SUM_COLUMNS = 1024

# For at most so many rows an expert: tilings that products try too.
TILINGS = {
    12: (
        Tiling(16, 64, 256, 1, 4, 3),
        Tiling(16, 128, 256, 1, 4, 3),
        Tiling(16, 128, 128, 1, 4, 4),
    ),
    48: (
        Tiling(16, 128, 256, 1, 4, 3),
        Tiling(32, 128, 128, 1, 4, 4),
        Tiling(64, 128, 128, 1, 4, 4),
    ),
    160: (
        Tiling(64, 128, 128, 1, 4, 4),
        Tiling(64, 128, 128, 16, 8, 4),
        Tiling(128, 128, 128, 16, 8, 3),
    ),
    math.inf: (Tiling(128, 128, 128, 16, 8, 3), Tiling(128, 256, 128, 16, 8, 3)),
}


@triton.jit
def rounded(values, INT8: tl.constexpr):  # type: ignore[no-untyped-def]
    """To nearest, ties to even, where the conversion to int8 would cut off."""
    if INT8:
        # Adding 1.5 * 2^23 leaves no bit for a fraction: float32 of at most 2^22 are rounded.
        values = (values + 12582912.0) - 12582912.0
    return values


@triton.jit
def quantize_kernel(  # type: ignore[no-untyped-def]
    x, q, scale, K, LARGEST: tl.constexpr, INT8: tl.constexpr, BLOCK: tl.constexpr
):
    """Program t quantises row t of x [T, K]."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    values = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    unit = tl.maximum(tl.max(tl.abs(values)), 1e-10) / LARGEST
    tl.store(q + row * K + k, rounded(values / unit, INT8).to(q.dtype.element_ty), mask=k < K)
    tl.store(scale + row, unit)


@triton.jit
def activate_kernel(  # type: ignore[no-untyped-def]
    up,
    out,
    scale,
    inter,
    LARGEST: tl.constexpr,
    INT8: tl.constexpr,
    SCALED: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program r makes silu(a) of row r, or silu(a) * b of halves [a | b]; quantised if SCALED."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    real = n < inter
    width = 2 * inter if GATED else inter
    values = tl.load(up + row * width + n, mask=real, other=0.0).to(tl.float32)
    values = values * tl.sigmoid(values)
    if GATED:
        values *= tl.load(up + row * width + inter + n, mask=real, other=0.0).to(tl.float32)
    if SCALED:
        unit = tl.maximum(tl.max(tl.abs(values)), 1e-10) / LARGEST
        values = rounded(values / unit, INT8)
        tl.store(scale + row, unit)
    tl.store(out + row * inter + n, values.to(out.dtype.element_ty), mask=real)


@triton.jit
def sum_kernel(  # type: ignore[no-untyped-def]
    rows, topk_weights, residual, out, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (t, b) sums block b of a token's TOP_K rows, in order, in float32, onto residual's
    or, where that is None, onto zeros."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if residual is not None:
        total += tl.load(residual + token * hidden + n, mask=n < hidden, other=0.0).to(tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        values = tl.load(rows + pair * hidden + n, mask=n < hidden, other=0.0).to(tl.float32)
        total += values * tl.load(topk_weights + pair)
    tl.store(out + token * hidden + n, total.to(out.dtype.element_ty), mask=n < hidden)


@triton.jit
def count_kernel(  # type: ignore[no-untyped-def]
    topk_ids, counts, num_pairs, E, CHUNK: tl.constexpr, BINS: tl.constexpr
):
    """Program c counts each expert's pairs in chunk c: counts [chunks, E]."""
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(topk_ids + pair, mask=pair < num_pairs, other=0)
    bins = tl.arange(0, BINS)
    tl.store(counts + chunk * E + bins, tl.histogram(expert, BINS, pair < num_pairs), mask=bins < E)


@triton.jit
def list_kernel(  # type: ignore[no-untyped-def]
    topk_ids,
    counts,
    cursors,
    pairs,
    experts,
    num_padded,
    num_pairs,
    E,
    chunks,
    BM: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    BINS: tl.constexpr,
):
    """Program c < chunks lists chunk c's pairs; program chunks + e fills up expert e's blocks."""
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    chunk = tl.arange(0, CHUNKS)
    there = (chunk[:, None] < chunks) & (bins[None, :] < E)
    each = tl.load(counts + chunk[:, None] * E + bins[None, :], mask=there, other=0)
    total = tl.sum(each, axis=0)
    padded = (total + BM - 1) // BM * BM
    start = tl.cumsum(padded) - padded
    if program < chunks:
        before = tl.sum(tl.where(chunk[:, None] < program, each, 0), axis=0)
        cursor = cursors + program * E
        tl.store(cursor + bins, start + before, mask=bins < E)
        tl.debug_barrier()
        pair = program * CHUNK + tl.arange(0, CHUNK)
        real = pair < num_pairs
        expert = tl.load(topk_ids + pair, mask=real, other=0)
        target = tl.atomic_add(cursor + expert, 1, mask=real)
        tl.store(pairs + target, pair, mask=real)
        if program == 0:
            tl.store(num_padded, tl.sum(padded))
    else:
        mine = program - chunks
        first = tl.sum(tl.where(bins == mine, start, 0))
        count = tl.sum(tl.where(bins == mine, total, 0))
        blocks = tl.cdiv(count, BM)
        gap = tl.arange(0, BM)
        tl.store(pairs + first + count + gap, num_pairs, mask=gap < blocks * BM - count)
        block = tl.arange(0, 64)
        for at in range(0, blocks, 64):
            tl.store(experts + first // BM + at + block, mine, mask=at + block < blocks)


class TritonLayer:
    """The buffers of one layer at one number of tokens, with one tiling for both projections.

    gated: w13 [E, 2I, H], SwiGLU; else w13 [E, I, H], SiLU.
    """

    def __init__(
        self,
        shape: MoeShape,
        dtype: str,
        tokens: int,
        tiling: Tiling,
        device: torch.device,
        gated: bool = True,
    ) -> None:
        def empty(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        operand, rows, experts = NAMED_DTYPES[dtype], tokens * shape.top_k, shape.num_experts
        blocks = min(rows, rows // tiling.bm + experts)  # the most that a routing makes
        self.shape, self.tiling, self.gated, self.rows = shape, tiling, gated, rows
        self.int8, self.quantized = dtype == "int8", DTYPES[dtype].quantized
        self.chunk = max(256, power(triton.cdiv(rows, CHUNKS)))
        self.chunks = triton.cdiv(rows, self.chunk)
        self.counts, self.cursors = empty(self.chunks, experts), empty(self.chunks, experts)
        self.pairs, self.experts = empty(blocks * tiling.bm), empty(blocks)
        self.num_padded = empty(1)
        self.x = empty(tokens, shape.hidden, dtype=operand)
        self.x_scale = empty(tokens, dtype=torch.float32)
        self.up = empty(rows, (1 + gated) * shape.inter, dtype=torch.bfloat16)
        self.act = empty(rows, shape.inter, dtype=operand)
        self.act_scale = empty(rows, dtype=torch.float32)
        self.down = empty(rows, shape.hidden, dtype=torch.bfloat16)

    def __call__(
        self,
        hidden: torch.Tensor,
        weights: LayerWeights,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        out: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> None:
        """out bf16 [T, H]: the layer's output. topk_ids int32 [T, k], in [0, E). residual [T, H] is
        added."""
        x = hidden
        if self.quantized:
            x = self.x
            self.quantize(hidden)
        self.align(topk_ids)
        self.product(x, self.x_scale, weights.w13, weights.w13_scale, self.up, self.shape.top_k)
        self.activate()
        self.product(self.act, self.act_scale, weights.w2, weights.w2_scale, self.down, 1)
        self.sum(topk_weights, out, residual)

    def quantize(self, hidden: torch.Tensor) -> None:
        width, largest = self.shape.hidden, LARGEST[self.x.dtype]
        quantize_kernel[(len(hidden),)](
            hidden, self.x, self.x_scale, width, largest, self.int8, power(width), num_warps=8
        )

    def align(self, topk_ids: torch.Tensor) -> None:
        """Fills pairs, experts and num_padded, as `perf.product.triton.align` makes them."""
        sizes = (self.rows, self.shape.num_experts)
        bins = power(self.shape.num_experts)
        count_kernel[(self.chunks,)](topk_ids, self.counts, *sizes, self.chunk, bins)
        list_kernel[(self.chunks + self.shape.num_experts,)](
            topk_ids, self.counts, self.cursors, self.pairs, self.experts, self.num_padded,
            *sizes, self.chunks, self.tiling.bm, self.chunk, power(self.chunks), bins, num_warps=8,
        )  # fmt: skip

    def product(
        self,
        x: torch.Tensor,
        x_scale: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        out: torch.Tensor,
        slots: int,
    ) -> None:
        """out [pairs, N]: pair p's row is x[p // slots] times its expert's weights."""
        tiling, (n, k) = self.tiling, weight.shape[1:]
        bk = tiling.bk if self.quantized else min(tiling.bk, 64)
        moe_kernel[(self.experts.numel() * triton.cdiv(n, tiling.bn),)](
            x, weight, out, x_scale if self.quantized else None, scale,
            self.pairs, self.experts, self.num_padded, n, k, self.rows, slots,
            self.int8, self.quantized, k % bk == 0, tiling.bm, tiling.bn, bk, tiling.group,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip

    def activate(self) -> None:
        width = self.shape.inter
        activate_kernel[(self.rows,)](
            self.up, self.act, self.act_scale, width, LARGEST.get(self.act.dtype), self.int8,
            self.quantized, self.gated, power(width), num_warps=8 if width > 2048 else 4,
        )  # fmt: skip

    def sum(
        self, topk_weights: torch.Tensor, out: torch.Tensor, residual: torch.Tensor | None
    ) -> None:
        tokens, width = out.shape
        sum_kernel[(tokens, triton.cdiv(width, SUM_COLUMNS))](
            self.down, topk_weights, residual, out, width, self.shape.top_k, SUM_COLUMNS
        )


def tilings(rows_per_expert: float) -> tuple[Tiling, ...]:
    """Those worth trying."""
    return next(found for most, found in TILINGS.items() if rows_per_expert <= most)


@triton.jit
def topk_kernel(  # type: ignore[no-untyped-def]
    logits,
    topk_weights,
    topk_ids,
    E,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    BINS: tl.constexpr,
):
    """Program t chooses a token's TOP_K largest logits; their weights are softmax over them."""
    token = tl.program_id(0)
    bins = tl.arange(0, BINS)
    choices = tl.arange(0, CHOICES)
    left = tl.load(logits + token * E + bins, mask=bins < E, other=-float("inf")).to(tl.float32)
    chosen = tl.full((CHOICES,), -float("inf"), dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        best = tl.argmax(left, axis=0)
        chosen = tl.where(choices == choice, tl.max(left), chosen)
        tl.store(topk_ids + token * TOP_K + choice, best)
        left = tl.where(bins == best, -float("inf"), left)
    weights = tl.exp(chosen - tl.max(chosen))
    tl.store(topk_weights + token * TOP_K + choices, weights / tl.sum(weights), choices < TOP_K)


def topk(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] -> renormalised softmax weights float32 [T, k] and expert ids int32 [T, k]."""
    tokens, experts = logits.shape
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((tokens, top_k), dtype=torch.int32, device=logits.device)
    blocks = (power(top_k), power(experts))
    topk_kernel[(tokens,)](logits, weights, ids, experts, top_k, *blocks, num_warps=1)
    return weights, ids


def power(size: int) -> int:
    """The least power of two that is no smaller."""
    return triton.next_power_of_2(size)
