"""A fused-gather MoE kernel in Triton, the peer that runs anywhere: what most serving systems use.

The known structure: each expert's (token, expert) pairs are padded to whole blocks of BM and
listed in `pairs`; block m belongs to experts[m]; a pair's row of x is pair // slots, and its row
of the output is the pair itself. Configurations are searched per case, so that it is measured at
its best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

from perf.product.cases import ProductCase
from perf.product.operands import ProductTensors
from perf.timing import quick_us


@triton.jit(do_not_specialize=["slots", "num_pairs"])
def moe_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    x_scale,
    w_scale,
    pairs,
    experts,
    num_padded,
    N,
    K,
    num_pairs,
    slots,
    INT8: tl.constexpr,
    SCALED: tl.constexpr,
    WHOLE_K: tl.constexpr,  # K is a multiple of BK
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(tl.load(num_padded), BM)
    blocks_n = tl.cdiv(N, BN)
    # GROUP blocks of rows share a stripe of weights while it is in L2
    first = pid // (GROUP * blocks_n) * GROUP
    if first >= blocks_m:
        return
    group = tl.minimum(blocks_m - first, GROUP)
    block_m = first + (pid % (GROUP * blocks_n)) % group
    block_n = (pid % (GROUP * blocks_n)) // group
    if block_m >= blocks_m:
        return
    pair = tl.load(pairs + block_m * BM + tl.arange(0, BM)).to(tl.int64)
    real = pair < num_pairs
    expert = tl.load(experts + block_m).to(tl.int64)
    n = block_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_ptr = x + (pair[:, None] // slots) * K + k[None, :]
    w_ptr = weight + expert * N * K + (n % N)[None, :] * K + k[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.int32 if INT8 else tl.float32)
    for i in range(0, tl.cdiv(K, BK)):
        if WHOLE_K:
            a = tl.load(x_ptr, mask=real[:, None], other=0.0)
            b = tl.load(w_ptr)
        else:
            a = tl.load(x_ptr, mask=real[:, None] & (k[None, :] < K - i * BK), other=0.0)
            b = tl.load(w_ptr, mask=k[:, None] < K - i * BK, other=0.0)
        acc = tl.dot(a, b, acc=acc, out_dtype=tl.int32 if INT8 else tl.float32)
        x_ptr += BK
        w_ptr += BK
    result = acc.to(tl.float32)
    if SCALED:
        row_scale = tl.load(x_scale + pair // slots, mask=real, other=0.0)
        column_scale = tl.load(w_scale + expert * N + n, mask=n < N, other=0.0)
        result = result * row_scale[:, None] * column_scale[None, :]
    out_ptr = out + pair[:, None] * N + n[None, :]
    tl.store(out_ptr, result.to(tl.bfloat16), mask=real[:, None] & (n[None, :] < N))


@dataclass(frozen=True)
class Tiling:
    """Block sizes (of K: at most 64 for bf16), row blocks a group, warps, pipeline stages."""

    bm: int
    bn: int
    bk: int
    group: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return "/".join(map(str, astuple(self)))


SMALL = (
    Tiling(16, 64, 128, 1, 4, 4),
    Tiling(16, 128, 128, 1, 4, 4),
    Tiling(16, 64, 256, 1, 4, 3),
    Tiling(16, 128, 256, 1, 4, 3),
    Tiling(16, 32, 256, 1, 4, 4),
    Tiling(16, 128, 128, 1, 8, 4),
)
MIDDLE = (
    Tiling(32, 128, 128, 1, 4, 4),
    Tiling(64, 128, 128, 1, 4, 4),
    Tiling(64, 64, 128, 1, 4, 4),
    Tiling(64, 128, 128, 16, 8, 4),
    Tiling(64, 256, 128, 16, 8, 3),
)
BIG = (
    Tiling(128, 128, 128, 16, 8, 3),
    Tiling(128, 256, 128, 16, 8, 3),
    Tiling(128, 128, 64, 16, 8, 4),
    Tiling(128, 256, 64, 16, 8, 4),
    Tiling(64, 256, 128, 16, 4, 3),
    Tiling(128, 128, 128, 32, 4, 4),
)


def tilings(case: ProductCase) -> tuple[Tiling, ...]:
    """Those worth trying; a skewed routing has experts of every size."""
    if case.routing != "balanced":
        return SMALL + MIDDLE + BIG
    rows_per_expert = case.rows / case.num_experts
    if rows_per_expert <= 32:
        return SMALL + MIDDLE
    return MIDDLE + BIG if rows_per_expert <= 256 else BIG


def align(
    topk_ids: torch.Tensor, num_experts: int, block: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs sorted by expert, each expert's padded to whole blocks, all int32.

    Returns pairs [padded] (padding holds the number of pairs), the expert of each block [padded /
    block], and padded itself [1]. Reads counts on the host: it is not part of what is timed.
    """
    device = topk_ids.device
    experts, order = torch.sort(topk_ids.flatten(), stable=True)
    counts = torch.bincount(experts, minlength=num_experts)
    padded = (counts + block - 1) // block * block
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    total = int(padded.sum())
    pairs = torch.full((total,), order.numel(), dtype=torch.int32, device=device)
    pairs[torch.arange(order.numel(), device=device) + shift[experts]] = order.int()
    names = torch.arange(num_experts, dtype=torch.int32, device=device)
    blocks = torch.repeat_interleave(names, padded // block)
    return pairs, blocks, torch.tensor([total], dtype=torch.int32, device=device)


def fastest(
    case: ProductCase, tensors: ProductTensors, out: torch.Tensor, flush: torch.Tensor
) -> tuple[Callable[[torch.Tensor], None], Tiling]:
    """The launch, given a weight, of the tiling that took least time, and that tiling.

    out: bf16 [rows, N], its rows in the order of the pairs. Raises RuntimeError if no tiling runs.
    """
    launches, times = {}, {}
    for tiling in tilings(case):
        launches[tiling] = prepare(case, tensors, out, tiling)
        try:
            times[tiling] = quick_us(partial(launches[tiling], tensors.weight), flush)
        except TritonError:  # more shared memory or registers than there are
            continue
    if not times:
        raise RuntimeError(f"no Triton tiling runs {case.id}")
    best = min(times, key=lambda tiling: times[tiling])
    return launches[best], best


def prepare(
    case: ProductCase, tensors: ProductTensors, out: torch.Tensor, tiling: Tiling
) -> Callable[[torch.Tensor], None]:
    """A launch, given a weight."""
    pairs, blocks, padded = align(tensors.topk_ids, case.num_experts, tiling.bm)
    grid = (blocks.numel() * triton.cdiv(case.n, tiling.bn),)
    bk = tiling.bk if case.element.quantized else min(tiling.bk, 64)
    scales = (tensors.per_token_scale, tensors.scale)
    sizes = (case.n, case.k, case.rows, case.slots)
    flags = (case.dtype == "int8", case.element.quantized, case.k % bk == 0)
    tail = (*scales, pairs, blocks, padded, *sizes, *flags, tiling.bm, tiling.bn, bk, tiling.group)
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}

    def launch(weight: torch.Tensor) -> None:
        moe_kernel[grid](tensors.x, weight, out, *tail, **options)

    return launch
