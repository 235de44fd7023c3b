"""Archives: all images of a directory in one file, read in place.

A zip file without compression, whose members are <arch>/<key>/{kernel.cubin, launch.json} and
nothing else. Equal images make equal bytes.
"""

from __future__ import annotations

import os
import re
import secrets
import struct
import threading
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cutlass_moe.images.roots import (
    CUBIN,
    PLACE,
    RECORD,
    DamagedImage,
    Directory,
    Files,
    files_of,
    read_current,
    require_trust,
    sync_directory,
)
from emitters.spec.image import Image

SUFFIX = ".zip"
_MEMBER = re.compile(rf"{PLACE.pattern}/({re.escape(CUBIN)}|{re.escape(RECORD)})")
_LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of name and extra field; the data follow them
_OLDEST = (1980, 1, 1, 0, 0, 0)  # the first date of zip files: that of packing would show in bytes


class _Extent(NamedTuple):
    """Where a member's header begins and how much it holds, in bytes."""

    header: int
    size: int


class Archive:
    """The images of an archive. Thread-safe, and so is a fork: reads share no position.

    The file is opened at the first use and kept: a file that takes its name later is not seen.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._members: dict[str, _Extent] = {}
        self._descriptor = -1

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def names(self) -> list[tuple[str, str]]:
        self._open()
        return sorted({(arch, key) for arch, key, _ in (name.split("/") for name in self._members)})

    def files(self, arch: str, key: str) -> Files | None:
        self._open()
        members = [self._members.get(f"{arch}/{key}/{name}") for name in (RECORD, CUBIN)]
        if members == [None, None]:
            return None
        try:
            return Files(*map(self._read, members))
        except (OSError, ValueError) as error:
            raise DamagedImage(f"{self.path}: {arch}/{key}: {error}") from error

    def _open(self) -> None:
        with self._lock:
            if self._descriptor >= 0:
                return
            try:
                with open(self.path, "rb") as file:
                    require_trust(self.path, os.fstat(file.fileno()))
                    with zipfile.ZipFile(file) as archive:
                        self._members = _members(archive.infolist(), file.seek(0, os.SEEK_END))
                    self._descriptor = os.dup(file.fileno())
            except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
                raise DamagedImage(f"{self.path}: {error}") from error

    def _read(self, member: _Extent | None) -> bytes:
        if member is None:
            raise ValueError(f"expected both {RECORD} and {CUBIN}, got one of them")
        header = os.pread(self._descriptor, _LOCAL_HEADER.size, member.header)
        if len(header) < _LOCAL_HEADER.size:
            raise ValueError("the archive ends early")
        begin = member.header + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header))
        return os.pread(self._descriptor, member.size, begin)  # what is too short fails its hash


def pack(directory: Path, archive: Path) -> int:
    """Writes all images of a directory into an archive and returns how many there are.

    Those of another image ABI, which other versions left there, stay behind. Raises ValueError
    where there are no others, DamagedImage, UntrustedRoot, and OSError; what had the archive's name
    then stays.
    """
    root = Directory(Path(directory))
    count = write(archive, read_current(root, root.names()))
    if not count:
        raise ValueError(f"{directory} must hold images of this version, but it has none")
    return count


def write(archive: Path, images: Iterable[tuple[str, str, Image]]) -> int:
    """Writes (arch, key, image), in order, into an archive and returns how many there were.

    It appears whole, in place of what had its name; not at all without an image, or where something
    is raised: OSError, or what `images` raises.
    """
    path = Path(archive).expanduser().absolute()
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    count = 0
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as members:
                for arch, key, image in images:
                    files = files_of(arch, key, image)
                    members.writestr(_member(arch, key, CUBIN), files.cubin)
                    members.writestr(_member(arch, key, RECORD), files.record)
                    count += 1
            file.flush()
            os.fsync(descriptor)
        if count:
            os.replace(fresh, path)
            sync_directory(path.parent)
    finally:
        fresh.unlink(missing_ok=True)
    return count


def _member(arch: str, key: str, name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(f"{arch}/{key}/{name}", _OLDEST)
    member.create_system = 3  # Unix, whatever this is
    member.external_attr = 0o644 << 16
    return member


def _members(infos: list[zipfile.ZipInfo], size: int) -> dict[str, _Extent]:
    """Where each member of an archive of `size` bytes lies.

    Raises ValueError where one isn't a file of an image, stored as it is.
    """
    for info in infos:
        if not _MEMBER.fullmatch(info.filename):
            raise ValueError(f"not an archive of images: it has a member {info.filename!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(f"{info.filename} is compressed or encrypted: use `cutlass-moe pack`")
        if not 0 <= info.header_offset <= info.header_offset + info.file_size <= size:
            raise ValueError(f"{info.filename} ends beyond the archive")
    members = {info.filename: _Extent(info.header_offset, info.file_size) for info in infos}
    if len(members) < len(infos):
        raise ValueError("a member appears twice")
    return members
