"""Operands: registers with the lanes that hold a value, immediates, special registers, symbols."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from tests.ptxsim.ordered import SHARED_BASE
from tests.ptxsim.ptx import Fault, Program

ALL = (1 << 32) - 1
BUSY = 1 << 40  # in place of a register's valid lanes while a WGMMA owns it
B, U16, U32, I32, F32, U64, I64 = (
    np.dtype(t) for t in (np.bool_, np.uint16, np.uint32, np.int32, np.float32, np.uint64, np.int64)
)
Lanes = np.ndarray  # a value for each of 32 lanes
Source = Callable[[Any], Lanes]
Sink = Callable[[Any, Lanes], None]
Op = Callable[[Any], Any]
LANES = np.arange(32)


@lru_cache(maxsize=4096)
def same(number: Any, kind: np.dtype = U32) -> Lanes:
    """A number in all lanes. Nobody changes an array that a register holds."""
    return np.full(32, number, kind)


def mask_of(lanes: Lanes) -> int:
    """A bit for each of 32 lanes, of bool."""
    return _mask(lanes.tobytes())


@lru_cache(maxsize=4096)
def _mask(lanes: bytes) -> int:
    return sum(1 << lane for lane in range(32) if lanes[lane])


_SPECIAL: dict[str, Callable[[Any], Lanes]] = {
    "%tid.x": lambda f: f.warp.tid,
    "%laneid": lambda f: LANES.astype(np.uint32),
    "%lanemask_lt": lambda f: (np.uint32(1) << LANES.astype(np.uint32)) - np.uint32(1),
    "%ctaid.x": lambda f: same(f.warp.cta.number),
    "%nctaid.x": lambda f: same(f.warp.cta.grid.launch.grid),
    "%cluster_ctaid.x": lambda f: same(f.warp.cta.rank),
    "%cluster_ctarank": lambda f: same(f.warp.cta.rank),
    "%cluster_nctaid.x": lambda f: same(len(f.warp.cta.cluster.ctas)),
    "%cluster_nctarank": lambda f: same(len(f.warp.cta.cluster.ctas)),
    "%clusterid.x": lambda f: same(f.warp.cta.number // len(f.warp.cta.cluster.ctas)),
    "%nclusterid.x": lambda f: same(len(f.warp.cta.grid.clusters)),
}


def integer(text: str) -> int:
    return int(text, 0)


class Operands:
    """Compiles operand texts to functions of a fragment."""

    def __init__(self, program: Program, accumulators: set[int], fragments: set[int]):
        """accumulators, fragments: registers that WGMMAs write, and those from which they read."""
        self.program, self.accumulators, self.fragments = program, accumulators, fragments
        self.symbols = {p.name: p.offset for p in program.parameters}

    def source(self, text: str, kind: np.dtype) -> Source:
        """Reads 32 lanes as `kind`; those of the fragment must hold a value."""
        if text in self.program.registers:
            return self._register(self.program.registers[text], kind, text)
        if text in _SPECIAL:
            return _SPECIAL[text]
        value = self.constant(text, kind)
        return lambda f: value

    def stored(self, text: str, kind: np.dtype) -> Source:
        """As `source`, but a 32-bit register may be stored as 16 bits: its low ones."""
        register = self.program.registers.get(text)
        wide = register is not None and self.program.kinds[register].itemsize == 4
        if not wide or kind.itemsize != 2:
            return self.source(text, kind)
        read = self.source(text, U32)
        return lambda f: read(f).view(kind)[::2]

    def constant(self, text: str, kind: np.dtype) -> Lanes:
        number = self._number(text)
        if kind == B:
            return same(number != 0, B)
        return same(number & (1 << 8 * kind.itemsize) - 1, np.dtype(f"u{kind.itemsize}")).view(kind)

    def _number(self, text: str) -> int:
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return int(text[2:], 16)
        if text in self.symbols:
            return self.symbols[text]
        if text.startswith("__dynamic_shmem__"):
            return SHARED_BASE
        if re.fullmatch(r"-?(\d+|0x[0-9a-fA-F]+)", text):
            return integer(text)
        raise ValueError(f"unknown operand {text}")

    def _register(self, number: int, kind: np.dtype, name: str) -> Source:
        if self.program.kinds[number].itemsize != kind.itemsize:
            raise ValueError(f"{name} read as {kind}")

        def read(f: Any) -> Lanes:
            warp, mask = f.warp, f.mask
            if warp.valid[number] & mask != mask:
                self._unreadable(warp, number, name)
            value = warp.values[number]
            return value if value.dtype is kind else value.view(kind)

        def read_accumulator(f: Any) -> Lanes:
            value = read(f)
            f.warp.queue.touched.add(number)
            return value

        return read_accumulator if number in self.accumulators else read

    def _unreadable(self, warp: Any, number: int, name: str) -> None:
        if warp.valid[number] == BUSY:
            raise Fault(f"{name} read while a WGMMA writes it: no wait_group in between")
        raise Fault(f"{name} read before it has a value")

    def sink(self, text: str, kind: np.dtype) -> Sink:
        """Writes the fragment's lanes of a register, as `kind`: whoever reads it converts."""
        if text == "_":
            return lambda f, value: None
        number = self.program.registers[text]
        if self.program.kinds[number].itemsize != kind.itemsize:
            raise ValueError(f"{text} written as {kind}")

        def write(f: Any, value: Lanes) -> None:
            warp = f.warp
            if f.mask == ALL:
                warp.values[number] = value
                warp.valid[number] = ALL
                return
            old = warp.values[number]
            if old is not None:
                value = np.where(f.active, value, old.view(value.dtype))
            warp.values[number] = value
            warp.valid[number] |= f.mask

        def write_accumulator(f: Any, value: Lanes) -> None:
            if f.warp.valid[number] == BUSY:
                raise Fault(f"{text} written while a WGMMA writes it: no wait_group in between")
            f.warp.queue.touched.add(number)
            write(f, value)

        def write_fragment(f: Any, value: Lanes) -> None:
            queue = f.warp.queue
            if queue.read.get(number):
                raise Fault(f"{text} written while a WGMMA reads it: no wait_group in between")
            queue.touched.add(number)
            (write_accumulator if number in self.accumulators else write)(f, value)

        if number in self.fragments:
            return write_fragment
        return write_accumulator if number in self.accumulators else write

    def partial(self, text: str, kind: np.dtype) -> Callable[[Any], tuple[Lanes, int]]:
        """What is only handed on: 32 lanes, and a mask of those that hold a value."""
        read = self.source(text, kind)
        number = self.program.registers.get(text)
        if number is None:
            return lambda f: (read(f), ALL)

        def handed(f: Any) -> tuple[Lanes, int]:
            valid = f.warp.valid[number]
            if valid == BUSY or valid & f.mask == f.mask:
                return read(f), valid
            value = f.warp.values[number]
            return np.zeros(32, kind) if value is None else value.view(kind), valid

        return handed

    def partial_sink(self, text: str, kind: np.dtype) -> Callable[[Any, Lanes, int], None]:
        """Writes what `partial` reads."""
        write = self.sink(text, kind)
        number = self.program.registers.get(text)

        def hand(f: Any, value: Lanes, valid: int) -> None:
            write(f, value)
            if number is not None:
                f.warp.valid[number] &= ~f.mask | valid

        return hand

    def numbers(self, text: str) -> list[int]:
        """Of the registers in braces."""
        return [self.program.registers[name] for name in braced(text)]

    def address(self, text: str, kind: np.dtype = U32) -> Source:
        """[base], [base + offset] or [symbol] -> int64 addresses of 32 lanes."""
        inner = text.strip()[1:-1]
        match = re.fullmatch(r"(.+?)\s*\+\s*(-?\w+)", inner)
        base, offset = (match[1], integer(match[2])) if match else (inner, 0)
        value, more = self.source(base, kind), same(offset, I64)
        if kind == U64:
            return lambda f: value(f).view(I64) + more
        return lambda f: value(f).astype(I64) + more


def braced(text: str) -> list[str]:
    """The names in `{a, b}`, or the one name without braces."""
    return [name.strip() for name in text.strip("{} ").split(",")]
