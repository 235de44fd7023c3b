"""Which toolchain's images this machine's driver runs."""

from __future__ import annotations

import ctypes
import functools
import re

from emitters.spec.identity import build_identity, newest_toolchain

_DRIVERS = {12: "R525", 13: "R580"}  # the first that runs cubins of a CUDA toolkit's major version


@functools.cache
def driver_cuda() -> int | None:
    """The CUDA version that this machine's driver supports, 12040 for 12.4; None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    failed = driver.cuDriverGetVersion(ctypes.byref(version))
    return None if failed else version.value


def default_toolchain() -> str | None:
    """The toolchain flavour that images are compiled with here, where none is asked for: see
    `newest_toolchain`."""
    return newest_toolchain(driver_cuda())


def default_build() -> str | None:
    """The build identity of images that are compiled here; None where the DSL is not installed."""
    return build_identity(default_toolchain())


def why_unloadable(build: str, cuda: int | None) -> str | None:
    """None where a driver of this CUDA version loads images of a build, else the reason in words.

    build: a build identity, whose word cu12 or cu13 names the toolkit. A driver loads cubins of its
    own major version and of older ones; of an unknown one (None) nothing is said.
    """
    toolkit = re.search(r"\bcu(\d+)\b", build)
    if toolkit is None or cuda is None or int(toolkit[1]) <= cuda // 1000:
        return None
    needed, (major, minor) = int(toolkit[1]), divmod(cuda, 1000)
    instead = f", or build with the cu{major} toolchain" if major in _DRIVERS else ""
    return (
        f"it was compiled by CUDA {needed}, whose cubins need driver "
        f"{_DRIVERS.get(needed, 'of a later branch')} or newer (CUDA {needed}.0), but this driver "
        f"supports CUDA {major}.{minor // 10}: update it{instead}"
    )
