"""The systems of a case: the names that tables speak of, and the check before one is timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict
from types import ModuleType
from typing import Any, Generic, TypeVar

import torch

from perf.timing import Timing

OURS = "cutlass_moe"
TRITON = "triton"
NO_PDL = "no_pdl"  # ours without dependent launch
STREAM = "stream"  # no peer but the yardstick

SAMPLE_ROWS = 512  # rows of an output that are checked
MESSAGE = 300  # characters of a failure's message that are kept

T = TypeVar("T")


class Absent(Exception):
    """A system can't be measured here, for the reason given."""


def require(module: str) -> ModuleType:
    """The module. Raises Absent where it, or anything it needs, can't be imported."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, AssertionError) as error:  # DeepGEMM asserts that nvcc is there
        raise Absent(f"not importable: {error}") from error


def failed(failure: Exception) -> str:
    """The reason under which a failure is recorded."""
    return f"FAILED: {type(failure).__name__}: {str(failure)[:MESSAGE]}"


def sample_rows(number: int, generator: torch.Generator) -> torch.Tensor:
    """The sorted numbers of at most SAMPLE_ROWS of so many rows."""
    chosen = torch.randperm(number, device=generator.device, generator=generator)
    return chosen[:SAMPLE_ROWS].sort().values


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`; NaN where `got` holds one."""
    difference = got.double() - expected.double()
    return float(difference.norm() / expected.double().norm())


class Admission(Generic[T]):
    """The systems of a case that may be timed, with their errors, and why others may not.

    worst: the relative error up to which an output counts as right.
    """

    def __init__(self, worst: float) -> None:
        self.worst = worst
        self.admitted: dict[str, T] = {}
        self.errors: dict[str, float] = {}
        self.absent: dict[str, str] = {}

    def admit(self, name: str, attempt: Callable[[], tuple[T, float]]) -> None:
        """Admits what `attempt` returns, a system and its error, unless it is wrong or fails."""
        try:
            system, error = attempt()
        except Absent as reason:
            self.absent[name] = str(reason)
        except Exception as failure:  # a peer's failure must not end the run
            self.absent[name] = failed(failure)
        else:
            if error <= self.worst:  # not so where it is NaN
                self.admitted[name], self.errors[name] = system, round(error, 6)
            else:
                most = f"at most {self.worst:.2g} is right"
                self.absent[name] = f"WRONG: relative error {error:.2g}, {most}"

    def refuse(self, name: str, reason: str) -> None:
        """Takes an admitted system back."""
        del self.admitted[name], self.errors[name]
        self.absent[name] = reason

    def record(self, name: str, timing: Timing, note: str) -> dict[str, Any]:
        """What a results file holds of an admitted system."""
        return {**asdict(timing), "error": self.errors[name], "note": note}
