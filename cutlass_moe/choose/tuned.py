"""Tuning tables: the fastest config measured for a GPU, a problem and a number of rows per expert.

`cutlass-moe tune` writes them. The files that CUTLASS_MOE_TUNING lists, as PATH does, come before
the ones in this package; the first table that knows a GPU and a problem answers. A table is JSON:

    {"NVIDIA H200": {"e4m3 fast, E 8, N 4096, K 14336": [
        {"config": {...}, "us": {ROWS_PER_EXPERT: MICROSECONDS, ...}}, ...]}}
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from cutlass_moe.environment import TUNING
from emitters.spec.config_sm90 import SCALE_SPAN, GemmSm90Config
from emitters.spec.gemm import GemmProblem
from emitters.spec.registry import GemmConfig, gemm_config_from_json, why_illegal

FAR = 1.5  # `tune` measures at powers of two, so the nearest is at most a factor sqrt(2) away
_SHIPPED = tuple(sorted(map(str, Path(__file__).with_name("tables").glob("*.json"))))


class TunedConfig(NamedTuple):
    """The fastest config at a number of rows per expert, and its microseconds."""

    rows_per_expert: float
    config: GemmConfig
    us: float


Table = dict[str, dict[str, tuple[TunedConfig, ...]]]  # by GPU, then by `name_of` a problem


def name_of(problem: GemmProblem) -> str:
    """The name of a problem in tables.

    It leaves out gather, output, epilogue and the rows of a block of scales, which hardly change
    which config is fastest. Scales that vary along K do: "e4m3 two_level 1x128, E 8, ...", and so
    does the format of packed weights: "bf16 x mxfp4 fp32, E 8, ...". So do other outputs beside the
    first: "bf16 fp32, E 8, N 4096, K 14336, more outputs".
    """
    more = "" if problem.sole_output else ", more outputs"
    size = f"E {problem.num_experts}, N {problem.n}, K {problem.k}{more}"
    blocks = f" {problem.x_scale}" if problem.block_rows else ""
    operands = f"{problem.x} x {problem.weight.packing}" if problem.weight.packing else problem.x
    return f"{operands} {problem.accumulation}{blocks}, {size}"


def lookup(problem: GemmProblem, gpu: str, rows_per_expert: float) -> GemmConfig | None:
    """The config measured at the nearest number of rows per expert, by ratio.

    None without a table, or if the nearest is more than a factor FAR away. Raises ValueError for a
    file in CUTLASS_MOE_TUNING that is no table.
    """

    def far(entry: TunedConfig) -> float:
        return abs(math.log(entry.rows_per_expert / rows_per_expert))

    entries = _entries(problem, gpu, TUNING.read())
    if not entries or rows_per_expert <= 0:
        return None
    nearest = min(entries, key=far)
    return nearest.config if far(nearest) <= math.log(FAR) else None


def configs(problem: GemmProblem) -> tuple[GemmConfig, ...]:
    """Every config that `lookup` may return for this problem on any GPU; raises what it raises."""
    files = TUNING.read()
    gpus = dict.fromkeys(gpu for table in _tables(files) for gpu in table)
    listed = (entry.config for gpu in gpus for entry in _entries(problem, gpu, files))
    return tuple(dict.fromkeys(listed))


@lru_cache(maxsize=4096)
def _entries(problem: GemmProblem, gpu: str, files: str) -> tuple[TunedConfig, ...]:
    """The entries of the first table that knows the problem, without configs illegal for it."""
    name = name_of(problem)
    known = (table.get(gpu, {}).get(name, ()) for table in _tables(files))
    entries = next(filter(None, known), ())
    loading = (entry._replace(config=with_loads(problem, entry.config)) for entry in entries)
    return tuple(entry for entry in loading if why_illegal(problem, entry.config) is None)


def with_loads(problem: GemmProblem, config: GemmConfig) -> GemmConfig:
    """The config with x loaded as is fastest: by TMA where rows are in order, and only there;
    elsewhere scales along K 16 bytes at a time, where clusters lose."""
    if not isinstance(config, GemmSm90Config):
        return config
    spans = replace(config, cluster_m=1, scale_span=SCALE_SPAN)
    if problem.block_rows and problem.gather and spans.why_illegal(problem) is None:
        return spans
    return replace(config, tma_x=not problem.gather)


@lru_cache(maxsize=16)
def _tables(files: str) -> tuple[Table, ...]:
    return tuple(read(Path(file)) for file in (*filter(None, files.split(os.pathsep)), *_SHIPPED))


def read(path: Path) -> Table:
    """Reads the table in a file; raises ValueError if it is none."""
    try:
        plain = json.loads(path.read_text())
        return {
            gpu: {name: _parse(listed) for name, listed in problems.items()}
            for gpu, problems in plain.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{path} must be a table that `cutlass-moe tune` wrote, got {error!r}"
        ) from error


def _parse(listed: list[dict[str, Any]]) -> tuple[TunedConfig, ...]:
    entries = [
        TunedConfig(float(rows), gemm_config_from_json(plain["config"]), float(us))
        for plain in listed
        for rows, us in plain["us"].items()
    ]
    if not entries or min(entry.rows_per_expert for entry in entries) <= 0:
        got = [entry.rows_per_expert for entry in entries]
        raise ValueError(
            f"a problem must have one or more numbers of rows per expert, all positive, got {got}"
        )
    return tuple(sorted(entries, key=lambda entry: entry.rows_per_expert))


def merge(path: Path, table: Table) -> None:
    """Merges a table into a file, where it replaces entries of the same GPUs and problems.

    The file is replaced at once. Raises OSError, and ValueError if the file holds no table.
    """
    merged = read(path) if path.exists() else {}
    for gpu, problems in table.items():
        merged[gpu] = dict(sorted({**merged.get(gpu, {}), **problems}.items()))
    plain = {
        gpu: {name: _to_json(entries) for name, entries in problems.items()}
        for gpu, problems in sorted(merged.items())
    }
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(_dump(plain))
    fresh.replace(path)


def _to_json(entries: tuple[TunedConfig, ...]) -> list[dict[str, Any]]:
    by_config: dict[GemmConfig, dict[str, float]] = {}
    for entry in sorted(entries, key=lambda entry: entry.rows_per_expert):
        by_config.setdefault(entry.config, {})[f"{entry.rows_per_expert:g}"] = round(entry.us, 1)
    return [{"config": config.to_json(), "us": us} for config, us in by_config.items()]


def _dump(plain: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """The table as JSON, with one line per config."""
    gpus = []
    for gpu, problems in plain.items():
        lines = [
            f"  {json.dumps(name)}: [\n   " + ",\n   ".join(map(json.dumps, listed)) + "]"
            for name, listed in problems.items()
        ]
        gpus.append(f" {json.dumps(gpu)}: {{\n" + ",\n".join(lines) + "}")
    return "{\n" + ",\n".join(gpus) + "}\n"
