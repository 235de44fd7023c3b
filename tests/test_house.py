"""The house's rules: which room imports which, how large files and functions are, what is shipped.

The arrow: tests, perf -> cutlass_moe -> emitters, by its spec -> the DSL.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import cutlass_moe
from emitters.spec.identity import source_hash

ROOT = Path(__file__).parents[1]
DSL = "cutlass"
PACKAGES = ("emitters", "cutlass_moe", "perf", "tests")
FILES = {package: sorted((ROOT / package).rglob("*.py")) for package in PACKAGES}
PRODUCT = [path for package in PACKAGES[:3] for path in FILES[package]]
# Of each package its rooms by floors: a room imports from the floors below its own alone.
FLOORS = {
    "emitters": ["spec", "device", "templates", "compile", "__main__"],
    "cutlass_moe": [
        "environment",
        "operands images choose",
        "runtime",
        "ops",
        "layer",
        "models",
        "warmup nn tune compat",
        "integrations",
        "cli",
    ],
}
ENGINES = {"transformers", "vllm", "sglang"}  # which cutlass_moe/integrations may import
LINES, KERNEL_LINES = 400, 900  # of a file
FUNCTION_LINES, PARAMETERS = 60, 8  # public ops, and kernels, take what their callers have


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names of all that a file imports, at its top or within functions."""

    def found() -> Iterator[str]:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.module and not node.level, f"{path}: relative import"
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    return frozenset(found())


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def rooms(path: Path, package: str) -> set[str]:
    """Of a package those rooms that a file imports from."""
    names = (name.split(".") for name in imports(path))
    return {name[1] for name in names if name[0] == package and len(name) > 1}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[1]


def is_kernel_code(path: Path) -> bool:
    rooms = ("emitters/device/", "emitters/templates/")
    name = path.relative_to(ROOT).as_posix()
    return name.startswith(rooms) or name.endswith("/triton.py")


# Who imports whom


def test_spec_needs_the_standard_library_alone() -> None:
    for path in FILES["emitters"]:
        if room_of(path) == "spec":
            assert tops(path) <= {*sys.stdlib_module_names, "emitters"}, path
            assert rooms(path, "emitters") <= {"spec"}, path


def test_emitters_know_no_host() -> None:
    for path in FILES["emitters"]:
        assert not tops(path) & {"torch", "cutlass_moe", "cuda", "perf", "tests"}, path


def test_cutlass_moe_knows_emitters_by_their_spec() -> None:
    for path in FILES["cutlass_moe"]:
        assert not tops(path) & {DSL, "perf", "tests"}, path
        assert rooms(path, "emitters") <= {"spec"}, path


def test_perf_knows_no_tests_and_no_dsl() -> None:
    for path in FILES["perf"]:
        assert not tops(path) & {DSL, "tests"}, path


def test_tests_know_no_perf_but_their_own() -> None:
    for path in FILES["tests"]:
        assert path.parent.name == "perf" or "perf" not in tops(path), path


def test_integrations_know_public_names_alone() -> None:
    """And no other room knows an engine."""
    public = {"cutlass_moe", *(f"cutlass_moe.{name}" for name in cutlass_moe.__all__)}
    rooms = ("integrations", "environment", "nn", "models")
    for path in FILES["cutlass_moe"]:
        if room_of(path) != "integrations":
            assert not tops(path) & ENGINES, path
            continue
        assert tops(path) & ENGINES <= {path.stem.removesuffix("_experts")}, path
        for name in imports(path):
            if name.startswith("cutlass_moe"):
                assert name in public or name.split(".")[1] in rooms, f"{path}: {name}"


@pytest.mark.parametrize("package", FLOORS)
def test_rooms_import_from_floors_below(package: str) -> None:
    floor = {room: i for i, names in enumerate(FLOORS[package]) for room in names.split()}
    inside = [path for path in FILES[package] if path != ROOT / package / "__init__.py"]
    assert {room_of(path) for path in inside} == set(floor)
    wrong = {
        f"{name_of(path)} -> {room}"
        for path in inside
        for room in rooms(path, package) & set(floor)
        if room != room_of(path) and floor[room] >= floor[room_of(path)]
    }
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_of_imports(package: str) -> None:
    modules = {name_of(path): path for path in FILES[package]}

    def module_of(name: str) -> str | None:
        while name not in modules and "." in name:
            name = name.rpartition(".")[0]
        return name if name in modules else None

    graph = {name: {module_of(i) for i in imports(path)} for name, path in modules.items()}
    try:
        TopologicalSorter({name: uses - {name, None} for name, uses in graph.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_one_place_compiles() -> None:
    places = [
        path.relative_to(ROOT)
        for path in PRODUCT
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute)
        and node.attr == "compile"
        and ast.unparse(node.value).endswith("cute")
    ]
    assert places == [Path("emitters/compile/emit.py")]


def test_cutlass_moe_runs_where_there_is_no_dsl() -> None:
    """Every module imports with the DSL blocked, and none of them loads it."""
    absent = {engine for engine in ENGINES if importlib.util.find_spec(engine) is None}
    modules = [name_of(path) for path in FILES["cutlass_moe"] if not tops(path) & absent]
    program = (
        f"import importlib, sys; sys.modules[{DSL!r}] = None\n"
        f"for name in {modules!r}:"
        " importlib.import_module(name)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_gpu_tests_are_found_where_there_is_no_dsl() -> None:
    """Nor the packages that other tests need. Where there is no GPU, this alone imports them."""
    plugins = ["-p", "tests.support.bare", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-qq", "--collect-only", "-m", "gpu", *plugins, "tests"],
        cwd=ROOT,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = {line.partition(":")[0] for line in ended.stdout.splitlines()}
    named = {str(path.relative_to(ROOT)) for path in FILES["tests"] if path.stem.endswith("_gpu")}
    assert found >= named
    marked = [path for path in FILES["tests"] if re.search(r"mark\.gpu", path.read_text())]
    assert {str(path.relative_to(ROOT)) for path in marked} == named  # conftest.py goes by names


# Sizes and names


def test_files_are_short() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in PRODUCT}
    assert not {
        str(path.relative_to(ROOT)): count
        for path, count in lines.items()
        if count > (KERNEL_LINES if is_kernel_code(path) else LINES)
    }


def test_functions_are_short() -> None:
    """Public ops, what is named after them, and modules have long signatures and docstrings."""
    public = tuple(cutlass_moe.__all__)
    wrong = []
    for path in PRODUCT:
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.FunctionDef) or is_kernel_code(path):
                continue
            if any(node.name == op or node.name.startswith(f"{op}_") for op in public):
                continue
            a = node.args
            names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            of_module = name_of(path) == "cutlass_moe.nn" and node.name == "__init__"
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > FUNCTION_LINES or (count > PARAMETERS and not of_module):
                wrong.append(f"{name_of(path)}.{node.name}: {lines} lines, {count} parameters")
    assert not wrong


def test_one_class_a_name() -> None:
    homes: dict[str, list[str]] = {}
    for path in PRODUCT:
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(name_of(path))
    assert not {name: places for name, places in homes.items() if len(places) > 1}


# What is shipped; what the wheel holds: tests/test_wheel.py


def test_every_folder_is_a_package() -> None:
    """So that pytest, mypy and the wheel all know a module by the same name."""
    folders = {path.parent for path in PRODUCT}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_build_identity_follows_every_source_file(tmp_path: Path) -> None:
    deep = tmp_path / "rooms" / "deep.py"
    deep.parent.mkdir()
    deep.write_text("x = 1")
    hashes = [source_hash(tmp_path)]
    deep.write_text("x = 2")
    hashes.append(source_hash(tmp_path))
    deep.rename(tmp_path / "rooms" / "other.py")
    hashes.append(source_hash(tmp_path))
    assert len(set(hashes)) == 3
    (tmp_path / "rooms" / "README.md").write_text("words")
    assert source_hash(tmp_path) == hashes[-1]
