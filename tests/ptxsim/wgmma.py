"""WGMMA: matrix descriptors, operands, products, and the asynchronous queue of a warp; mma.sync."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain, groupby
from typing import Any

import numpy as np
import torch

from tests.ptxsim.operands import ALL, BUSY, F32, U32, U64, B, Op, Operands, braced, integer
from tests.ptxsim.order import GENERIC, differ
from tests.ptxsim.ordered import OrderedMemory, Places
from tests.ptxsim.outcome import YIELD
from tests.ptxsim.ptx import Fault, Instruction, Program
from tests.ptxsim.tensormap import swizzled

_SHAPE = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)(\.satfinite)?\.(\w+)\.(\w+)\.(\w+)$"
)
_FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def _table(kind: str) -> np.ndarray:
    """Values of all bytes of an 8-bit float."""
    return torch.arange(256, dtype=torch.uint8).view(_FLOAT8[kind]).double().numpy()


_TABLES = {kind: _table(kind) for kind in _FLOAT8}


@lru_cache(maxsize=256)  # the warps of a warpgroup read the same B
def _values(operand: bytes, kind: str) -> np.ndarray:
    """32 bytes a row -> float64 [rows, k], exactly."""
    data = np.frombuffer(operand, np.uint8).reshape(-1, 32)
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
    """Of one wgmma.mma_async: operands from shared memory, K-major but where transposed; A of 16
    bits may come from registers instead."""

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
def operand_chunks(descriptor: int, first: int, last: int, transposed: bool) -> Places:
    """In shared memory the 16-byte halves of 32 bytes of K, rows first .. last - 1; transposed:
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
        return Places(swizzled(linear.ravel(), 128), 16)
    row = np.arange(first, last)[:, None]
    linear = base + row // 8 * stride + row % 8 * 128 + np.array([0, 16])
    return Places(swizzled(linear.ravel(), 128), 16)


def _rows(chunks: np.ndarray, transposed: bool) -> bytes:
    """32 bytes a row, from the chunks at `operand_chunks`."""
    return (chunks.view(np.uint16).reshape(16, -1).T if transposed else chunks).tobytes()


def _gathered(values: list[np.ndarray]) -> bytes:
    """32 bytes for each of a warp's 16 rows of A, from the four registers that hold them.

    Lane 4 g + t has elements 2 t and 2 t + 1 of row g, of row g + 8, and then those 8 further on.
    """
    words = np.stack([value.view(np.uint32) for value in values])
    halves = words.view(np.uint16).reshape(2, 2, 8, 4, 2)  # k8, row8, g, t, element
    return halves.transpose(1, 2, 0, 3, 4).tobytes()


@dataclass
class Multiply:
    """One warp's quarter of a WGMMA: rows 16 w .. 16 w + 15 of A with all of B.

    a: A's descriptor, or the four registers that hold it.
    """

    shape: Shape
    quarter: int
    a: int | tuple[int, ...]
    b: int
    accumulate: bool
    registers: tuple[int, ...]
    number: int = 0
    operands: tuple[bytes, bytes] | None = None

    @property
    def fragment(self) -> tuple[int, ...]:
        """The registers that hold A; none if shared memory does."""
        return self.a if isinstance(self.a, tuple) else ()

    def chunks(self) -> list[Places]:
        """Where shared memory has A, unless registers do, and B."""
        first = 16 * self.quarter
        b = operand_chunks(self.b, 0, self.shape.n, self.shape.b_transposed)
        if isinstance(self.a, tuple):
            return [b]
        return [operand_chunks(self.a, first, first + 16, self.shape.a_transposed), b]

    def fetch(self, memory: OrderedMemory, values: list[Any]) -> None:
        """Takes the operands' bytes as they are now. values: of the warp's registers."""
        if self.operands is None:
            *a, b = (memory.pieces(16)[operand.numbers] for operand in self.chunks())
            held = [values[number] for number in self.fragment]
            rows = _rows(a[0], self.shape.a_transposed) if a else _gathered(held)
            self.operands = rows, _rows(b, self.shape.b_transposed)

    def result(self, sums: np.ndarray | None) -> np.ndarray:
        """float32 or int32 [n / 2, 32]: the new accumulators by register and lane."""
        assert self.operands is not None
        a, b = self.operands
        product = _values(a, self.shape.a) @ _values(b, self.shape.b).T
        total = (
            product.reshape(2, 8, self.shape.n // 8, 4, 2).transpose(2, 0, 4, 1, 3).reshape(-1, 32)
        )
        if self.accumulate:
            total = total + sums
        if self.shape.integer:  # below 2^53: float64 holds it
            return np.clip(total, -(2**31), 2**31 - 1).astype(np.int32)
        return total.astype(np.float32)


@dataclass
class Queue:
    """A warp's WGMMAs that no wait_group has covered yet."""

    groups: list[list[Multiply]] = field(default_factory=list)
    open: list[Multiply] = field(default_factory=list)
    issued: int = 0
    owned: dict[tuple[int, ...], int] = field(default_factory=dict)  # accumulators -> in flight
    read: dict[int, int] = field(default_factory=dict)  # registers that hold A -> in flight
    fenced: bool = False
    # accumulators accessed, and registers of A written, since wgmma.fence
    touched: set[int] = field(default_factory=set)


def registers(program: Program) -> tuple[set[int], set[int]]:
    """The registers that a program's WGMMAs write, and those from which they read A."""
    written, read = set(), set()
    for one in program.instructions:
        if one.opcode.startswith("wgmma.mma_async"):
            written |= {program.registers[name] for name in braced(one.operands[0])}
            if one.operands[1].startswith("{"):
                read |= {program.registers[name] for name in braced(one.operands[1])}
    return written, read


def build(one: Instruction, operands: Operands) -> Op | None:
    """None where the opcode multiplies no matrices."""
    if one.opcode.startswith("wgmma.mma_async"):
        return _multiply(one, operands)
    if one.opcode == "wgmma.wait_group.sync.aligned":
        return _wait_group(one, operands)
    if one.opcode == "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32":
        return _multiply_at_once(one, operands)
    return {
        "wgmma.fence.sync.aligned": _fence_registers,
        "wgmma.commit_group.sync.aligned": _commit,
    }.get(one.opcode)


def _multiply_at_once(one: Instruction, operands: Operands) -> Op:
    """mma.sync: a warp's 16 x 16 of A with 16 x 8 of B, added to 16 x 8 sums."""
    results, *given = (braced(text) for text in one.operands)
    puts = [operands.sink(name, F32) for name in results]
    a, b, c = (
        [operands.source(name, kind) for name in names]
        for names, kind in zip(given, (U32, U32, F32), strict=True)
    )
    if (len(puts), len(a), len(b), len(c)) != (4, 4, 2, 4):
        raise ValueError(f"{one.where()}: 4, 4, 2 and 4 registers expected")

    def multiply(f: Any) -> None:
        # lane 4 g + t has elements 2 t and 2 t + 1 of B's column g, and those 8 further on
        halves = np.stack([value(f) for value in b]).view(np.uint16).reshape(2, 8, 4, 2)
        columns = halves.transpose(1, 0, 2, 3).tobytes()
        rows = _gathered([value(f) for value in a])
        product = _values(rows, "bf16") @ _values(columns, "bf16").T
        sums = product.reshape(2, 8, 4, 2).transpose(0, 3, 1, 2).reshape(4, 32)
        for put, total, addend in zip(puts, sums, c, strict=True):
            put(f, (total + addend(f)).astype(np.float32))

    return multiply


def _multiply(one: Instruction, operands: Operands) -> Op:
    shape = Shape.parse(one.opcode)
    registers = tuple(operands.numbers(one.operands[0]))
    fragment = tuple(operands.numbers(one.operands[1])) if one.operands[1][0] == "{" else ()
    if fragment and (shape.a not in ("bf16", "f16") or len(fragment) != 4):
        raise ValueError(f"{one.where()}: A in registers must be four of 16-bit elements")
    a = operands.source("0" if fragment else one.operands[1], U64)
    b = operands.source(one.operands[2], U64)
    accumulate = operands.source(one.operands[3], B)
    if len(registers) != shape.n // 2:
        raise ValueError(f"{one.where()}: {shape.n // 2} accumulators expected")
    rest = one.operands[4:]
    if fragment and len(rest) == 3 and rest[2] in ("0", "1"):
        shape = replace(shape, b_transposed=rest[2] == "1")
        rest = rest[:2]
    elif "16" in shape.a and len(rest) == 4 and set(rest[2:]) <= {"0", "1"}:
        shape = replace(shape, a_transposed=rest[2] == "1", b_transposed=rest[3] == "1")
        rest = rest[:2]
    expected = [] if shape.integer else ["1", "1"]
    if rest != expected:
        raise ValueError(f"{one.where()}: scales and transpositions {rest}, modelled: {expected}")

    def multiply(f: Any) -> Any:
        warp = f.warp
        given = (a(f), b(f), accumulate(f))
        if any(differ(lanes) for lanes in given):
            raise Fault("operands differ among the lanes of a warp")
        first = (int(given[0][0]), int(given[1][0]), bool(given[2][0]))
        warp.check_alike(one, first)
        part = Multiply(shape, warp.number % 4, fragment or first[0], *first[1:], registers)
        _own(warp, part)
        queue = warp.queue
        queue.issued += 1
        part.number = queue.issued
        for operand in part.chunks():
            warp.cta.shared.queue_read(warp.index, part.number, operand)
        queue.open.append(part)
        if warp.cta.cluster.schedule.reads_early():
            part.fetch(warp.cta.shared, warp.values)
        return YIELD

    return multiply


def _own(warp: Any, part: Multiply) -> None:
    """The accumulators belong to the WGMMA until a wait_group covers it."""
    queue = warp.queue
    if not queue.fenced:
        raise Fault("WGMMA before the first wgmma.fence")
    if not queue.touched.isdisjoint(part.registers):
        raise Fault("accumulators touched since the last wgmma.fence")
    if not queue.touched.isdisjoint(part.fragment):
        raise Fault("registers of A written since the last wgmma.fence")
    for number in part.fragment:
        if warp.valid[number] != ALL:
            raise Fault("registers of A read before they have values")
        queue.read[number] = queue.read.get(number, 0) + 1
    if part.registers not in queue.owned:
        for number in part.registers:
            if part.accumulate and warp.valid[number] not in (ALL, BUSY):
                raise Fault("accumulators added to before they have values")
            warp.valid[number] = BUSY
    queue.owned[part.registers] = queue.owned.get(part.registers, 0) + 1


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
        done = queue.groups[: max(len(queue.groups) - remaining, 0)]
        del queue.groups[: len(done)]
        for registers, parts in groupby(chain(*done), lambda part: part.registers):
            _retire(warp, registers, list(parts))
        return YIELD

    return wait


def _retire(warp: Any, registers: tuple[int, ...], parts: list[Multiply]) -> None:
    """In turn, all into the same registers."""
    cta, owned = warp.cta, warp.queue.owned
    sums = None
    if parts[0].accumulate:
        kind = np.int32 if parts[0].shape.integer else np.float32
        sums = np.array([warp.values[number].view(kind) for number in registers])
    for part in parts:
        part.fetch(cta.shared, warp.values)
        for number in part.fragment:
            warp.queue.read[number] -= 1
        sums = part.result(sums)
    for number, value in zip(registers, sums, strict=True):
        warp.values[number] = value
    owned[registers] -= len(parts)
    if not owned[registers]:
        del owned[registers]
        for number in set(registers).difference(*owned):
            warp.valid[number] = ALL
    queue = cta.order.queue(warp.index)
    cta.order.known[GENERIC, cta.order.of_warp(warp.index), queue] = parts[-1].number
