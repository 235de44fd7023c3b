"""The flavour of the DSL's compiler that a process loads, cu12 or cu13.

Left alone, the DSL loads the newest one installed that the driver runs. It keeps a compiler that is
loaded already: loading one before `import cutlass` is the way to choose.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_COMPILER = "cutlass._mlir._mlir_libs._cutlass_ir"


def loaded_toolchain() -> str | None:
    """The flavour that this process has loaded."""
    compiler = sys.modules.get(_COMPILER)
    if compiler is None:
        return None
    return Path(str(compiler.__file__)).name.split(".")[1]  # _cutlass_ir.cu12.cpython-....so


def load_toolchain(name: str) -> None:
    """Loads a flavour and the DSL around it. Needs CUTE_DSL_ARCH set, as `import cutlass` does.

    Raises ValueError where it is not installed, or where the process has loaded another one.
    """
    if loaded_toolchain() is None:
        _load(name)
    elif loaded_toolchain() != name:
        raise ValueError(f"this process has loaded {loaded_toolchain()}, it can't load {name} too")


def _load(name: str) -> None:
    dsl = importlib.util.find_spec("cutlass")
    places = dsl.submodule_search_locations if dsl else None
    files = [
        file
        for place in places or ()
        for file in Path(place, "_mlir", "_mlir_libs").glob(f"_cutlass_ir.{name}.*.so")
    ]
    if not files:
        raise ValueError(f"nvidia-cutlass-dsl-libs-{name} is not installed")
    spec = importlib.util.spec_from_file_location(_COMPILER, files[0])
    assert spec and spec.loader
    compiler = importlib.util.module_from_spec(spec)
    sys.modules[_COMPILER] = compiler
    spec.loader.exec_module(compiler)
    import cutlass._mlir._mlir_libs as libs

    libs._cutlass_ir = compiler  # the DSL reads the attribute too
