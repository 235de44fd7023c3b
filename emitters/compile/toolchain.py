"""The choice between the flavours of the DSL's compiler, cu12 and cu13.

By default the DSL loads the newest installed one that the driver runs. But it keeps a compiler that
is already loaded, so loading one before `import cutlass` chooses it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_COMPILER = "cutlass._mlir._mlir_libs._cutlass_ir"


def loaded_toolchain() -> str | None:
    """The flavour that this process has loaded, or None."""
    compiler = sys.modules.get(_COMPILER)
    if compiler is None:
        return None
    return Path(str(compiler.__file__)).name.split(".")[1]  # _cutlass_ir.cu12.cpython-....so


def load_toolchain(name: str) -> None:
    """Loads a flavour, and the DSL; CUTE_DSL_ARCH must be set, as for `import cutlass`.

    Raises ValueError if the flavour is not installed, or if the process has loaded another one.
    """
    if loaded_toolchain() is None:
        _load(name)
    elif loaded_toolchain() != name:
        raise ValueError(f"this process has loaded {loaded_toolchain()}, it can't load {name} too")


def _load(name: str) -> None:
    dsl = importlib.util.find_spec("cutlass")
    folders = dsl.submodule_search_locations if dsl else None
    files = [
        file
        for folder in folders or ()
        for file in Path(folder, "_mlir", "_mlir_libs").glob(f"_cutlass_ir.{name}.*.so")
    ]
    if not files:
        package = f"nvidia-cutlass-dsl-libs-{name}"
        raise ValueError(f"toolchain {name} needs {package}, which is not installed")
    spec = importlib.util.spec_from_file_location(_COMPILER, files[0])
    assert spec and spec.loader
    compiler = importlib.util.module_from_spec(spec)
    sys.modules[_COMPILER] = compiler
    spec.loader.exec_module(compiler)
    import cutlass._mlir._mlir_libs as libs

    libs._cutlass_ir = compiler  # the DSL reads the attribute too
