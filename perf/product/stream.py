"""The yardstick: a kernel that reads the active experts' weights, each byte once, and no more.

No product of one row of these experts takes less time than this, whatever its kernel, except by
reading faster. It is checked by what it read: the sum of the words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from perf.product.operands import ProductTensors
from perf.timing import quick_us


@triton.jit
def stream_kernel(  # type: ignore[no-untyped-def]
    weight,
    experts,
    sums,
    words,
    blocks,
    BLOCK: tl.constexpr,
    LOADS: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Program p adds up BLOCK * LOADS words of one expert, of which each has `blocks` programs."""
    program = tl.program_id(0)
    expert = tl.load(experts + program // blocks).to(tl.int64)
    first = program % blocks * (BLOCK * LOADS) + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for load in tl.static_range(LOADS):
        at = first + load * BLOCK
        at_weight = weight + expert * words + at
        total += tl.load(at_weight, mask=at < words, other=0, eviction_policy=EVICT)
    tl.store(sums + program, tl.sum(total))


@dataclass(frozen=True)
class Share:
    """What a program reads: `loads` of `block` words of 4 bytes, by `warps`; their policy in L2."""

    block: int
    loads: int
    warps: int
    evict: str

    def __str__(self) -> str:
        return "/".join(map(str, astuple(self)))


SHARES = tuple(
    Share(block, loads, warps, evict)
    for block, loads, warps in (
        (1024, 4, 4),
        (2048, 2, 4),
        (2048, 2, 8),
        (4096, 2, 8),
        (4096, 4, 16),
    )
    for evict in ("", "evict_first")
)


def fastest(
    tensors: ProductTensors, flush: torch.Tensor
) -> tuple[Callable[[torch.Tensor], None], Share]:
    """The launch, given a weight [E, N, K], of the share that took least time, and that share.

    Raises AssertionError where the words read do not add up to the active experts'.
    """
    launches = {share: prepare(tensors, share) for share in SHARES}
    times = {s: quick_us(partial(launches[s], tensors.weight), flush) for s in SHARES}
    best = min(times, key=lambda share: times[share])
    return launches[best], best


def prepare(tensors: ProductTensors, share: Share) -> Callable[[torch.Tensor], None]:
    """A launch, given a weight. What it reads is checked once, on the tensors' own."""
    experts = tensors.offsets.diff(prepend=tensors.offsets.new_zeros(1)).nonzero().flatten().int()
    words = tensors.weight[0].nbytes // 4
    blocks = triton.cdiv(words, share.block * share.loads)
    sums = torch.empty(len(experts) * blocks, dtype=torch.int32, device=experts.device)

    def launch(weight: torch.Tensor) -> None:
        stream_kernel[(len(sums),)](
            weight.view(torch.int32), experts, sums, words, blocks, share.block, share.loads,
            share.evict, num_warps=share.warps,
        )  # fmt: skip

    launch(tensors.weight)
    read = sums.view(len(experts), blocks).sum(1, dtype=torch.int64)
    for got, expert in zip(read.tolist(), experts.tolist(), strict=True):
        want = int(tensors.weight[expert].view(torch.int32).sum(dtype=torch.int64))
        assert (got - want) % 2**32 == 0, f"expert {expert}: words not read, or read twice"
    return launch
