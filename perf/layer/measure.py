"""Measures whole layers and chains of them, as captured graphs, and our layer's parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from perf.layer.cases import LayerCase
from perf.layer.operands import WORST_ERROR, LayerInputs, LayerWeights, chosen_by_torch, expected
from perf.layer.peers import LAYER_SYSTEMS, NO_PDL, PreparedLayers, parts, usual_layer_systems
from perf.product.cases import Ceilings
from perf.product.operands import relative_error
from perf.product.peers import OURS, Absent
from perf.timing import Timing, capture, captured, interleaved, launches_captured

SMALL_SECONDS = 0.1  # for the steps that are no products


def layer_weights(case: LayerCase, device: str = "cuda") -> list[LayerWeights]:
    """Of each layer of the case."""
    return [LayerWeights.of(case, seed, device) for seed in range(case.layers)]


class LayerMeasurement:
    """One case on its way: inputs, the systems that passed the check, and why others did not."""

    def __init__(
        self, case: LayerCase, weights: Sequence[LayerWeights], flush: torch.Tensor
    ) -> None:
        self.case, self.weights, self.flush = case, weights, flush
        self.inputs = LayerInputs.of(case, weights[0].w13.device.type)
        self.sample = self.inputs.sample()
        self.prepared: dict[str, PreparedLayers] = {}
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self.errors: dict[str, float] = {}
        self.absent: dict[str, str] = {}

    def run(self, systems: Sequence[str], ceilings: Ceilings, seconds: float) -> dict[str, Any]:
        case = self.case
        right = expected(case, self.weights, self.inputs, self.sample)
        for name in systems or usual_layer_systems(case):
            if name in LAYER_SYSTEMS:
                self.admit(name, right)
        self.compare_pdl()
        small: dict[str, Any] = {}
        products: dict[str, torch.cuda.CUDAGraph] = {}
        if case.suite == "layer" and OURS in self.prepared:
            small, products = self.time_parts()
        timings = self.time({**self.graphs, **products}, seconds)
        return {
            "case": asdict(case),
            "workload": {"active_experts": self.active_experts()},
            "systems": {
                name: {
                    **asdict(timings[name]),
                    "error": self.errors[name],
                    "note": self.prepared[name].note,
                }
                for name in self.graphs
            },
            "parts": {**small, **{name: {"us": timings[name].us} for name in products}},
            "absent": self.absent,
        }

    def admit(self, name: str, right: torch.Tensor) -> None:
        """Prepares a system, captures and replays it over a poisoned output and compares."""
        worst = WORST_ERROR[self.case.dtype] * math.sqrt(self.case.layers)
        try:
            prepared = LAYER_SYSTEMS[name](self.case, self.weights, self.inputs, self.flush)
            graph = capture([prepared.launch], 1)
            prepared.out.fill_(torch.nan)
            graph.replay()
            error = relative_error(prepared.out[self.sample], right)
        except Absent as reason:
            self.absent[name] = str(reason)
            return
        except Exception as failure:  # a peer's failure must not end the run
            self.absent[name] = f"FAILED: {type(failure).__name__}: {str(failure)[:300]}"
            return
        if not error <= worst:
            self.absent[name] = f"WRONG: relative error {error:.2g}, at most {worst:.2g} is right"
            return
        self.prepared[name], self.graphs[name] = prepared, graph
        self.errors[name] = round(error, 6)

    def compare_pdl(self) -> None:
        """Dependent launch must not change a bit; where it does, its time counts for nothing."""
        if {OURS, NO_PDL} <= set(self.prepared) and not torch.equal(
            self.prepared[OURS].out, self.prepared[NO_PDL].out
        ):
            self.absent[OURS] = f"WRONG: the output is not bitwise that of {NO_PDL}"
            del self.prepared[OURS], self.graphs[OURS]

    def time(self, graphs: dict[str, torch.cuda.CUDAGraph], seconds: float) -> dict[str, Timing]:
        """A layer's time: with L2 flushed before it, or its share of a chain, whose weights L2
        can't hold."""
        if self.case.layers > 1:
            return captured(graphs, self.case.layers, seconds)
        return interleaved({name: g.replay for name, g in graphs.items()}, seconds, self.flush)

    def time_parts(self) -> tuple[dict[str, Any], dict[str, torch.cuda.CUDAGraph]]:
        """us and bytes of our small steps, a launch inside a graph; and the products' graphs."""
        try:
            steps, products = parts(self.case, self.weights[0], self.inputs)
            graphs = {name: capture([call], 1) for name, call in products.items()}
            small = {}
            for name, part in steps.items():
                launches = launches_captured(len(part.launches))
                graph = capture(part.launches, launches)
                (timing,) = captured({name: graph}, launches, SMALL_SECONDS / len(steps)).values()
                small[name] = {"us": timing.us, "bytes": part.moved}
        except Exception as failure:
            self.absent["parts"] = f"FAILED: {type(failure).__name__}: {str(failure)[:300]}"
            torch.cuda.synchronize()
            return {}, {}
        return small, graphs

    def active_experts(self) -> int:
        """Experts that have a row, summed over the layers."""
        choices = self.inputs.choices(lambda logits: chosen_by_torch(logits, self.case.shape.top_k))
        return sum(len(ids.unique()) for _, ids in choices)
