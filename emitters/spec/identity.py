"""Which build made an image: DSL version, toolchain flavour, hash of the emitters' source."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

TOOLCHAINS = {"cu13": 13, "cu12": 12}  # newest first; the CUDA a driver must support to run them

_DSL = "nvidia-cutlass-dsl"
_EMITTERS = Path(__file__).parents[1]


def build_identity(toolchain: str | None) -> str | None:
    """DSL version, toolchain flavour, hash of the emitters' source; None where not installed.

    Two builds of equal identity write equal images.
    """
    if toolchain not in installed_toolchains():
        return None
    version = metadata.version(_DSL)
    return f"{_DSL} {version} {toolchain} emitters {source_hash(_EMITTERS)[:16]}"


def source_hash(package: Path) -> str:
    """64 hex digits: of the names and contents of a package's Python files, in all its folders."""
    source = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        source.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return source.hexdigest()


def newest_toolchain(cuda: int | None) -> str | None:
    """The newest flavour installed whose cubins a driver of this CUDA version runs (12040 for
    12.4); without a driver (None), or with one that runs none of them, the newest. None without
    the DSL."""
    installed = installed_toolchains()
    runs = [name for name in installed if cuda is None or TOOLCHAINS[name] <= cuda // 1000]
    return next(iter((*runs, *installed)), None)


def installed_toolchains() -> tuple[str, ...]:
    """The flavours of the DSL that are installed, newest first."""
    if not _installed(_DSL):
        return ()
    return tuple(name for name in TOOLCHAINS if _installed(f"{_DSL}-libs-{name}"))


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
