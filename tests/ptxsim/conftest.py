"""Of a run's processes, one compiles a kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ptxsim.kernels import compiled


@pytest.fixture(scope="session", autouse=True)
def shared_ptx(run_folder: Path) -> None:
    compiled.folder = run_folder / "ptx"
    compiled.folder.mkdir(exist_ok=True)
