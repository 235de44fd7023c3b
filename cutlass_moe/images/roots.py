"""Images in files: how an image is written down, the directory that holds images, whom to trust.

An image is two files, <arch>/<key>/{kernel.cubin, launch.json}, in a directory or in an archive
(`cutlass_moe.archive`). launch.json holds the cubin's sha256 and a seal, the sha256 of everything
else in it and of its place. Hashes find damage; against malice stands the rule that only the owner
of a root may write to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cutlass_moe.environment import TRUST_ROOT
from emitters.spec.image import Image, LaunchRecord, OtherAbi

CUBIN = "kernel.cubin"
RECORD = "launch.json"
PLACE = re.compile(r"(sm_\d+[a-z]?)/([0-9a-f]{64})")  # arch and key


class DamagedImage(ValueError):
    """An image, or a whole archive, is incomplete or is not what was written."""


class OutdatedImage(DamagedImage):
    """An image is of another ABI: whole, but only for other versions of this package."""


class UntrustedRoot(RuntimeError):
    """Others could have written the code in a root."""


class Files(NamedTuple):
    """The contents of an image's files."""

    record: bytes
    cubin: bytes


@dataclass(frozen=True)
class Entry:
    """One image of a root. cubin_bytes: the size of its cubin."""

    root: Path
    arch: str
    key: str
    record: LaunchRecord
    cubin_bytes: int


NamedImage = tuple[str, str, Image]  # arch, key, image


class Root(Protocol):
    """A place where images are read."""

    path: Path

    def names(self) -> list[tuple[str, str]]:
        """(arch, key) of every image, sound or not, in order. Raises DamagedImage."""

    def files(self, arch: str, key: str) -> Files | None:
        """What is there, or None. Raises DamagedImage, UntrustedRoot."""


class Directory:
    """The images of a directory, which others may be writing to or emptying."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[tuple[str, str]]:
        places = (PLACE.fullmatch("/".join(p.parts[-2:])) for p in self.path.glob("sm_*/*"))
        return sorted((place[1], place[2]) for place in places if place)

    def files(self, arch: str, key: str) -> Files | None:
        place = self.path / arch / key
        while True:
            try:
                require_trust(self.path, os.stat(self.path))
                directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise DamagedImage(f"{self.path}: {arch}/{key}: {error}") from error
            try:  # both files of one generation, whatever is renamed meanwhile
                return Files(*(_read_file(place / name, directory) for name in (RECORD, CUBIN)))
            except OSError as error:
                if _is_at(directory, place):
                    raise DamagedImage(f"{self.path}: {arch}/{key}: {error}") from error
            finally:
                os.close(directory)


class Nowhere:
    """No images: in the place of a directory that can't be used."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[tuple[str, str]]:
        return []

    def files(self, arch: str, key: str) -> Files | None:
        return None


def read_image(root: Root, arch: str, key: str) -> Image | None:
    """An image that is what was written, or None. Raises DamagedImage, UntrustedRoot."""
    files = root.files(arch, key)
    if files is None:
        return None
    try:
        return image_of(arch, key, files)
    except OtherAbi as error:
        raise OutdatedImage(f"{root.path}: {arch}/{key}: {error}") from error
    except ValueError as error:
        raise DamagedImage(f"{root.path}: {arch}/{key}: {error}") from error


def read_current(root: Root, names: Iterable[tuple[str, str]]) -> Iterator[NamedImage]:
    """Those of the named images that this version's kernels can be: (arch, key, image).

    Images of another ABI, and those that were removed meanwhile, are left out. Raises DamagedImage,
    UntrustedRoot.
    """
    for arch, key in names:
        with suppress(OutdatedImage):
            image = read_image(root, arch, key)
            if image is not None:
                yield arch, key, image


def files_of(arch: str, key: str, image: Image) -> Files:
    """An image as it is written at a place: the same image gives the same bytes."""
    record = json.loads(image.record.to_json())
    sealed = {**record, "seal": _seal(arch, key, record)}
    text = json.dumps(sealed, indent=1, sort_keys=True) + "\n"
    return Files(text.encode(), image.cubin)


def image_of(arch: str, key: str, files: Files) -> Image:
    """Inverse of `files_of`. Raises ValueError where a file is not what was written there."""
    plain = json.loads(files.record)
    if not isinstance(plain, dict) or plain.pop("seal", None) != _seal(arch, key, plain):
        raise ValueError(f"{RECORD} is not what was written")
    record = LaunchRecord.from_json(json.dumps(plain))
    if hashlib.sha256(files.cubin).hexdigest() != record.cubin_sha256:
        raise ValueError(f"{CUBIN} of {len(files.cubin)} bytes is not what was written")
    return Image(files.cubin, record)


def require_trust(path: Path, status: os.stat_result) -> None:
    """Raises UntrustedRoot where others than this user and root can write a file or directory.

    CUTLASS_MOE_TRUST_ROOT=1 trusts them.
    """
    user = os.geteuid()
    if TRUST_ROOT.on():
        return
    if status.st_uid not in (0, user):
        why = f"belongs to user {status.st_uid}, expected {user} (this process's) or 0"
    elif status.st_mode & 0o022:
        why = f"can be written by others (mode {status.st_mode & 0o7777:o}): chmod -R go-w {path}"
    else:
        return
    raise UntrustedRoot(
        f"images are code, and {path} {why}. Set {TRUST_ROOT.name}=1 to trust all who can write "
        "there"
    )


def make_directory(path: Path) -> None:
    """Makes a directory and its parents, which others may not write to, whatever the umask."""
    for directory in (*reversed(path.parents), path):
        if not directory.exists():
            directory.mkdir(mode=0o755, exist_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Writes a new file, which others may not write to, and returns once it is on disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def sync_directory(path: Path) -> None:
    """Returns once the names in a directory are on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_file(path: Path, directory: int) -> bytes:
    descriptor = os.open(path.name, os.O_RDONLY, dir_fd=directory)
    with os.fdopen(descriptor, "rb") as file:
        require_trust(path, os.fstat(descriptor))
        return file.read()


def _is_at(directory: int, place: Path) -> bool:
    """Whether an open directory is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(directory), os.stat(place))
    except OSError:
        return False


def _seal(arch: str, key: str, record: dict[str, Any]) -> str:
    text = json.dumps([arch, key, record], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
