"""Reads the facts about a kernel from its cubin: ELF sections `.nv.info`, `.nv.info.<symbol>`."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_PARAM_INFO, _FRAME_SIZE, _REGISTERS = (
    0x17,
    0x11,
    0x2F,
)  # EIATTR_KPARAM_INFO, _FRAME_SIZE, _REGCOUNT
_SIZED = 4  # EIFMT_SVAL: the entry's size follows, then its payload


@dataclass(frozen=True)
class CubinFacts:
    """The facts about the kernel of a cubin."""

    symbol: str
    params: tuple[tuple[int, int], ...]  # (offset, size) in bytes, in the kernel's order
    registers: int  # per thread
    local_bytes: int  # per thread, in local memory: spills, and arrays that got no registers


def read_cubin(cubin: bytes) -> CubinFacts:
    """Reads a cubin; raises ValueError unless the bytes are a cubin with exactly one kernel."""
    sections = dict(_sections(cubin))
    kernels = [name[len(".text.") :] for name in sections if name.startswith(".text.")]
    if len(kernels) != 1:
        raise ValueError(f"a cubin must have exactly one kernel, got {len(kernels)}")
    symbol = kernels[0]
    params = {}
    for attribute, payload in _info(sections[f".nv.info.{symbol}"]):
        if attribute == _PARAM_INFO:
            _, ordinal, offset, packed = struct.unpack("<IHHI", payload)
            params[ordinal] = (offset, packed >> 18)
    facts = {
        attribute: struct.unpack("<II", payload)[1]
        for attribute, payload in _info(sections[".nv.info"])
        if attribute in (_FRAME_SIZE, _REGISTERS)
    }
    ordered = tuple(params[ordinal] for ordinal in sorted(params))
    return CubinFacts(symbol, ordered, facts[_REGISTERS], facts[_FRAME_SIZE])


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    if elf[:4] != b"\x7fELF" or len(elf) < 64:
        raise ValueError(f"a cubin must be an ELF file, got {len(elf)} bytes from {elf[:4]!r} on")
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_size, count, names_at = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * entry_size) for i in range(count)]
    names = elf[headers[names_at][4] :]
    for name, kind, _, _, offset, size in headers:
        no_bits = kind == 8
        yield (
            names[name : names.index(b"\0", name)].decode(),
            b"" if no_bits else elf[offset : offset + size],
        )


def _info(section: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position < len(section):
        form, attribute, size = struct.unpack_from("<BBH", section, position)
        position += 4
        if form == _SIZED:
            yield attribute, section[position : position + size]
            position += size
