"""Arithmetic: one table from opcodes to NumPy functions over 32 lanes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from tests.ptxsim.operands import (
    F32,
    I32,
    I64,
    LANES,
    U16,
    U32,
    U64,
    B,
    Op,
    Operands,
    braced,
    same,
)
from tests.ptxsim.order import some
from tests.ptxsim.ptx import Fault, Instruction

Function = Callable[..., np.ndarray]
_ONE, _SEVEN, _SIXTEEN, _HALF, _SIGNS = map(np.uint32, (1, 7, 16, 0x7FFF, 0x8888))
_NIBBLES = np.array([0, 4, 8, 12], np.uint32)


def _shift(function: Function, bits: int) -> Function:
    """Shifts by the register's width or more give 0, of negative numbers -1."""

    def shift(a: np.ndarray, by: np.ndarray) -> np.ndarray:
        near = function(a, np.minimum(by, bits - 1).astype(a.dtype))
        return near if a.dtype.kind == "i" else np.where(by < bits, near, a.dtype.type(0))

    return shift


def _high(wide: type, narrow: type) -> Function:
    return lambda a, b: (a.astype(wide) * b.astype(wide) >> wide(32)).astype(narrow)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Rounded once: the float64 sum is made odd where it is inexact, then rounded."""
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    if not some(error != 0):
        return total.astype(np.float32)
    inexact = np.isfinite(total) & (error != 0)
    down = np.where(inexact & ((error < 0) == (total > 0)), np.nextafter(total, 0), total)
    odd = np.where(inexact, (down.view(np.uint64) | np.uint64(1)).view(np.float64), total)
    return odd.astype(np.float32)


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> uint32 holding bf16, to nearest even."""
    bits = values.view(np.uint32)
    rounded = bits + _HALF + (bits >> _SIXTEEN & _ONE) >> _SIXTEEN
    return _numbers_only(values, rounded)


def _f16_bits(values: np.ndarray) -> np.ndarray:
    return _numbers_only(values, values.astype(np.float16).view(np.uint16).astype(np.uint32))


def _numbers_only(values: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """NaNs have one pattern."""
    nan = values != values
    return np.where(nan, np.uint32(0x7FFF), bits) if some(nan) else bits


def _pack(convert: Function) -> Function:
    return lambda high, low: convert(high) << _SIXTEEN | convert(low)


def _fp8_bits(dtype: torch.dtype, largest: float) -> Function:
    """Pairs; saturating, NaN without its sign."""

    def convert(values: np.ndarray) -> np.ndarray:
        bits = torch.from_numpy(values).clamp(-largest, largest).to(dtype).view(torch.uint8)
        return np.where(np.isnan(values), 0x7F, bits.numpy()).astype(np.uint16)

    return lambda high, low: convert(high) << np.uint16(8) | convert(low)


def _pairs_of_bf16(function: Function) -> Function:
    """On two bf16 at a time: computed exactly, as float64 can, and rounded once."""

    def apply(*pairs: np.ndarray) -> np.ndarray:
        halves = [pair.view(np.uint16) for pair in pairs]
        exact = function(*(_wide(half).astype(np.float64) for half in halves))
        rounded = exact.astype(np.float32)
        if some(rounded != exact):
            raise Fault("a packed bf16 result that float32 does not hold: not modelled")
        return bf16_bits(rounded).astype(np.uint16).view(np.uint32)

    return apply


# Functions of the bits of a and b, by the results for (a, b) = (0, 0), (0, 1), (1, 0), (1, 1).
_PAIRS: dict[tuple[int, ...], Function] = {
    (0, 0, 0, 0): lambda a, b: same(0),
    (0, 0, 0, 1): np.bitwise_and,
    (0, 0, 1, 0): lambda a, b: a & ~b,
    (0, 0, 1, 1): lambda a, b: a,
    (0, 1, 0, 0): lambda a, b: ~a & b,
    (0, 1, 0, 1): lambda a, b: b,
    (0, 1, 1, 0): np.bitwise_xor,
    (0, 1, 1, 1): np.bitwise_or,
}


def _logic_of_pairs(results: list[int]) -> Function:
    if results[0] == 0:
        return _PAIRS[tuple(results)]
    opposite = _PAIRS[tuple(1 - result for result in results)]
    return lambda a, b: ~opposite(a, b)


@lru_cache
def _logic_of(table: int) -> Function:
    """A function of a, b and c whose bits are the table's at the numbers that theirs make."""
    bits = [table >> i & 1 for i in range(8)]
    alone = _logic_of_pairs(bits[::2])  # where c is 0
    if bits[::2] == bits[1::2]:
        return lambda a, b, c: alone(a, b)
    changed = _logic_of_pairs([x ^ y for x, y in zip(bits[::2], bits[1::2], strict=True)])
    return lambda a, b, c: alone(a, b) ^ (changed(a, b) & c)


def _logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    return _logic_of(int(table[0]))(a, b, c)


def _funnel(low: np.ndarray, high: np.ndarray, by: np.ndarray) -> np.ndarray:
    pair = high.astype(np.uint64) << np.uint64(32) | low
    return (pair >> (by & np.uint32(31)).astype(np.uint64)).astype(np.uint32)


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Bytes of b, a, each by 3 bits of its 4 in the selector; the fourth replicates a sign."""
    if some(selector & _SIGNS != 0):
        raise Fault(f"prmt with selector {int(selector[0]):#x}: signs are not modelled")
    pairs = np.stack([a, b], axis=1).view(np.uint8)
    which = selector[:, None] >> _NIBBLES & _SEVEN
    return pairs[LANES[:, None], which].view(np.uint32)[:, 0]


def _quietly(function: Function) -> Function:
    """Division by zero and of infinities has a value."""

    def divide(*operands: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return function(*operands)

    return divide


def _popcount(a: np.ndarray) -> np.ndarray:
    return np.unpackbits(a.view(np.uint8).reshape(-1, 4), axis=1).sum(axis=1).astype(np.uint32)


def _select(a: np.ndarray, b: np.ndarray, p: np.ndarray) -> np.ndarray:
    return np.where(p, a, b)


def _wide(a: np.ndarray) -> np.ndarray:
    """bf16 -> float32"""
    return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _unordered(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.isnan(a) | np.isnan(b)


def _exp2(a: np.ndarray) -> np.ndarray:
    """Rounded once, where the hardware may err in the last two bits; subnormals become 0."""
    power = np.exp2(a.astype(np.float64)).astype(np.float32)
    return np.where(power < np.finfo(np.float32).tiny, np.float32(0), power)


# opcode: (function, kind of the result, kinds of the operands)
_TABLE: dict[str, tuple[Function, np.dtype, tuple[np.dtype, ...]]] = {
    "mul.wide.s32": (lambda a, b: a.astype(np.int64) * b.astype(np.int64), I64, (I32, I32)),
    "mul.wide.u32": (lambda a, b: a.astype(np.uint64) * b.astype(np.uint64), U64, (U32, U32)),
    "mul.lo.s32": (np.multiply, U32, (U32, U32)),  # the low half has no sign
    "mul.hi.s32": (_high(np.int64, np.int32), I32, (I32, I32)),
    "mul.hi.u32": (_high(np.uint64, np.uint32), U32, (U32, U32)),
    "mad.lo.s32": (lambda a, b, c: a * b + c, U32, (U32, U32, U32)),
    "mad.lo.s64": (lambda a, b, c: a * b + c, U64, (U64, U64, U64)),
    "mul.lo.s64": (np.multiply, U64, (U64, U64)),
    "abs.f32": (np.abs, F32, (F32,)),
    "neg.f32": (np.negative, F32, (F32,)),
    "max.NaN.f32": (np.maximum, F32, (F32, F32)),
    "min.NaN.f32": (np.minimum, F32, (F32, F32)),
    "ex2.approx.ftz.f32": (np.exp2, F32, (F32,)),  # exactly rounded: the GPU's is within 2 ulp
    "rcp.approx.ftz.f32": (np.reciprocal, F32, (F32,)),
    "fma.rn.f32": (fma, F32, (F32, F32, F32)),
    "div.rn.f32": (_quietly(np.divide), F32, (F32, F32)),
    "rcp.rn.f32": (_quietly(lambda a: np.float32(1.0) / a), F32, (F32,)),
    "cvt.rn.satfinite.e4m3x2.f32": (_fp8_bits(torch.float8_e4m3fn, 448.0), U16, (F32, F32)),
    "cvt.rn.satfinite.e5m2x2.f32": (_fp8_bits(torch.float8_e5m2, 57344.0), U16, (F32, F32)),
    "setp.eq.f32": (np.equal, B, (F32, F32)),
    "prmt.b32": (_permute, U32, (U32, U32, U32)),
    "shf.r.wrap.b32": (_funnel, U32, (U32, U32, U32)),
    "lop3.b32": (_logic, U32, (U32, U32, U32, U32)),
    "add.rn.bf16x2": (_pairs_of_bf16(np.add), U32, (U32, U32)),
    "mul.rn.bf16x2": (_pairs_of_bf16(np.multiply), U32, (U32, U32)),
    "fma.rn.bf16x2": (_pairs_of_bf16(lambda a, b, c: a * b + c), U32, (U32, U32, U32)),
    "not.pred": (np.logical_not, B, (B,)),
    "not.b32": (np.invert, U32, (U32,)),
    "neg.s32": (np.negative, I32, (I32,)),
    "max.relu.s32": (lambda a, b: np.maximum(np.maximum(a, b), np.int32(0)), I32, (I32, I32)),
    "setp.nan.f32": (_unordered, B, (F32, F32)),
    "setp.nan.bf16": (lambda a, b: _unordered(_wide(a), _wide(b)), B, (U16, U16)),
    "popc.b32": (_popcount, U32, (U32,)),
    "cvt.u64.u32": (lambda a: a.astype(np.uint64), U64, (U32,)),
    "cvt.s64.s32": (lambda a: a.astype(np.int64), I64, (I32,)),
    "cvt.u32.u64": (lambda a: a.astype(np.uint32), U32, (U64,)),
    "cvt.rn.f32.s32": (lambda a: a.astype(np.float32), F32, (I32,)),
    "cvt.f32.f16": (lambda a: a.view(np.float16).astype(np.float32), F32, (U16,)),
    "cvt.f32.bf16": (_wide, F32, (U16,)),
    "cvt.rn.bf16x2.f32": (_pack(bf16_bits), U32, (F32, F32)),
    "cvt.rn.f16x2.f32": (_pack(_f16_bits), U32, (F32, F32)),
}
_SHIFTS: dict[str, tuple[Function, np.dtype]] = {
    "shl.b32": (np.left_shift, U32),
    "shl.b64": (np.left_shift, U64),
    "shr.u32": (np.right_shift, U32),
    "shr.s32": (np.right_shift, I32),
    "shr.u64": (np.right_shift, U64),
}
for _name, (_shifted, _kind) in _SHIFTS.items():
    _TABLE[_name] = (_shift(_shifted, 8 * _kind.itemsize), _kind, (_kind, U32))
_op: str
_function: Function
for _name, _kind in {"s32": I32, "u32": U32, "s64": I64, "u64": U64}.items():
    for _op, _function in {"min": np.minimum, "max": np.maximum}.items():
        _TABLE[f"{_op}.{_name}"] = (_function, _kind, (_kind, _kind))
for _name, _kind in {"s32": U32, "u32": U32, "s64": U64, "u64": U64}.items():
    for _op, _function in {"add": np.add, "sub": np.subtract}.items():  # the same of both signs
        _TABLE[f"{_op}.{_name}"] = (_function, _kind, (_kind, _kind))
for _op, _function in {"add": np.add, "sub": np.subtract, "mul": np.multiply}.items():
    _TABLE[f"{_op}.f32"] = (_function, F32, (F32, F32))
for _name, _kind in {"pred": B, "b32": U32, "b64": U64}.items():
    for _op, _function in {
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }.items():
        _TABLE[f"{_op}.{_name}"] = (_function, _kind, (_kind, _kind))
for _name, _kind in {"b16": U16, "b32": U32, "b64": U64, "f32": F32}.items():
    _TABLE[f"selp.{_name}"] = (_select, _kind, (_kind, _kind, B))
_COMPARES = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_COMPARED = {"s32": I32, "u32": U32, "b32": U32, "s64": I64, "u64": U64, "b64": U64, "f32": F32}
for _op, _function in _COMPARES.items():
    for _name, _kind in _COMPARED.items():
        _TABLE[f"setp.{_op}.{_name}"] = (_function, B, (_kind, _kind))
_MOVES = {"pred": B, "b16": U16, "u16": U16, "b32": U32, "u32": U32, "f32": U32, "b64": U64}


def build(one: Instruction, operands: Operands) -> Op | None:
    """None where the opcode is not arithmetic."""
    if one.opcode in _TABLE:
        function, kind, kinds = _TABLE[one.opcode]
        if len(one.operands) != 1 + len(kinds):
            raise ValueError(f"{one.where()}: {len(kinds)} operands expected")
        by = one.operands[2] if one.opcode in _SHIFTS else ""
        if by.isdecimal() and int(by) < 8 * kind.itemsize:
            function, kinds = _SHIFTS[one.opcode][0], (kind, kind)
        put = operands.sink(one.operands[0], kind)
        sources = [operands.source(t, k) for t, k in zip(one.operands[1:], kinds, strict=True)]
        return _applied(function, put, sources)
    if one.opcode.startswith("mov.") and one.opcode[4:] in _MOVES:
        return _move(one, operands, _MOVES[one.opcode[4:]])
    if one.opcode == "div.s32":
        return _divide(one, operands)
    return None


def _applied(function: Function, put: Callable, sources: list[Callable]) -> Op:
    if len(sources) == 1:
        (a,) = sources
        return lambda f: put(f, function(a(f)))
    if len(sources) == 2:
        a, b = sources
        return lambda f: put(f, function(a(f), b(f)))
    a, b, c, *more = sources
    return lambda f: put(f, function(a(f), b(f), c(f), *[source(f) for source in more]))


def _move(one: Instruction, operands: Operands, kind: np.dtype) -> Op:
    """Also between a register and the two halves of it in braces; the low half comes first."""
    to, source = one.operands
    half = {4: U16, 8: U32}.get(kind.itemsize, U16)
    if to.startswith("{"):
        puts = [operands.sink(name, half) for name in braced(to)]
        read = operands.source(source, kind)

        def split(f: Any) -> None:
            parts = np.ascontiguousarray(read(f)).view(half).reshape(32, 2)
            for i, put in enumerate(puts):
                put(f, parts[:, i].copy())

        return split
    if source.startswith("{"):
        put = operands.sink(to, kind)
        low, high = (operands.source(name, half) for name in braced(source))

        def join(f: Any) -> None:
            parts = np.empty((32, 2), half)
            parts[:, 0], parts[:, 1] = low(f), high(f)
            put(f, parts.view(kind)[:, 0])

        return join
    hand, handed = operands.partial_sink(to, kind), operands.partial(source, kind)
    return lambda f: hand(f, *handed(f))


def _divide(one: Instruction, operands: Operands) -> Op:
    put = operands.sink(one.operands[0], I32)
    a, b = (operands.source(name, I32) for name in one.operands[1:])

    def divide(f: Any) -> None:
        over, under = a(f).astype(np.int64), b(f).astype(np.int64)
        if (under[f.lanes] == 0).any():
            raise Fault("division by zero")
        under = np.where(under == 0, 1, under)
        quotient = np.abs(over) // np.abs(under) * np.sign(over) * np.sign(under)
        put(f, quotient.astype(np.int32))

    return divide
