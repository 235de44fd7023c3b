"""The build identity of images: DSL version, toolchain flavour, hash of the emitters' source."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

# Newest first, with the major CUDA version that a driver must support to run their cubins.
TOOLCHAINS = {"cu13": 13, "cu12": 12}

_DSL = "nvidia-cutlass-dsl"
_EMITTERS = Path(__file__).parents[1]


def build_identity(toolchain: str | None) -> str | None:
    """The identity of a build with this toolchain, or None if that is not installed.

    Two builds of equal identity write equal images.
    """
    if toolchain not in installed_toolchains():
        return None
    version = metadata.version(_DSL)
    return f"{_DSL} {version} {toolchain} emitters {source_hash(_EMITTERS)[:16]}"


def source_hash(package: Path) -> str:
    """A hash of the names and contents of all Python files of a package: 64 hex digits."""
    source = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        source.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return source.hexdigest()


def newest_toolchain(cuda: int | None) -> str | None:
    """The newest installed flavour that makes cubins which a driver of this CUDA version runs.

    cuda: 12040 for 12.4. Without a driver (None), or with one that runs no installed flavour's
    cubins, the newest flavour. Returns None if the DSL is not installed.
    """
    installed = installed_toolchains()
    runs = [name for name in installed if cuda is None or TOOLCHAINS[name] <= cuda // 1000]
    return next(iter((*runs, *installed)), None)


def installed_toolchains() -> tuple[str, ...]:
    """The installed flavours of the DSL, newest first."""
    if not _installed(_DSL):
        return ()
    return tuple(name for name in TOOLCHAINS if _installed(f"{_DSL}-libs-{name}"))


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
