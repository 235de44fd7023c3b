"""Scales that vary along K: one per 128 of K of a row of x, and of each block of weights."""

from __future__ import annotations

from torch import Tensor

from emitters.spec.gemm import K_BLOCK, Granularity, block_count

BLOCKS = {g.rows: g for g in Granularity if g.rows}  # by rows of weights: 128, 64, 32


def block_shapes(weight: Tensor, gated: bool) -> dict[Granularity, tuple[int, ...]]:
    """The shapes of scales that vary along K, of weights [E, N, K], by their granularity."""
    experts, n, k = weight.shape
    return {
        granularity: (experts, block_count(n, rows, gated), -(-k // K_BLOCK))
        for rows, granularity in BLOCKS.items()
    }


def block_granularity(scale: Tensor, weight: Tensor, gated: bool) -> Granularity | None:
    """The granularity of a scale [E, blocks of N, K / 128] of weights [E, N, K].

    None for a scale that does not vary along K. Where several fit, the one with the most rows.
    """
    if scale.dim() != 3 or weight.dim() != 3:
        return None
    shapes = block_shapes(weight, gated).items()
    return next((granularity for granularity, shape in shapes if scale.shape == shape), None)


def is_block_scaled(scale: Tensor | None, weight: Tensor, gated: bool) -> bool:
    """Whether the scale of these weights varies along K."""
    return scale is not None and block_granularity(scale, weight, gated) is not None


def expand_x_scale(scale: Tensor, k: int) -> Tensor:
    """The scale of each element: [..., K / 128] -> [..., K]."""
    return scale.repeat_interleave(K_BLOCK, -1)[..., :k]


def expand_weight_scale(scale: Tensor, weight: Tensor, gated: bool) -> Tensor:
    """The scale of each weight: [E, blocks of N, K / 128] -> [E, N, K]."""
    granularity = block_granularity(scale, weight, gated)
    assert granularity is not None and granularity.rows is not None
    experts, n, k = weight.shape
    halves = 2 if gated else 1
    wide = scale.view(experts, halves, -1, scale.shape[-1]).repeat_interleave(granularity.rows, 2)
    return expand_x_scale(wide[:, :, : n // halves].flatten(1, 2), k)
