"""What every system answers with, and the layouts that several of them take."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

from perf.operands import LayerInputs, ProductInputs
from perf.peers.unpacked import make_importable

Call = Callable[[], object]
Quick = Callable[[Call], float]  # microseconds, to choose among variants


class Prepared(NamedTuple):
    """launch() computes the output once; rows(numbers) reads rows of it afterwards: of a product
    sorted by expert, of a layer tokens. note: what the system chose. clear() writes NaN over the
    output: a layer's is computed twice, the second time by a graph."""

    launch: Call
    rows: Callable[[torch.Tensor], torch.Tensor]
    note: str = ""
    clear: Call = lambda: None


class Absent(Exception):
    """A system can't be measured here, for the reason given."""


def require(module: str) -> ModuleType:
    """The module. Raises Absent where it, or anything it needs, can't be imported."""
    make_importable()
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, AssertionError) as error:  # DeepGEMM asserts that nvcc is there
        raise Absent(f"not importable: {error}") from error


def only(inputs: ProductInputs | LayerInputs, *dtypes: str) -> None:
    """Raises Absent for a case of another dtype."""
    if inputs.case.dtype not in dtypes:
        raise Absent(f"{' and '.join(dtypes)} only")


def fastest(variants: dict[str, Call], quick: Quick) -> tuple[Call, str]:
    """The variant that took least time, and its name. Those that ask for more shared memory or
    registers than there are, are passed over."""
    out_of_resources = require("triton.runtime.errors").OutOfResources
    times = {}
    for name, call in variants.items():
        try:
            times[name] = quick(call)
        except out_of_resources:
            continue
    if not times:
        raise Absent("no variant runs: all need more shared memory or registers than there are")
    best = min(times, key=lambda name: times[name])
    return variants[best], best
