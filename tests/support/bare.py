"""`pytest -p tests.support.bare`: as on a machine with a GPU, torch, pytest and NumPy alone.

The DSL and what other tests need cannot be imported; the DSL counts as not installed.
"""

from __future__ import annotations

import sys
from importlib import metadata

MISSING = ("cutlass", "hypothesis", "click", "rich", "matplotlib", "triton")
_version = metadata.version


def _version_of_others(package: str) -> str:
    if package.startswith("nvidia-cutlass-dsl"):
        raise metadata.PackageNotFoundError(package)
    return _version(package)


sys.modules.update(dict.fromkeys(MISSING))  # type: ignore[arg-type]  # None: may not be imported
metadata.version = _version_of_others
