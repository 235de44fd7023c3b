"""Lets SGLang be imported where its compiled kernels, the package `sgl_kernel`, are not."""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ABSENT = "sgl_kernel"


class _Name:
    """Stands for a function, a table or a value of theirs, and for what is in it."""

    def __call__(self, *_: Any, **__: Any) -> _Name:
        return self

    def __getattr__(self, name: str) -> _Name:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class _Module(ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name()


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == ABSENT else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def prepare() -> None:
    """Call it before anything of SGLang is imported."""
    if importlib.util.find_spec(ABSENT) is None:
        sys.meta_path.append(_Finder())
