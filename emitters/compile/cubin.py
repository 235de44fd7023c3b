"""What a cubin says of its kernel, in its ELF sections `.nv.info` and `.nv.info.<symbol>`."""

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
    """Of a cubin with one kernel. params: (offset, size) in bytes, in the kernel's order."""

    symbol: str
    params: tuple[tuple[int, int], ...]
    registers: int
    local_bytes: int  # a thread's frame in local memory: spills, or arrays that found no registers


def read_cubin(cubin: bytes) -> CubinFacts:
    """Raises ValueError where the bytes are not a cubin with exactly one kernel."""
    sections = dict(_sections(cubin))
    kernels = [name[len(".text.") :] for name in sections if name.startswith(".text.")]
    if len(kernels) != 1:
        raise ValueError(f"expected a cubin with one kernel, got {len(kernels)}")
    symbol = kernels[0]
    params = {}
    for attribute, payload in _info(sections[f".nv.info.{symbol}"]):
        if attribute == _PARAM_INFO:
            _, ordinal, offset, packed = struct.unpack("<IHHI", payload)
            params[ordinal] = (offset, packed >> 18)
    of_kernel = {
        attribute: struct.unpack("<II", payload)[1]
        for attribute, payload in _info(sections[".nv.info"])
        if attribute in (_FRAME_SIZE, _REGISTERS)
    }
    ordered = tuple(params[ordinal] for ordinal in sorted(params))
    return CubinFacts(symbol, ordered, of_kernel[_REGISTERS], of_kernel[_FRAME_SIZE])


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    if elf[:4] != b"\x7fELF" or len(elf) < 64:
        raise ValueError("not an ELF file")
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
    at = 0
    while at < len(section):
        form, attribute, size = struct.unpack_from("<BBH", section, at)
        at += 4
        if form == _SIZED:
            yield attribute, section[at : at + size]
            at += size
