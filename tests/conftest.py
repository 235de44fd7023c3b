"""What is skipped where something is not there: a CUDA device, or a package that tests alone use.

A machine with a GPU needs torch, pytest and NumPy to run `pytest -m gpu tests`; modules that import
the DSL, hypothesis or the command line's packages are skipped there, with the package's name.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterable
from pathlib import Path

import pytest
import torch

from cutlass_moe.images.cache import Cache

OPTIONAL = {"cutlass", "hypothesis", "click", "rich"}  # also what only their modules import

# A compile makes hundreds of thousands of objects, and each search for cycles among them goes
# through those of torch and the DSL too: 5 % of the suite's time with Python's thresholds.
gc.set_threshold(50_000, 20, 100)
# Where every core has a process of xdist, there is none for more threads, and waiting ones spin.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of this run alone, for all of its processes."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session")
def shared_cache(run_folder: Path) -> Cache:
    """Of a run's processes, one compiles an image."""
    return Cache([run_folder / "images"])


class OfGpu(pytest.Module):
    """A module of GPU tests where there is no GPU: one skip, and it is not even imported."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        pytest.skip("needs a CUDA device", allow_module_level=True)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m gpu` imports the modules of GPU tests alone."""
    others = collection_path.suffix == ".py" and not collection_path.stem.endswith("_gpu")
    return True if others and _of_gpu_alone(config) else None


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    """Without a GPU its tests are collected only where `-m gpu` asks for them."""
    asked = torch.cuda.is_available() or _of_gpu_alone(parent.config)
    if asked or not module_path.stem.endswith("_gpu"):
        return None
    return OfGpu.from_parent(parent, path=module_path)


def _of_gpu_alone(config: pytest.Config) -> bool:
    return config.option.markexpr.partition(" ")[0] == "gpu"


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
