"""The choice of a config for products with packed weights, without a tuning table.

Converting weights wants 16 warps on an SM, so few rows have many or wide CTAs; each tile of rows
converts them anew, so many rows have the largest tiles.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import inf

from emitters.spec.arch import Gpu
from emitters.spec.config_packed_sm90 import GemmPackedSm90Config
from emitters.spec.gemm import GemmProblem
from emitters.spec.registry import why_illegal

Configs = tuple[GemmPackedSm90Config, ...]


def _one_producer(tile_m: int, tile_n: int, k_boxes: int) -> GemmPackedSm90Config:
    return GemmPackedSm90Config(tile_m, tile_n, k_boxes=k_boxes, one_producer=True)


# Measured on an H200 (perf/EXPERIMENTS.md, "4-bit weights").
_ONCE = 38  # up to this many rows per expert, most weights are read once: evict them first
# (rows per expert up to, configs of which the first that registers allow is taken)
_BY_ROWS: tuple[tuple[float, Configs], ...] = (
    (
        6,
        tuple(
            GemmPackedSm90Config(8, 64, ctas_per_sm=ctas, k_boxes=boxes)
            for ctas, boxes in ((4, 4), (4, 2), (3, 4), (3, 2), (2, 2))
        ),
    ),
    (10, (_one_producer(16, 256, 4), _one_producer(16, 256, 2))),
    (16, (_one_producer(24, 256, 4), _one_producer(24, 256, 2))),
    (23, (_one_producer(32, 256, 4),)),
    (30, (_one_producer(40, 256, 4), _one_producer(40, 192, 4))),
    (_ONCE, (_one_producer(48, 256, 4), _one_producer(48, 192, 4))),
    (45, (_one_producer(56, 256, 4), _one_producer(56, 192, 4))),
    (50, (_one_producer(64, 256, 2), _one_producer(64, 192, 4))),
    (70, (_one_producer(80, 256, 2), _one_producer(80, 192, 4))),
    (84, (_one_producer(96, 192, 2), _one_producer(96, 128, 2))),
    (100, (_one_producer(112, 192, 2), _one_producer(112, 128, 2))),
    (700, (_one_producer(144, 192, 2), _one_producer(144, 128, 2))),
    (inf, (_one_producer(128, 192, 2), _one_producer(144, 128, 2))),
)
_SMALLEST = (GemmPackedSm90Config(64, 128), GemmPackedSm90Config(32, 64))  # if none of these
# (tiles of 64 columns per SM up to, config): with so few, groups of consumers share a tile's K, and
# tiles have 32 columns, but for long K, where stages of two blocks are faster if registers allow.
_LONG_K = 4096
_IN_TURN_LONG = (
    (0.5, GemmPackedSm90Config(8, 32, ctas_per_sm=2, k_groups=4)),
    (1, GemmPackedSm90Config(8, 64, ctas_per_sm=2, k_groups=2)),
)
_IN_TURN = (
    (1, GemmPackedSm90Config(8, 32, ctas_per_sm=2, k_groups=4, k_boxes=2)),
    (1.5, GemmPackedSm90Config(8, 32, ctas_per_sm=4, k_groups=2, k_boxes=2)),
    (1.5, GemmPackedSm90Config(8, 32, ctas_per_sm=3, k_groups=2, k_boxes=2)),
)


def chosen(problem: GemmProblem, rows_per_expert: float, gpu: Gpu) -> Configs:
    """The config for so many rows, or nothing if registers allow none."""
    limit, configs = next(entry for entry in _BY_ROWS if rows_per_expert <= entry[0])
    if configs == _BY_ROWS[0][1]:
        tiles = min(1.0, rows_per_expert) * problem.num_experts * -(-problem.n // 64)
        configs = _few_tiles(tiles / gpu.sms, problem.k)
    return _first_legal(problem, configs, limit <= _ONCE)


def candidates(problem: GemmProblem) -> Configs:
    """Every config that `chosen` may return."""
    found = [_first_legal(problem, configs, rows <= _ONCE) for rows, configs in _BY_ROWS]
    limits = (tiles for tiles, _ in (*_IN_TURN_LONG, *_IN_TURN))
    found += [_first_legal(problem, _few_tiles(tiles, problem.k), True) for tiles in limits]
    return tuple(dict.fromkeys(config for configs in found for config in configs))


def _few_tiles(tiles_per_sm: float, k: int) -> Configs:
    """Configs for single rows per expert, the best first."""
    entries = (*_IN_TURN_LONG, *_IN_TURN) if k >= _LONG_K else _IN_TURN
    in_turn = (config for limit, config in entries if tiles_per_sm <= limit)
    return (*in_turn, *_BY_ROWS[0][1])


@lru_cache(maxsize=1024)
def _first_legal(problem: GemmProblem, configs: Configs, evict_first: bool) -> Configs:
    """The first of these configs, or of smaller ones, that registers allow, if any."""
    most = max(configs[0].tile_m // 16 * 16, 8)
    smallest = (replace(config, tile_m=min(most, config.tile_m)) for config in _SMALLEST)
    for config in (*configs, *smallest):
        narrow = min(config.tile_n, -(-problem.n // 64) * 64)
        config = replace(config, tile_n=narrow, evict_first=evict_first)
        if why_illegal(problem, config) is None:
            return (config,)
    return ()
