"""A kernel image: cubin bytes and the launch record that a host needs to launch them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from emitters.problem import Name
from emitters.steps import AnyConfig, Problem

TOOLCHAINS = {"cu13": 13, "cu12": 12}  # newest first; the CUDA a driver must support to run them
_DSL = "nvidia-cutlass-dsl"
TENSOR_MAP_BYTES = 128  # of a CUtensorMap
IMAGE_ABI = 4  # raised when a launch record or a parameter changes its meaning


class ParamKind(Name):
    TENSOR_MAP = "tensor_map"  # a CUtensorMap by value, 128 bytes
    POINTER = "pointer"
    INT32 = "int32"


@dataclass(frozen=True)
class Param:
    """One kernel parameter. offset and size in bytes, as the cubin itself states them."""

    name: str
    kind: ParamKind
    offset: int
    size: int


@dataclass(frozen=True)
class TensorMapBox:
    """What a tensor map must say besides pointer, extents and strides.

    box: elements along each dimension, the dense one first; swizzle and l2_promotion in bytes.
    """

    param: str
    box: tuple[int, ...]
    swizzle: int
    l2_promotion: int


@dataclass(frozen=True)
class LaunchRecord:
    symbol: str
    params: tuple[Param, ...]
    tensor_maps: tuple[TensorMapBox, ...]
    smem_bytes: int
    threads: int
    cluster: tuple[int, int, int]
    arch: str
    abi: int
    registers: int  # a thread, as the compiler reports
    spill_bytes: int
    build: str  # build identity: DSL version, toolchain flavour, hash of the emitters' source
    problem: dict[str, Any]
    config: dict[str, Any]
    cubin_sha256: str

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LaunchRecord:
        """Inverse of `to_json`. Raises ValueError for any other text, or another ABI."""
        try:
            plain = json.loads(text)
            if plain["abi"] != IMAGE_ABI:
                raise ValueError(f"image ABI {plain['abi']}, expected {IMAGE_ABI}")
            plain["params"] = tuple(
                Param(**{**p, "kind": ParamKind(p["kind"])}) for p in plain["params"]
            )
            plain["tensor_maps"] = tuple(
                TensorMapBox(**{**box, "box": tuple(box["box"])}) for box in plain["tensor_maps"]
            )
            plain["cluster"] = tuple(plain["cluster"])
            return cls(**plain)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a launch record: {error!r}") from error


@dataclass(frozen=True)
class Image:
    cubin: bytes
    record: LaunchRecord


def image_key(problem: Problem, config: AnyConfig, arch: str) -> str:
    """Lookup key of an image, 64 hex digits: no DSL, no GPU and no torch are needed to know it."""
    asked = {
        "problem": problem.to_json(),
        "config": config.to_json(),
        "arch": arch,
        "abi": IMAGE_ABI,
    }
    text = json.dumps(asked, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def build_identity(toolchain: str | None = None) -> str | None:
    """DSL version, toolchain flavour, hash of the emitters' source; None where not installed.

    toolchain: default `default_toolchain()`. Two equal identities write equal images.
    """
    flavour = toolchain or default_toolchain()
    if flavour not in installed_toolchains():
        return None
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source.update(path.name.encode() + b"\0" + path.read_bytes())
    version = metadata.version(_DSL)
    return f"{_DSL} {version} {flavour} emitters {source.hexdigest()[:16]}"


def default_toolchain() -> str | None:
    """The newest flavour installed whose cubins this host's driver runs; without a driver, or with
    one that runs none of them, the newest. None without the DSL."""
    installed = installed_toolchains()
    cuda = driver_cuda()
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
