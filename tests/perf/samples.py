"""What several tests of the benchmarks need: ceilings, small cases, records of a run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from perf.cases import Case
from perf.machine import Ceilings
from perf.routing import draw_topk_ids, load_of
from perf.store import empty

H200 = Ceilings(4424, 4255, 1365, 906, 689, 2.0)
GPU = "Some GPU"
RUN = "2026-01-02T03:04:05+00:00"
ABOUT = {
    "commit": "0123456789ab",
    "command": "python -m perf run",
    "versions": {"driver": "1", "cuda": "13.0", "torch": "2", "vllm": "0.1", "images": ["x"]},
    "ceilings": asdict(H200),
}
UP = Case("models", "m", "up", "fp8", 37, num_experts=5, top_k=2, hidden=128, inter=64)


def record_of(case: Case, us: dict[str, float], run: str = RUN) -> dict[str, Any]:
    """A case's record in which systems took so many microseconds."""
    return {
        "run": run,
        "case": asdict(case),
        "load": asdict(load_of(case, draw_topk_ids(case))),
        "systems": {
            name: {
                "us": t, "p20": t, "p80": t, "rounds": [t, 1.01 * t], "samples": 5,
                "error": 1e-3, "note": "",
            }
            for name, t in us.items()
        },
        "absent": {} if "humming" in us else {"humming": "not importable: humming"},
    }  # fmt: skip


def contents_of(measured: list[tuple[Case, dict[str, float]]], gpu: str = GPU) -> dict[str, Any]:
    """A results file of one run."""
    contents = empty(gpu)
    contents["runs"][RUN] = {"date": RUN, **ABOUT}
    contents["cases"] = {case.id: record_of(case, us) for case, us in measured}
    return contents
