"""The tiles of products with two-level sums whose rows come in order, from a count of waves.

Their SMs compute tiles of one size, a wave of them at a time. So the time of a product is that of a
tile times the number of waves, of which the last is rarely full: with few waves a smaller tile that
takes longer for its size may win.
"""

from __future__ import annotations

from itertools import count
from math import ceil, erfc, sqrt
from typing import NamedTuple

from emitters.spec.arch import Gpu
from emitters.spec.config_sm90 import GemmSm90Config
from emitters.spec.gemm import GemmProblem


class Tile(NamedTuple):
    """A config, and what was measured of it.

    cost: the time of a k-tile for its size; ends: the k-tiles whose time a tile's start and end
    take.
    """

    config: GemmSm90Config
    cost: float
    ends: float


# Fitted to 38 products on an H200, 23 of them with scales along K, in which the tile that they name
# takes at most 1.046 of the best one's time, 1.004 as a mean (perf/EXPERIMENTS.md, "Slices of a
# tile together").
_TILES = (
    Tile(GemmSm90Config(128, 256, tma_x=True), 1.0, 2.5),
    Tile(GemmSm90Config(192, 128, tma_x=True), 0.98, 3.0),
    Tile(GemmSm90Config(128, 128, tma_x=True), 1.03, 2.5),
    Tile(GemmSm90Config(64, 128, ctas_per_sm=2, tma_x=True), 1.3, 1.0),
)
# The number of tiles differs from call to call, as experts' rows do, so that of what rounding up to
# whole waves adds only a half counts.
_ROUNDED = 0.5


def tiles_of(problem: GemmProblem, wide: int) -> tuple[Tile, ...]:
    """The tiles for a problem. wide: the columns of its widest ones."""
    widest = _TILES[0]._replace(config=GemmSm90Config(128, wide, tma_x=True))
    return tuple(t for t in (widest, *_TILES[1:]) if t.config.why_illegal(problem) is None)


def fastest(
    problem: GemmProblem, wide: int, rows_per_expert: float, gpu: Gpu
) -> tuple[GemmSm90Config, ...]:
    """The config that takes the least time; nothing if none can be built. wide: see `tiles_of`."""
    tiles = sorted(tiles_of(problem, wide), key=lambda t: time(problem, t, rows_per_expert, gpu))
    return tuple(tile.config for tile in tiles[:1])


def time(problem: GemmProblem, tile: Tile, rows_per_expert: float, gpu: Gpu) -> float:
    """The time of a product, in units of a k-tile of a whole SM."""
    config = tile.config
    tiles = problem.num_experts * row_tiles(rows_per_expert, config.tile_m)
    waves = max(1.0, tiles * config.n_tiles(problem) / (gpu.sms * config.ctas_per_sm))
    waves += _ROUNDED * (ceil(waves) - waves)
    size = config.ctas_per_sm * config.tile_m * config.tile_n
    return waves * size * tile.cost * (config.k_tiles(problem) + tile.ends)


def row_tiles(rows: float, tile_m: int) -> float:
    """The mean number of tiles along M of experts that have a mean of so many rows.

    Random routing spreads them by their square root, and an expert without rows has no tile.
    """
    found, spread = 0.0, sqrt(2 * max(rows, 1.0))
    for i in count():
        more = 0.5 * erfc((i * tile_m + 0.5 - rows) / spread)  # share of experts with more rows
        found += more
        if more < 1e-3:
            return found
    raise AssertionError
