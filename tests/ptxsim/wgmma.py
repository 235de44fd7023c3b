"""WGMMA: matrix descriptors, operands, products, and the asynchronous queue of a warp."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from tests.ptxsim.memory import SharedMemory
from tests.ptxsim.ptx import Fault
from tests.ptxsim.tensormap import swizzled

BUSY = 1 << 40  # in place of a register's valid lanes while a WGMMA owns it
_SHAPE = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)(\.satfinite)?\.(\w+)\.(\w+)\.(\w+)$"
)
_FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def _table(kind: str) -> np.ndarray:
    """Values of all bytes of an 8-bit float."""
    return torch.arange(256, dtype=torch.uint8).view(_FLOAT8[kind]).double().numpy()


_TABLES = {kind: _table(kind) for kind in _FLOAT8}


def _values(data: np.ndarray, kind: str) -> np.ndarray:
    """uint8 [rows, 32] -> float64 [rows, k], exactly."""
    if kind in _TABLES:
        return _TABLES[kind][data]
    if kind == "s8":
        return data.view(np.int8).astype(np.float64)
    if kind == "f16":
        return data.view(np.float16).astype(np.float64)
    return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


_K = {"e4m3": 32, "e5m2": 32, "s8": 32, "f16": 16, "bf16": 16}


@dataclass(frozen=True)
class Shape:
    """Of one wgmma.mma_async: operands both from shared memory, K-major."""

    n: int
    a: str
    b: str
    integer: bool

    @classmethod
    def parse(cls, opcode: str) -> Shape:
        match = _SHAPE.match(opcode)
        if match is None:
            raise ValueError(f"unknown instruction {opcode}")
        n, k, saturate, result, a, b = match.groups()
        integer = a == "s8"
        if a not in _K or b not in _K or int(k) != _K[a] or _K[a] != _K[b]:
            raise ValueError(f"unknown instruction {opcode}")
        if (result, bool(saturate)) != (("s32", True) if integer else ("f32", False)):
            raise ValueError(f"unknown instruction {opcode}")
        return cls(int(n), a, b, integer)


@lru_cache(maxsize=1024)
def operand_chunks(descriptor: int, first: int, last: int) -> np.ndarray:
    """Shared addresses of the 16-byte halves of 32 bytes of K, rows first .. last - 1."""
    layout = descriptor >> 62
    if layout != 1:
        raise Fault(f"matrix descriptor {descriptor:#x}: only the 128-byte swizzle is modelled")
    if descriptor >> 49 & 7:
        raise Fault(f"matrix descriptor {descriptor:#x}: base offset")
    base = (descriptor & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    row = np.arange(first, last)[:, None]
    linear = base + row // 8 * stride + row % 8 * 128 + np.array([0, 16])
    return swizzled(linear.ravel(), 128)


@dataclass
class Multiply:
    """One warp's quarter of a WGMMA: rows 16 w .. 16 w + 15 of A with all of B."""

    shape: Shape
    quarter: int
    a: int
    b: int
    accumulate: bool
    registers: list[int]
    number: int = 0
    operands: tuple[np.ndarray, np.ndarray] | None = None

    def chunks(self) -> tuple[np.ndarray, np.ndarray]:
        first = 16 * self.quarter
        return (
            operand_chunks(self.a, first, first + 16),
            operand_chunks(self.b, 0, self.shape.n),
        )

    def fetch(self, memory: SharedMemory) -> None:
        """Takes the operands' bytes as they are now."""
        if self.operands is None:
            a, b = (
                memory.data[at[:, None] + np.arange(16)].reshape(-1, 32) for at in self.chunks()
            )
            self.operands = a, b

    def result(self, accumulators: list[np.ndarray]) -> np.ndarray:
        """uint32 [n / 2, 32]: the new accumulators by register and lane."""
        assert self.operands is not None
        a, b = self.operands
        product = _values(a, self.shape.a) @ _values(b, self.shape.b).T
        by_register = (
            product.reshape(2, 8, self.shape.n // 8, 4, 2).transpose(2, 0, 4, 1, 3).reshape(-1, 32)
        )
        if self.shape.integer:
            total = by_register.astype(np.int64)
            if self.accumulate:
                total = total + np.array(accumulators).view(np.int32)
            return np.clip(total, -(2**31), 2**31 - 1).astype(np.int32).view(np.uint32)
        if self.accumulate:
            by_register = by_register + np.array(accumulators).view(np.float32)
        return by_register.astype(np.float32).view(np.uint32)


@dataclass
class Queue:
    """A warp's WGMMAs that no wait_group has covered yet."""

    groups: list[list[Multiply]] = field(default_factory=list)
    open: list[Multiply] = field(default_factory=list)
    issued: int = 0
    owned: dict[int, int] = field(default_factory=dict)  # register -> multiplies in flight on it
    fenced: bool = False
    touched: set[int] = field(default_factory=set)  # accumulators accessed since wgmma.fence
