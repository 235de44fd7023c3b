"""Compiles what the peers compile at their first launch, in processes side by side.

Nothing is timed and nothing is checked: what was compiled stays in the peers' own caches on disk.
"""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from typing import Any

import torch

from perf.cases import Case
from perf.measure import MESSAGE, alive
from perf.operands import inputs_of, weights_of
from perf.peers.prepared import Absent, Call
from perf.systems import COMPILING, systems_of

COPIES = 2.5  # weights, Humming's form of them, and the rest of a case
CONTEXT_BYTES = 1 << 30  # what a process takes for itself
SHARE = 0.9  # of the GPU's memory
GRACE = 30.0  # seconds that a case may take after the budget's end


class Memory:
    """How much of the GPU's memory is left to processes that wait for their share of it."""

    def __init__(self, context: Any, size: int) -> None:
        self.changed, self.free, self.size = context.Condition(), context.Value("q", size), size

    @contextmanager
    def reserved(self, size: int) -> Iterator[None]:
        asked = min(size, self.size)
        with self.changed:
            self.changed.wait_for(lambda: self.free.value >= asked)
            self.free.value -= asked
        try:
            yield
        finally:
            with self.changed:
                self.free.value += asked
                self.changed.notify_all()


def prepare(cases: Sequence[Case], processes: int, budget: float) -> tuple[int, list[str]]:
    """Launches each compiling peer of each case; returns how many cases, and failures with counts.

    Begins no case after `budget` seconds, and ends processes that are not done GRACE later.
    """
    context = multiprocessing.get_context("spawn")
    deadline = time.time() + budget
    size = int(SHARE * torch.cuda.mem_get_info()[1]) - processes * CONTEXT_BYTES
    memory, messages = Memory(context, size), context.Queue()
    units = [list(unit) for _, unit in groupby(cases, key=lambda case: case.unit)]
    workers = [
        context.Process(
            target=_work, args=(units[i::processes], i, deadline, memory, messages), daemon=True
        )
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    done, failures = 0, Counter[str]()

    def count(message: str | None) -> int:
        failures.update(() if message is None else (message,))
        return message is None

    while any(worker.is_alive() for worker in workers) and time.time() < deadline + GRACE:
        with suppress(queue.Empty):
            done += count(messages.get(timeout=0.5))
    for worker in workers:
        failures[f"a process ended with status {worker.exitcode}"] += bool(worker.exitcode)
        worker.kill()
    with suppress(queue.Empty):
        while True:
            done += count(messages.get(timeout=0.5))
    return done, [f"{text} ({number} times)" for text, number in failures.most_common() if number]


def _work(
    units: Sequence[Sequence[Case]], number: int, deadline: float, memory: Memory, messages: Any
) -> None:
    """One process. Each begins at another number of tokens: they are to compile different kernels,
    of which most depend on the tokens alone."""
    for unit in units:
        first = number % len(unit)
        needed = int(COPIES * unit[0].weight_bytes) + (2 << 30)
        with memory.reserved(needed):
            try:
                weights = weights_of(unit[0])
            except RuntimeError as failure:  # too little memory, above all
                messages.put(f"weights: {failure}"[:MESSAGE])
                continue
            for case in (*unit[first:], *unit[:first]):
                if time.time() >= deadline:
                    return
                for failure in launch_all(case, weights):
                    messages.put(failure)
                messages.put(None)
                if not alive():
                    return
            weights.clear()
            torch.cuda.empty_cache()


def launch_all(case: Case, weights: Any) -> Iterator[str]:
    """Launches every variant of every compiling system; yields why some could not be."""
    try:
        inputs = inputs_of(case, weights)
    except RuntimeError as failure:
        yield f"inputs: {failure}"[:MESSAGE]
        return

    def once(call: Call) -> float:
        call()
        return 0.0

    for name, make in systems_of(case).items():
        if name in COMPILING:
            try:
                make(inputs, once).launch()
                torch.cuda.synchronize()
            except Absent as reason:
                yield f"{name}: {reason}"
            except Exception as failure:  # the run says so as well, and of which case
                yield f"{name}: {type(failure).__name__}: {failure}"[:MESSAGE]
