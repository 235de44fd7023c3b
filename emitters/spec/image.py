"""A kernel image: cubin bytes, and the launch record that a host needs to launch them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from emitters.spec.dtypes import Name
from emitters.spec.registry import Config, Problem

TENSOR_MAP_BYTES = 128  # the size of a CUtensorMap
IMAGE_ABI = 7  # goes up when a launch record or a parameter changes its meaning


class OtherAbi(ValueError):
    """A launch record was written by a version with another image ABI."""


class ParamKind(Name):
    """The type of a kernel parameter."""

    TENSOR_MAP = "tensor_map"  # a CUtensorMap by value, 128 bytes
    POINTER = "pointer"
    INT32 = "int32"


@dataclass(frozen=True)
class Param:
    """A kernel parameter, with its offset and size in bytes as the cubin states them."""

    name: str
    kind: ParamKind
    offset: int
    size: int


@dataclass(frozen=True)
class TensorMapBox:
    """The part of a tensor map that is known when a kernel is compiled.

    The host adds address, extents and strides. box: elements along each dimension, the dense one
    first; swizzle and l2_promotion: bytes.
    """

    param: str
    box: tuple[int, ...]
    swizzle: int
    l2_promotion: int


@dataclass(frozen=True)
class LaunchRecord:
    """Everything about a kernel, except its code, that a host needs to launch it: launch.json."""

    symbol: str
    params: tuple[Param, ...]
    tensor_maps: tuple[TensorMapBox, ...]
    smem_bytes: int
    threads: int
    cluster: tuple[int, int, int]
    arch: str
    abi: int
    registers: int  # per thread, as the compiler reports
    spill_bytes: int  # per thread
    build: str  # build identity: DSL version, toolchain flavour, hash of the emitters' source
    problem: dict[str, Any]
    config: dict[str, Any]
    cubin_sha256: str

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LaunchRecord:
        """The inverse of `to_json`; raises ValueError for any other text, or another ABI."""
        try:
            plain = json.loads(text)
            if plain["abi"] != IMAGE_ABI:
                raise OtherAbi(
                    f"the image's ABI must be {IMAGE_ABI}, got {plain['abi']}: build the image anew"
                )
            plain["params"] = tuple(
                Param(**{**p, "kind": ParamKind(p["kind"])}) for p in plain["params"]
            )
            plain["tensor_maps"] = tuple(
                TensorMapBox(**{**box, "box": tuple(box["box"])}) for box in plain["tensor_maps"]
            )
            plain["cluster"] = tuple(plain["cluster"])
            return cls(**plain)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"launch.json must hold a launch record with all its fields, got {error!r}"
            ) from error


@dataclass(frozen=True)
class Image:
    """A compiled kernel."""

    cubin: bytes
    record: LaunchRecord


def image_key(problem: Problem, config: Config, arch: str) -> str:
    """The key under which caches keep an image: 64 hex digits of a hash.

    No DSL, GPU or torch is needed to compute it.
    """
    hashed = {
        "problem": problem.to_json(),
        "config": config.to_json(),
        "arch": arch,
        "abi": IMAGE_ABI,
    }
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
