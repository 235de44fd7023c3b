"""Measures whole layers and chains of them, as captured graphs, and our layer's steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from perf.layer.cases import MoeLayerCase
from perf.layer.operands import WORST_ERROR, LayerInputs, LayerWeights, chosen_by_torch, expected
from perf.layer.peers import LAYER_SYSTEMS, PreparedLayers, usual_layer_systems
from perf.layer.steps import layer_steps
from perf.machine import Ceilings
from perf.systems import NO_PDL, OURS, Admission, failed, relative_error
from perf.timing import Call, Timing, capture, captured, interleaved, launches_captured

SMALL_SECONDS = 0.1  # for the steps that are no products


def layer_weights(case: MoeLayerCase, device: str = "cuda") -> list[LayerWeights]:
    """Of each layer of the case."""
    return [LayerWeights.of(case, seed, device) for seed in range(case.layers)]


class LayerMeasurement:
    """One case on its way: its inputs, and the systems that passed the check."""

    def __init__(
        self, case: MoeLayerCase, weights: Sequence[LayerWeights], flush: torch.Tensor
    ) -> None:
        self.case, self.weights, self.flush = case, weights, flush
        self.inputs = LayerInputs.of(case, weights[0].w13.device.type)
        self.sample = self.inputs.sample()
        worst = WORST_ERROR[case.dtype] * math.sqrt(case.layers)
        self.systems: Admission[PreparedLayers] = Admission(worst)

    def run(self, systems: Sequence[str], ceilings: Ceilings, seconds: float) -> dict[str, Any]:
        """The case's record. Without `systems`, of its usual ones."""
        case = self.case
        right = expected(case, self.weights, self.inputs, self.sample)
        for name in systems or usual_layer_systems(case):
            if name in LAYER_SYSTEMS:
                self.systems.admit(name, partial(self.attempt, name, right))
        self.compare_pdl()
        admitted = self.systems.admitted
        small: dict[str, Any] = {}
        products: dict[str, Call] = {}
        if case.suite == "layer" and OURS in admitted:
            small, products = self.time_steps()
        replays = {name: system.launch for name, system in admitted.items()}
        timings = self.time({**replays, **products}, seconds)
        return {
            "case": asdict(case),
            "workload": {"active_experts": self.active_experts()},
            "systems": {
                name: self.systems.record(name, timings[name], system.note)
                for name, system in admitted.items()
            },
            "steps": {**small, **{name: {"us": timings[name].us} for name in products}},
            "absent": self.systems.absent,
        }

    def attempt(self, name: str, right: torch.Tensor) -> tuple[PreparedLayers, float]:
        """Prepares a system, captures and replays it over a poisoned output and compares."""
        prepared = LAYER_SYSTEMS[name](self.case, self.weights, self.inputs, self.flush)
        replay = capture([prepared.launch], 1)
        prepared.out.fill_(torch.nan)
        replay()
        error = relative_error(prepared.out[self.sample], right)
        return replace(prepared, launch=replay), error

    def compare_pdl(self) -> None:
        """Dependent launch must not change a bit; where it does, its time counts for nothing."""
        admitted = self.systems.admitted
        if {OURS, NO_PDL} <= set(admitted) and not torch.equal(
            admitted[OURS].out, admitted[NO_PDL].out
        ):
            self.systems.refuse(OURS, f"WRONG: the output is not bitwise that of {NO_PDL}")

    def time(self, replays: Mapping[str, Call], seconds: float) -> dict[str, Timing]:
        """A layer's time: with L2 flushed before it, or its share of a chain, whose weights L2
        can't hold."""
        if self.case.layers > 1:
            return captured(replays, self.case.layers, seconds)
        return interleaved(replays, seconds, self.flush)

    def time_steps(self) -> tuple[dict[str, Any], dict[str, Call]]:
        """us and bytes of our small steps, a launch inside a graph; and the products' replays."""
        try:
            steps, products = layer_steps(self.case, self.weights[0], self.inputs)
            replays = {name: capture([call], 1) for name, call in products.items()}
            small = {}
            for name, step in steps.items():
                launches = launches_captured(len(step.launches))
                replay = capture(step.launches, launches)
                (timing,) = captured({name: replay}, launches, SMALL_SECONDS / len(steps)).values()
                small[name] = {"us": timing.us, "bytes": step.moved}
        except Exception as failure:
            self.systems.absent["steps"] = failed(failure)
            torch.cuda.synchronize()
            return {}, {}
        return small, replays

    def active_experts(self) -> int:
        """Experts that have a row, summed over the layers."""
        choices = self.inputs.choices(lambda logits: chosen_by_torch(logits, self.case.shape.top_k))
        return sum(len(ids.unique()) for _, ids in choices)
