"""Names and signatures of other grouped GEMM libraries, on `cutlass_moe.grouped_matmul`."""

from __future__ import annotations

import importlib
import sys

_MODULES = {
    "grouped_gemm": ("ops", "backend"),
    "deep_gemm": ("utils", "utils.layout", "utils.math"),
}


def install(name: str) -> None:
    """Makes `import NAME` find this package's functions, for code that imports another library.

    name: "grouped_gemm", with `ops` and `backend`, or "deep_gemm", with `utils`. Call it before the
    library's users are imported; again, it does nothing. A library of that name that is installed
    is hidden in this process.

    Raises ValueError for another name, and RuntimeError where the library itself was imported
    before, since whoever did holds its functions.
    """
    if name not in _MODULES:
        raise ValueError(f"name must be one of {', '.join(_MODULES)}, got {name!r}")
    ours = f"{__name__}.{name}"
    modules = {name: importlib.import_module(ours)}
    for part in _MODULES[name]:
        modules[f"{name}.{part}"] = importlib.import_module(f"{ours}.{part}")
    for imported, module in modules.items():
        if sys.modules.get(imported, module) is not module:
            raise RuntimeError(
                f"install({name!r}) must come before the first import of {name}, which "
                f"{sys.modules[imported]!r} is from"
            )
    sys.modules.update(modules)
