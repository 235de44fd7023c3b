"""The import arrow: tests, perf -> cutlass_moe -> emitters, by its spec -> the DSL."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DSL = "cutlass"
SPEC = "emitters.spec"
FILES = {
    package: sorted((ROOT / package).rglob("*.py"))
    for package in ("emitters", "cutlass_moe", "perf", "tests")
}
each = {
    package: pytest.mark.parametrize(
        "path", FILES[package], ids=lambda path: str(path.relative_to(ROOT).with_suffix(""))
    )
    for package in FILES
}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all modules a file imports, at its top or within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def rooms(path: Path, package: str) -> set[str]:
    """Of a package those rooms, two-part module names, that a file imports from."""
    return {".".join(m.split(".")[:2]) for m in imports(path) if m.startswith(f"{package}.")}


@each["emitters"]
def test_spec_needs_the_standard_library_alone(path):
    if (ROOT / "emitters" / "spec") in path.parents:
        assert tops(path) <= {*sys.stdlib_module_names, "emitters"}
        assert rooms(path, "emitters") <= {SPEC}


@each["emitters"]
def test_emitters_know_no_host(path):
    assert not tops(path) & {"torch", "cutlass_moe", "cuda", "perf", "tests"}


@each["cutlass_moe"]
def test_cutlass_moe_knows_emitters_by_their_spec(path):
    assert not tops(path) & {DSL, "perf", "tests"}
    assert rooms(path, "emitters") <= {SPEC}


@each["perf"]
def test_perf_knows_no_tests_and_no_dsl(path):
    assert not tops(path) & {DSL, "tests"}


@each["tests"]
def test_tests_know_no_perf_but_their_own(path):
    assert path.parent.name == "perf" or "perf" not in tops(path)


def test_one_place_compiles():
    places = [
        path.relative_to(ROOT)
        for package, files in FILES.items()
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if package != "tests"
        and isinstance(node, ast.Attribute)
        and node.attr == "compile"
        and ast.unparse(node.value).endswith("cute")
    ]
    assert places == [Path("emitters/compile/emit.py")]


def test_cutlass_moe_runs_where_there_is_no_dsl():
    """Every module imports with the DSL blocked, and none of them loads it."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in FILES["cutlass_moe"]]
    modules = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    program = (
        f"import importlib, sys; sys.modules[{DSL!r}] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
