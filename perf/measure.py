"""Measures cases of both kinds, one after another, within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from cutlass_moe.tune.timing import flush_buffer
from perf.cases import BenchCase
from perf.layer.cases import MoeLayerCase
from perf.layer.measure import LayerMeasurement, layer_weights
from perf.layer.peers import LAYER_SYSTEMS
from perf.machine import Ceilings
from perf.product.cases import ProductCase
from perf.product.measure import ProductMeasurement
from perf.product.operands import ProductWeights
from perf.product.peers import SYSTEMS

KNOWN_SYSTEMS = tuple(dict.fromkeys((*SYSTEMS, *LAYER_SYSTEMS)))
SHARE = 0.4  # of a case's time that its final timing gets; the rest is set-up, checks and searches
SECONDS = (0.15, 2.0)  # the least and the most that timing takes

# By a case's class: what makes its weights, and what measures it given (case, weights, flush).
KINDS: dict[type, tuple[Callable[[Any], Any], Callable[..., Any]]] = {
    ProductCase: (ProductWeights.of, ProductMeasurement),
    MoeLayerCase: (layer_weights, LayerMeasurement),
}


def measure_all(
    cases: Sequence[BenchCase], systems: Sequence[str], ceilings: Ceilings, budget: float
) -> Iterator[tuple[BenchCase, dict[str, Any]]]:
    """Each case with its record, as it is finished; begins no case after `budget` seconds.

    Without `systems`, each case's usual ones.
    """
    start = time.monotonic()
    flush = flush_buffer()
    weights_id: tuple[str, ...] = ()
    weights: Any = None
    for number, case in enumerate(cases):
        left = budget - (time.monotonic() - start)
        if left <= 0:
            return
        make_weights, measurement_of = KINDS[type(case)]
        if case.weights_id != weights_id:
            weights = None  # freed before the next ones are made
            weights_id = case.weights_id
            weights = make_weights(case)
        seconds = min(max(SHARE * left / (len(cases) - number), SECONDS[0]), SECONDS[1])
        measurement = measurement_of(case, weights, flush)
        yield case, measurement.run(systems, ceilings, seconds)
        del measurement
        torch.cuda.empty_cache()
