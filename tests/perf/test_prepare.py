"""Compiling beforehand, on the CPU: who is launched, how memory is shared, when it ends."""

from __future__ import annotations

import multiprocessing
import queue
import threading
import time
from dataclasses import replace

import pytest
import torch

from perf import prepare, systems
from perf.operands import weights_of
from perf.peers.prepared import Absent, Prepared
from perf.prepare import Memory
from tests.perf.samples import UP

CASES = [replace(UP, tokens=tokens) for tokens in (1, 2, 3)]


@pytest.fixture
def launched(monkeypatch) -> list[tuple[str, int]]:
    """What compiling systems launched: name and tokens; vllm_best fails, humming is absent."""
    found: list[tuple[str, int]] = []

    def system(name: str):
        def make(inputs, quick) -> Prepared:
            if name == "humming":
                raise Absent("not importable")
            if name == "vllm_best":
                quick(lambda: found.append((name, inputs.case.tokens)))
                raise RuntimeError("no registers")
            return Prepared(lambda: found.append((name, inputs.case.tokens)), lambda rows: rows)

        return make

    made = {name: system(name) for name in systems.PRODUCTS}
    monkeypatch.setattr(prepare, "systems_of", lambda case: made)
    monkeypatch.setattr(prepare, "weights_of", lambda case: weights_of(case, "cpu"))
    monkeypatch.setattr(prepare, "alive", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return found


def work(number: int, seconds: float) -> list[str | None]:
    messages: queue.Queue[str | None] = queue.Queue()
    memory = Memory(multiprocessing.get_context("spawn"), 1 << 40)
    prepare._work([CASES], number, time.time() + seconds, memory, messages)
    assert memory.free.value == 1 << 40
    return list(messages.queue)


def test_every_compiling_system_is_launched_at_another_number_of_tokens_first(launched) -> None:
    messages = work(1, 100)
    assert [tokens for name, tokens in launched if name == "vllm"] == [2, 3, 1]
    assert {name for name, _ in launched} == set(systems.COMPILING) - {"humming"}
    assert messages.count(None) == 3
    assert set(messages) - {None} == {
        "humming: not importable",
        "vllm_best: RuntimeError: no registers",
    }


def test_nothing_is_begun_after_the_budget(launched) -> None:
    assert work(0, -1.0) == [] == launched


def test_processes_wait_for_memory() -> None:
    memory = Memory(multiprocessing.get_context("spawn"), 10)
    entered = threading.Event()

    def other() -> None:
        with memory.reserved(6):
            entered.set()

    with memory.reserved(100):  # of all there is
        assert memory.free.value == 0
        thread = threading.Thread(target=other)
        thread.start()
        assert not entered.is_set()
    thread.join()
    assert entered.is_set()
    assert memory.free.value == 10
