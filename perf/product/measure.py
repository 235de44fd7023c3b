"""Measures cases: prepares every system, checks it, times all of them in turns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from cutlass_moe.tune.timing import FLUSH_BYTES, flush_buffer
from perf.layer.cases import LayerCase
from perf.layer.measure import LayerMeasurement, layer_weights
from perf.product.cases import Case, Ceilings, floor_us, moved_bytes, workload
from perf.product.operands import WORST_ERROR, Operands, Weights, relative_error
from perf.product.peers import SYSTEMS, Absent, Prepared, usual_systems
from perf.timing import Timing, capture, captured, interleaved, launches_captured

GRAPH_BELOW_US = 60.0  # floors below it: launching is a good part of the time
MAX_COPIES = 128
MAX_COPY_BYTES = 16 << 30
SHARE = 0.4  # of a case's time that its final timing gets; the rest is set-up, checks and searches
SECONDS = (0.15, 2.0)  # the least and the most that timing takes


def measure_all(
    cases: Sequence[Case | LayerCase],
    systems: Sequence[str],
    ceilings: Ceilings,
    budget: float,
) -> Iterator[tuple[Case | LayerCase, dict[str, Any]]]:
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
        whole = isinstance(case, LayerCase)
        if case.weights_id != weights_id:
            weights = None  # freed before the next ones are made
            weights_id = case.weights_id
            weights = layer_weights(case) if whole else Weights.of(case)
        seconds = min(max(SHARE * left / (len(cases) - number), SECONDS[0]), SECONDS[1])
        if whole:
            measurement: Any = LayerMeasurement(case, weights, flush)
        else:
            measurement = Measurement(case, Operands.of(case, weights), flush)
        yield case, measurement.run(systems, ceilings, seconds)
        del measurement
        torch.cuda.empty_cache()


class Measurement:
    """One case on its way: operands, the systems that passed the check, and why others did not."""

    def __init__(self, case: Case, operands: Operands, flush: torch.Tensor) -> None:
        self.case = case
        self.operands = operands
        self.flush = flush
        self.workload = workload(case, operands.topk_ids)
        self.prepared: dict[str, Prepared] = {}
        self.errors: dict[str, float] = {}
        self.absent: dict[str, str] = {}

    def run(self, systems: Sequence[str], ceilings: Ceilings, seconds: float) -> dict[str, Any]:
        expected = self.operands.expected()
        for name in systems or usual_systems(self.case):
            if name in SYSTEMS:
                self.admit(name, expected)
        weight = self.operands.weight
        calls = {name: partial(p.launch, weight) for name, p in self.prepared.items()}
        timings = interleaved(calls, seconds, self.flush)
        graphs = {}
        if floor_us(self.case, self.workload, ceilings) < GRAPH_BELOW_US:
            graphs = self.time_graphs(seconds)
        return {
            "case": asdict(self.case),
            "workload": asdict(self.workload),
            "systems": {
                name: {
                    **asdict(timing),
                    "graph_us": graphs[name].us if name in graphs else None,
                    "error": self.errors[name],
                    "note": self.prepared[name].note,
                }
                for name, timing in timings.items()
            },
            "absent": self.absent,
        }

    def admit(self, name: str, expected: torch.Tensor) -> None:
        """Prepares a system, runs it once and compares: what is wrong or fails is not timed."""
        try:
            prepared = SYSTEMS[name](self.case, self.operands, self.flush)
            prepared.launch(self.operands.weight)
            error = relative_error(prepared.rows(self.operands.sample), expected)
        except Absent as reason:
            self.absent[name] = str(reason)
            return
        except Exception as failure:  # a peer's failure must not end the run
            self.absent[name] = f"FAILED: {type(failure).__name__}: {str(failure)[:300]}"
            return
        if not error <= WORST_ERROR:
            self.absent[name] = (
                f"WRONG: relative error {error:.2g}, at most {WORST_ERROR:.2g} is right"
            )
            return
        self.prepared[name] = prepared
        self.errors[name] = round(error, 6)

    def time_graphs(self, seconds: float) -> dict[str, Timing]:
        """Time of a launch inside a graph, over copies of the weights that together exceed L2."""
        copies = self.copies()
        graphs = {}
        for name, prepared in self.prepared.items():
            try:
                launches = [partial(prepared.launch, weight) for weight in copies]
                graphs[name] = capture(launches, launches_captured(len(copies)))
            except Exception as failure:  # it can't be captured, or asks the host
                self.absent[f"{name}, captured"] = f"FAILED: {str(failure)[:300]}"
                torch.cuda.synchronize()
        return captured(graphs, launches_captured(len(copies)), seconds / 2)

    def copies(self) -> list[torch.Tensor]:
        weight = self.operands.weight
        touched = moved_bytes(self.case, self.workload)
        wanted = -(-FLUSH_BYTES // touched)
        number = max(2, min(wanted, MAX_COPIES, MAX_COPY_BYTES // weight.nbytes))
        return [weight, *(weight.clone() for _ in range(number - 1))]
