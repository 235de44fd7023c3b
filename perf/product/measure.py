"""Measures a product: prepares every system, checks it, times all of them in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from cutlass_moe.tune.timing import FLUSH_BYTES
from perf.machine import Ceilings
from perf.product.cases import ProductCase, floor_us, moved_bytes
from perf.product.operands import WORST_ERROR, ProductTensors, ProductWeights
from perf.product.peers import SYSTEMS, PreparedProduct, usual_systems
from perf.product.routing import workload
from perf.systems import Admission, failed, relative_error
from perf.timing import Timing, capture, captured, interleaved, launches_captured

GRAPH_BELOW_US = 60.0  # floors below it: launching is a good part of the time
MAX_COPIES = 128
MAX_COPY_BYTES = 16 << 30


class ProductMeasurement:
    """One case on its way: its tensors, and the systems that passed the check."""

    def __init__(self, case: ProductCase, weights: ProductWeights, flush: torch.Tensor) -> None:
        self.case, self.flush = case, flush
        self.tensors = ProductTensors.of(case, weights)
        self.workload = workload(case, self.tensors.topk_ids)
        self.systems: Admission[PreparedProduct] = Admission(WORST_ERROR)

    def run(self, systems: Sequence[str], ceilings: Ceilings, seconds: float) -> dict[str, Any]:
        """The case's record. Without `systems`, of its usual ones."""
        expected = self.tensors.expected()
        for name in systems or usual_systems(self.case):
            if name in SYSTEMS:
                self.systems.admit(name, partial(self.attempt, name, expected))
        weight, admitted = self.tensors.weight, self.systems.admitted
        calls = {name: partial(system.launch, weight) for name, system in admitted.items()}
        timings = interleaved(calls, seconds, self.flush)
        graphs = {}
        if floor_us(self.case, self.workload, ceilings) < GRAPH_BELOW_US:
            graphs = self.time_graphs(seconds)
        return {
            "case": asdict(self.case),
            "workload": asdict(self.workload),
            "systems": {
                name: {
                    **self.systems.record(name, timings[name], system.note),
                    "graph_us": graphs[name].us if name in graphs else None,
                }
                for name, system in admitted.items()
            },
            "absent": self.systems.absent,
        }

    def attempt(self, name: str, expected: torch.Tensor) -> tuple[PreparedProduct, float]:
        """Prepares a system, runs it once and compares."""
        prepared = SYSTEMS[name](self.case, self.tensors, self.flush)
        prepared.launch(self.tensors.weight)
        return prepared, relative_error(prepared.rows(self.tensors.sample), expected)

    def time_graphs(self, seconds: float) -> dict[str, Timing]:
        """Time of a launch inside a graph, over copies of the weights that together exceed L2."""
        copies = self.copies()
        replays = {}
        for name, system in self.systems.admitted.items():
            try:
                launches = [partial(system.launch, weight) for weight in copies]
                replays[name] = capture(launches, launches_captured(len(copies)))
            except Exception as failure:  # it can't be captured, or asks the host
                self.systems.absent[f"{name}, captured"] = failed(failure)
                torch.cuda.synchronize()
        return captured(replays, launches_captured(len(copies)), seconds / 2)

    def copies(self) -> list[torch.Tensor]:
        weight = self.tensors.weight
        touched = moved_bytes(self.case, self.workload)
        wanted = -(-FLUSH_BYTES // touched)
        number = max(2, min(wanted, MAX_COPIES, MAX_COPY_BYTES // weight.nbytes))
        return [weight, *(weight.clone() for _ in range(number - 1))]
