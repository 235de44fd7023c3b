"""The wheel: what is in it, and that it works where nothing else of this project is installed.

It is built as `python -m build` builds it, from a source distribution, but without a network and
with the setuptools that is installed here.
"""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import cutlass_moe
from emitters.spec.identity import source_hash

for needed in ("setuptools", "pip", "click", "rich"):
    pytest.importorskip(needed)

ROOT = Path(__file__).parents[1]
PACKAGES = ("cutlass_moe", "emitters")
DATA = {"cutlass_moe/py.typed", "cutlass_moe/choose/tables/nvidia-h200.json"}
PIP = ("-m", "pip", "--isolated", "--quiet", "--disable-pip-version-check")
OFFLINE = ("--no-index", "--no-deps")


def python(arguments: Sequence[str | Path], folder: Path, **variables: str) -> str:
    """What Python prints in a folder, with no more of its own variables than these."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "CUTLASS_MOE_"))}
    ended = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**kept, **variables},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: builds leave files behind, and take up what others left
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    python(["-c", build], source)
    (sdist,) = folder.glob("*.tar.gz")
    options = [*OFFLINE, "--no-build-isolation", "--wheel-dir", folder]
    python([*PIP, "wheel", *options, sdist], folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but what the wheel installs."""
    folder = tmp_path_factory.mktemp("installed")
    python([*PIP, "install", *OFFLINE, "--no-compile", "--target", folder, wheel], folder)
    return folder


def python_of(installed: Path, arguments: Sequence[str | Path]) -> str:
    """What Python prints that finds the wheel and torch's site-packages only.

    -S: `.pth` files are not read, which name the checkout where it is installed as editable, and
    make the DSL importable.
    """
    folders = (installed, Path(torch.__file__).parents[1])
    return python(["-S", *arguments], installed, PYTHONPATH=os.pathsep.join(map(str, folders)))


def test_wheel_holds_every_module_and_the_data(wheel: Path) -> None:
    """And nothing else: no tests, no READMEs."""
    assert wheel.name == f"cutlass_moe-{cutlass_moe.__version__}-py3-none-any.whl"
    modules = {
        path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*.py")
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == modules | DATA


def test_extras_that_messages_name_exist(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    texts = (path.read_text() for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
    named = {extra for text in texts for extra in re.findall(r"cutlass-moe\[([\w-]+)\]", text)}
    assert named and named <= set(metadata.get_all("Provides-Extra"))


def test_wheel_works_by_itself(installed: Path) -> None:
    program = """if True:
        import importlib.metadata, importlib.util, json
        import torch, cutlass_moe, emitters
        x, weight = torch.ones(4, 16).bfloat16(), torch.ones(2, 8, 16).bfloat16()
        y = cutlass_moe.grouped_matmul(x, weight, offsets=torch.tensor([1, 4]).int())
        found = {
            "files": [cutlass_moe.__file__, emitters.__file__],
            "version": importlib.metadata.version("cutlass-moe"),
            "dsl": importlib.util.find_spec("cutlass") is not None,
            "y": y.unique().tolist(),
        }
        print(json.dumps(found))"""
    found = json.loads(python_of(installed, ["-c", program]))
    assert [Path(file).parents[1] for file in found["files"]] == [installed, installed]
    assert found["version"] == cutlass_moe.__version__
    assert not found["dsl"]
    assert found["y"] == [16.0]
    # so images that a checkout built count as those of the wheel, and the other way round
    assert source_hash(installed / "emitters") == source_hash(ROOT / "emitters")


def test_command_of_the_wheel(installed: Path) -> None:
    command = installed / "bin" / "cutlass-moe"
    assert "Usage: cutlass-moe" in python_of(installed, [command, "--help"])
