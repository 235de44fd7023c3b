"""What is skipped where something is not there: a CUDA device, or a package that tests alone use.

A machine with a GPU needs torch, pytest and NumPy to run `pytest -m gpu tests`; modules that import
the DSL, hypothesis or the command line's packages are skipped there, with the package's name.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

from cutlass_moe.images.cache import Cache

OPTIONAL = {"cutlass", "hypothesis", "click", "rich"}  # also what only their modules import


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of this run alone, for all of its processes."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session")
def shared_cache(run_folder: Path) -> Cache:
    """Of a run's processes, one compiles an image."""
    return Cache([run_folder / "images"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module that lacks an optional package is skipped; any other import error is one."""
    report = yield
    call = getattr(report, "call", None)
    cause = call.excinfo.value.__cause__ if call and call.excinfo else None
    package = (getattr(cause, "name", None) or "").partition(".")[0]
    if isinstance(cause, ModuleNotFoundError) and package in OPTIONAL:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: needs {package}")
    return report
