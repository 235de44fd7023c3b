"""WGMMA: matrix descriptors, operands, products, and the asynchronous queue of a warp."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from tests.ptxsim.operands import ALL, BUSY, U64, B, Op, Operands, integer
from tests.ptxsim.ordered import OrderedMemory
from tests.ptxsim.outcome import YIELD
from tests.ptxsim.ptx import Fault, Instruction
from tests.ptxsim.tensormap import swizzled

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
    """Of one wgmma.mma_async: operands both from shared memory, K-major but where transposed."""

    n: int
    a: str
    b: str
    integer: bool
    a_transposed: bool = False
    b_transposed: bool = False

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
def operand_chunks(descriptor: int, first: int, last: int, transposed: bool) -> np.ndarray:
    """Shared addresses of the 16-byte halves of 32 bytes of K, rows first .. last - 1; transposed:
    of 8 rows each, for all of them at each of 16 elements of K."""
    layout = descriptor >> 62
    if layout != 1:
        raise Fault(f"matrix descriptor {descriptor:#x}: only the 128-byte swizzle is modelled")
    if descriptor >> 49 & 7:
        raise Fault(f"matrix descriptor {descriptor:#x}: base offset")
    base = (descriptor & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    if transposed:
        block_stride = (descriptor >> 16 & 0x3FFF) << 4  # between 64 rows
        k, row = np.arange(16)[:, None], np.arange(first, last, 8)
        linear = base + row // 64 * block_stride + row % 64 * 2 + k // 8 * stride + k % 8 * 128
        return swizzled(linear.ravel(), 128)
    row = np.arange(first, last)[:, None]
    linear = base + row // 8 * stride + row % 8 * 128 + np.array([0, 16])
    return swizzled(linear.ravel(), 128)


def _rows(chunks: np.ndarray, transposed: bool) -> np.ndarray:
    """uint8 [rows, 32] from the chunks at `operand_chunks`."""
    if not transposed:
        return chunks.reshape(-1, 32)
    return np.ascontiguousarray(chunks.view(np.uint16).reshape(16, -1).T).view(np.uint8)


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
            operand_chunks(self.a, first, first + 16, self.shape.a_transposed),
            operand_chunks(self.b, 0, self.shape.n, self.shape.b_transposed),
        )

    def fetch(self, memory: OrderedMemory) -> None:
        """Takes the operands' bytes as they are now."""
        if self.operands is None:
            a, b = (memory.data[at[:, None] + np.arange(16)] for at in self.chunks())
            shape = self.shape
            self.operands = _rows(a, shape.a_transposed), _rows(b, shape.b_transposed)

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


def build(one: Instruction, operands: Operands) -> Op | None:
    """None where the opcode is no WGMMA's."""
    if one.opcode.startswith("wgmma.mma_async"):
        return _multiply(one, operands)
    if one.opcode == "wgmma.wait_group.sync.aligned":
        return _wait_group(one, operands)
    return {
        "wgmma.fence.sync.aligned": _fence_registers,
        "wgmma.commit_group.sync.aligned": _commit,
    }.get(one.opcode)


def _multiply(one: Instruction, operands: Operands) -> Op:
    shape = Shape.parse(one.opcode)
    registers = operands.numbers(one.operands[0])
    a, b = (operands.source(name, U64) for name in one.operands[1:3])
    accumulate = operands.source(one.operands[3], B)
    if len(registers) != shape.n // 2:
        raise ValueError(f"{one.where()}: {shape.n // 2} accumulators expected")
    rest = one.operands[4:]
    if "16" in shape.a and len(rest) == 4 and set(rest[2:]) <= {"0", "1"}:
        shape = replace(shape, a_transposed=rest[2] == "1", b_transposed=rest[3] == "1")
        rest = rest[:2]
    expected = [] if shape.integer else ["1", "1"]
    if rest != expected:
        raise ValueError(f"{one.where()}: scales and transpositions {rest}, modelled: {expected}")

    def multiply(f: Any) -> Any:
        warp = f.warp
        first = (int(a(f)[0]), int(b(f)[0]), bool(accumulate(f)[0]))
        for source, value in zip((a, b, accumulate), first, strict=True):
            if (source(f) != value).any():
                raise Fault("operands differ among the lanes of a warp")
        warp.check_alike(one, first)
        part = Multiply(shape, warp.number % 4, *first, registers)
        _own(warp, part)
        queue = warp.queue
        queue.issued += 1
        part.number = queue.issued
        for chunks in part.chunks():
            warp.cta.shared.queue_read(warp.index, part.number, chunks)
        queue.open.append(part)
        if warp.cta.cluster.schedule.reads_early():
            part.fetch(warp.cta.shared)
        return YIELD

    return multiply


def _own(warp: Any, part: Multiply) -> None:
    """The accumulators belong to the WGMMA until a wait_group covers it."""
    queue = warp.queue
    if not queue.fenced:
        raise Fault("WGMMA before the first wgmma.fence")
    touched = queue.touched.intersection(part.registers)
    if touched:
        raise Fault("accumulators touched since the last wgmma.fence")
    for number in part.registers:
        if part.accumulate and not queue.owned.get(number) and warp.valid[number] != ALL:
            raise Fault("accumulators added to before they have values")
        queue.owned[number] = queue.owned.get(number, 0) + 1
        warp.valid[number] = BUSY


def _fence_registers(f: Any) -> None:
    f.warp.queue.touched.clear()
    f.warp.queue.fenced = True


def _commit(f: Any) -> None:
    queue = f.warp.queue
    queue.groups.append(queue.open)
    queue.open = []


def _wait_group(one: Instruction, operands: Operands) -> Op:
    remaining = integer(one.operands[0])

    def wait(f: Any) -> Any:
        warp, queue = f.warp, f.warp.queue
        while len(queue.groups) > remaining:
            for part in queue.groups.pop(0):
                _retire(warp, part)
        return YIELD

    return wait


def _retire(warp: Any, part: Multiply) -> None:
    cta, queue = warp.cta, warp.queue
    part.fetch(cta.shared)
    values = part.result([warp.values[n] for n in part.registers] if part.accumulate else [])
    for number, value in zip(part.registers, values, strict=True):
        warp.values[number] = value
        queue.owned[number] -= 1
        if not queue.owned[number]:
            warp.valid[number] = ALL
    threads = cta.order.everyone[warp.index * 32 : warp.index * 32 + 32]
    cta.order.known[0, threads, cta.order.queue(warp.index)] = part.number
