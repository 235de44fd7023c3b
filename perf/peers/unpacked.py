"""Other people's packages where they are not installed: unpacked in the folder PERF_PEERS.

Such a folder is what `pip install --no-deps --target FOLDER vllm humming-kernels` makes, or a
smaller one with `src/` (some of vLLM's Python files), `so/` (its compiled ops) and `site/`
(deep_gemm, humming). vLLM imports all of a server at once, which has many dependencies. Here only
its kernels' own files are loaded; any other module of vLLM that they name is a stub, which answers
every name with a class that does nothing.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FOLDER = "PERF_PEERS"
VERSIONS = "VERSIONS"  # a file there: a name and a version on each line


def folder() -> Path | None:
    named = os.environ.get(FOLDER)
    return Path(named).resolve() if named else None


@cache
def make_importable() -> None:
    """Puts the folder's packages on the path, and tells those that compile where to."""
    root = folder()
    if root is None:
        return
    sys.path[:0] = [str(path) for path in (root / "site", root, root / "vllm/third_party")]
    for variable, name in (
        ("DG_JIT_CACHE_DIR", "deepgemm"),
        ("TRITON_CACHE_DIR", "triton"),
        ("HUMMING_CACHE_DIR", "humming"),
    ):
        os.environ.setdefault(variable, str(root / "compiled" / name))
    nvcc = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    os.environ.setdefault("CUDA_HOME", str(nvcc.resolve().parent.parent))


def versions() -> dict[str, str]:
    """What the folder's VERSIONS file says."""
    root = folder()
    path = root / VERSIONS if root else None
    if path is None or not path.exists():
        return {}
    return dict(line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip())


def vllm_sources() -> Path | None:
    """The folder above vLLM's Python files, where they are unpacked."""
    root = folder()
    places = (root / "src", root) if root else ()
    return next((place for place in places if (place / "vllm").is_dir()), None)


def load_compiled_ops() -> None:
    """Registers vLLM's ops with torch; raises OSError where a library can't be loaded. Without a
    GPU there is no driver to load them against."""
    root = folder()
    if root and torch.cuda.is_available():
        for place in (root / "so", root / "vllm"):
            for path in sorted((*place.glob("_C*.so"), *place.glob("_moe_C*.so"))):
                torch.ops.load_library(str(path))


class _Nothing(type):
    """The type of classes that have every attribute, and as decorators change nothing."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return nothing(name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else super().__call__()

    def __or__(cls, other: Any) -> Any:  # in annotations
        return cls

    __ror__ = __or__


def nothing(name: str) -> type:
    """A class that stands for whatever a stub is asked for; code may derive from it."""
    members: dict[str, Any] = {
        "__init__": lambda self, *args, **kwargs: None,
        "__class_getitem__": classmethod(lambda cls, item: cls),
    }
    return _Nothing(name, (), members)


class Stubs(MetaPathFinder, Loader):
    """Imports vLLM's modules: those named in `real` from their files, others are stubs, with the
    members that `known` gives them."""

    def __init__(
        self, sources: Path, real: Collection[str], known: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.sources, self.real, self.known = sources, real, known

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] != "vllm":
            return None
        file = self.sources / (name.replace(".", "/") + ".py")
        if name in self.real and file.exists():
            return importlib.util.spec_from_file_location(name, file)
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__file__ = str(self.sources / "stub.py")

        def missing(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return nothing(name)

        module.__getattr__ = missing  # type: ignore[method-assign]
        for name, value in self.known.get(spec.name, {}).items():
            setattr(module, name, value)
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass
