"""Measures a case: prepares every system, checks it, times all of them in turns."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from cutlass_moe.tune.timing import flush_buffer
from perf.cases import Case
from perf.operands import WORST_ERROR, LayerInputs, ProductInputs, Weights, inputs_of, weights_of
from perf.peers.prepared import Absent, Call, Prepared
from perf.routing import load_of
from perf.systems import systems_of
from perf.timing import capture, interleaved, quick_us

SECONDS = 0.3  # of timing a case, all its systems together
MESSAGE = 300  # characters of a failure's message that are kept
TIMING = "timing"  # in place of a system: it was not seen which broke, and the case is left out


class Broken(Exception):
    """A system left the GPU in a state in which nothing runs: the process must be a new one."""

    def __init__(self, case: Case, system: str, reason: str) -> None:
        super().__init__(f"{case.id}: {system}: {reason}")
        self.case, self.system, self.reason = case, system, reason


class Measurement:
    """One case on its way: its inputs, the systems that passed the check, why others did not."""

    def __init__(self, case: Case, weights: dict[str, Weights], flush: torch.Tensor) -> None:
        self.case, self.flush = case, flush
        self.inputs: ProductInputs | LayerInputs = inputs_of(case, weights)
        self.expected = self.inputs.expected()
        self.calls: dict[str, Call] = {}
        self.prepared: list[Prepared] = []
        self.checked: dict[str, dict[str, Any]] = {}
        self.absent: dict[str, str] = {}

    def record(self, systems: Collection[str], broken: Mapping[str, str]) -> dict[str, Any]:
        """What a results file holds of the case. Without `systems`, of all; `broken`: those that
        are not to be run again, with the reason."""
        for name, make in systems_of(self.case).items():
            if name in broken:
                self.absent[name] = broken[name]
            elif not systems or name in systems:
                self.admit(name, partial(make, self.inputs, self.quick))
        try:
            timings = interleaved(self.calls, SECONDS, self.flush)
        except RuntimeError as failure:
            raise Broken(self.case, TIMING, f"FAILED: {failure}"[:MESSAGE]) from failure
        return {
            "case": asdict(self.case),
            "load": asdict(load_of(self.case, self.inputs.ids.cpu())),
            "systems": {name: {**asdict(timings[name]), **self.checked[name]} for name in timings},
            "absent": self.absent,
        }

    def admit(self, name: str, make: Any) -> None:
        """Keeps the system's launch, and of a layer a graph of it, unless it fails or is wrong."""
        try:
            prepared: Prepared = make()
            call = self.run(prepared)
            error = self.error(prepared)
        except Absent as reason:
            self.absent[name] = str(reason)
        except Exception as failure:  # a peer's failure must not end the run
            self.absent[name] = f"FAILED: {type(failure).__name__}: {str(failure)[:MESSAGE]}"
            if not alive():
                raise Broken(self.case, name, self.absent[name]) from failure
            torch.cuda.empty_cache()
        else:
            worst = WORST_ERROR["layer" if self.case.is_layer else "product"][self.case.dtype]
            if error <= worst:  # not so where it is NaN
                self.calls[name] = call
                self.prepared.append(prepared)  # owns what a graph reads and writes
                self.checked[name] = {"error": round(error, 6), "note": prepared.note}
            else:
                self.absent[name] = (
                    f"WRONG: relative error {error:.2g}, at most {worst:.2g} is right"
                )

    def run(self, prepared: Prepared) -> Call:
        """Runs the system over NaN; returns what is to be timed."""
        prepared.launch()
        torch.cuda.synchronize()
        if not self.case.is_layer:
            return prepared.launch
        replay = capture(prepared.launch)
        prepared.clear()
        replay()
        torch.cuda.synchronize()
        return replay

    def error(self, prepared: Prepared) -> float:
        """Frobenius norm of the difference to what is expected, over that of the latter."""
        got = prepared.rows(self.inputs.picked)
        if not got.isfinite().all():
            return float("nan")
        columns = self.inputs.columns if isinstance(self.inputs, ProductInputs) else slice(None)
        difference = got[:, columns].double() - self.expected
        return float(difference.norm() / self.expected.norm())

    def quick(self, call: Call) -> float:
        """Microseconds of a variant, of a layer in a graph."""
        if not self.case.is_layer:
            return quick_us(call, self.flush)
        call()
        return quick_us(capture(call), self.flush)


def alive() -> bool:
    """Whether this process can still use the GPU: an illegal address ends that."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda")
    except RuntimeError:
        return False
    return True


def measure_all(
    cases: Sequence[Case],
    systems: Collection[str],
    broken: Mapping[str, Mapping[str, str]],
    budget: float,
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Each case with its record, as it is finished; begins no case after `budget` seconds.

    broken: by a case's id, the systems that broke an earlier process. Raises Broken.
    """
    start = time.monotonic()
    flush = flush_buffer()
    unit: tuple[str, ...] = ()
    weights: dict[str, Weights] = {}
    for case in cases:
        if time.monotonic() - start >= budget:
            return
        if TIMING in broken.get(case.id, {}):
            continue
        if case.unit != unit:
            weights.clear()  # freed before the next ones are made
            unit, weights = case.unit, weights_of(case)
        measurement = Measurement(case, weights, flush)
        yield case, measurement.record(systems, broken.get(case.id, {}))
        del measurement
        torch.cuda.empty_cache()
