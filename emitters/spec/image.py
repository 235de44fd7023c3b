"""A kernel image: cubin bytes and the launch record that a host needs to launch them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from emitters.spec.dtypes import Name
from emitters.spec.registry import Config, Problem

TENSOR_MAP_BYTES = 128  # of a CUtensorMap
IMAGE_ABI = 6  # raised when a launch record or a parameter changes its meaning


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


def image_key(problem: Problem, config: Config, arch: str) -> str:
    """Lookup key of an image, 64 hex digits: no DSL, no GPU and no torch are needed to know it."""
    asked = {
        "problem": problem.to_json(),
        "config": config.to_json(),
        "arch": arch,
        "abi": IMAGE_ABI,
    }
    text = json.dumps(asked, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
