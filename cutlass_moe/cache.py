"""Where kernel images wait between processes: directories of cubins and launch records.

A root holds <root>/<arch>/<key>/{kernel.cubin, launch.json}, and <root>/.work: locks, half-written
and damaged entries. Nothing here knows what a kernel computes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from emitters.image import Image, LaunchRecord

CUBIN = "kernel.cubin"
RECORD = "launch.json"
WORK = ".work"
LOCK_SECONDS = 300.0  # longer than any build: beyond it, the holder of a lock hangs


class MissingImage(LookupError):
    """An image is in no root, and may not be built here."""


class DamagedImage(ValueError):
    """An entry of a root is incomplete or is not what was written."""


@dataclass(frozen=True)
class Entry:
    """One image on disk."""

    root: Path
    arch: str
    key: str
    record: LaunchRecord


class Cache:
    """Images by (arch, key): a dictionary in memory before one or more directories.

    Roots are searched in order. All but the last are only read; the last one is written to where
    the file system allows it. A read-only root serves every build of this image ABI; a root that
    can be written serves exactly the build asked for and replaces others. Threads and processes may
    share roots freely.
    """

    def __init__(self, roots: Sequence[str | os.PathLike[str]]) -> None:
        if isinstance(roots, (str, os.PathLike)) or not roots:
            raise ValueError(f"expected a list of one or more directories, got {roots!r}")
        self.roots = tuple(Path(root).expanduser().absolute() for root in roots)
        self._memory: dict[tuple[str, str, str | None], Image] = {}

    @property
    def root(self) -> Path:
        """The root that is written to."""
        return self.roots[-1]

    @property
    def writable(self) -> bool:
        """Whether this process may create or change files in `root`."""
        existing = next(p for p in (self.root, *self.root.parents) if os.path.exists(p))
        return os.access(existing, os.W_OK)

    def load(self, arch: str, key: str, build: str | None = None) -> Image | None:
        """The image, or None; waits for a process that is building it.

        build: the build identity that the writable root's image must have; None takes any.
        """
        image = self._find(arch, key, build)
        if image is None and os.path.exists(self._lock_path(arch, key)):
            with self._locked(arch, key):  # it may be being built, or replaced
                image = self._find(arch, key, build)
        return image

    def load_or_build(
        self, arch: str, key: str, build: Callable[[], Image], build_identity: str
    ) -> Image:
        """The image, from `build()` where no root has it: of many callers, one builds.

        Raises what `build` raises, and ValueError where it returns an image of another build or
        arch. An image that can't be written to disk is returned all the same, with a warning.
        """
        image = self._find(arch, key, build_identity)
        if image is not None:
            return image
        with self._locked(arch, key):
            image = self._find(arch, key, build_identity)  # built while we waited?
            if image is None:
                image = build()
                got = (image.record.arch, image.record.build)
                if got != (arch, build_identity):
                    raise ValueError(f"expected an image of {(arch, build_identity)}, got {got}")
                try:
                    self._write(arch, key, image)
                except OSError as error:
                    warnings.warn(
                        f"image {key} stays in memory: {error}", RuntimeWarning, stacklevel=2
                    )
                self._memory[arch, key, build_identity] = image
        return image

    def store(self, arch: str, key: str, image: Image) -> None:
        """Writes an image into the writable root, in place of what is there. Raises OSError."""
        with self._locked(arch, key):
            self._write(arch, key, image)

    def entries(self) -> Iterator[Entry]:
        """Every sound image of every root."""
        for root in self.roots:
            for path in sorted(root.glob(f"[!.]*/*/{RECORD}")):
                arch, key = path.parts[-3:-1]
                image = _read_or_warn(root, arch, key)
                if image is not None:
                    yield Entry(root, arch, key, image.record)

    def clear(self) -> int:
        """Forgets what is in memory, empties the writable root and returns how many it had."""
        self._memory.clear()
        files = [path for name in (CUBIN, RECORD) for path in self.root.glob(f"[!.]*/*/{name}")]
        entries = {path.parent for path in files}
        for entry in entries:
            self._set_aside(entry, "old")
        if (self.root / WORK).exists():
            shutil.rmtree(self.root / WORK)
        return len(entries)

    def _find(self, arch: str, key: str, build: str | None) -> Image | None:
        image = self._memory.get((arch, key, build))
        if image is not None:
            return image
        exact = self.root if build is not None and self.writable else None
        for root in self.roots:
            image = _read_or_warn(root, arch, key)
            if image is not None and (root != exact or image.record.build == build):
                self._memory[arch, key, build] = image
                return image
        return None

    def _write(self, arch: str, key: str, image: Image) -> None:
        entry = self.root / arch / key
        fresh = self._work_path("new", entry)
        fresh.mkdir(parents=True)
        record = json.loads(image.record.to_json())
        sealed = {**record, "seal": _seal(arch, key, record)}
        text = json.dumps(sealed, indent=1, sort_keys=True) + "\n"
        try:
            _write_file(fresh / CUBIN, image.cubin)
            _write_file(fresh / RECORD, text.encode())
            _sync_directory(fresh)
            entry.parent.mkdir(parents=True, exist_ok=True)
            if entry.exists():
                sound = _read_or_warn(self.root, arch, key) is not None
                self._set_aside(entry, "old" if sound else "damaged")
            try:
                fresh.rename(entry)
            except OSError:
                if not entry.exists():  # else one without a lock was faster: its image is as good
                    raise
            _sync_directory(entry.parent)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)  # what a failure or a lost race left

    def _set_aside(self, entry: Path, kind: str) -> None:
        aside = self._work_path(kind, entry)
        aside.parent.mkdir(parents=True, exist_ok=True)
        entry.rename(aside)
        if kind == "old":
            shutil.rmtree(aside)

    def _work_path(self, kind: str, entry: Path) -> Path:
        return self.root / WORK / kind / f"{entry.parent.name}-{entry.name}-{secrets.token_hex(8)}"

    def _lock_path(self, arch: str, key: str) -> Path:
        return self.root / WORK / "locks" / f"{arch}-{key}"

    @contextmanager
    def _locked(self, arch: str, key: str) -> Iterator[None]:
        """Keeps others from building the same image. The kernel drops a dead holder's lock.

        Without a lock (read-only root, file system without locks, hanging holder) work goes on: it
        is only done twice, since entries appear whole by renaming.
        """
        path = self._lock_path(arch, key)
        lock = FileLock(path, timeout=LOCK_SECONDS)
        if self.writable:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire()
            except (OSError, NotImplementedError) as error:
                warnings.warn(f"no lock for image {key}: {error}", RuntimeWarning, stacklevel=4)
        try:
            yield
        finally:
            lock.release()


def default_cache() -> Cache:
    """The cache of this process.

    Roots: CUTLASS_MOE_CACHE_DIR, a list like PATH, the last one writable; without that variable
    `cutlass_moe` in XDG_CACHE_HOME or ~/.cache.
    """
    roots = tuple(filter(None, os.environ.get("CUTLASS_MOE_CACHE_DIR", "").split(os.pathsep)))
    if not roots:
        home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        roots = (str(home / "cutlass_moe"),)
    return _cache_of(roots)


@functools.cache
def _cache_of(roots: tuple[str, ...]) -> Cache:
    return Cache(roots)


def _read_or_warn(root: Path, arch: str, key: str) -> Image | None:
    try:
        return _read(root / arch / key)
    except DamagedImage as error:
        warnings.warn(f"damaged image skipped: {error}", RuntimeWarning, stacklevel=4)
        return None


def _read(entry: Path) -> Image | None:
    """The image of an entry, None where there is no entry. Raises DamagedImage."""
    arch, key = entry.parts[-2:]
    try:
        plain = json.loads((entry / RECORD).read_bytes())
        cubin = (entry / CUBIN).read_bytes()
        if not isinstance(plain, dict) or plain.pop("seal", None) != _seal(arch, key, plain):
            raise ValueError(f"{RECORD} is not what was written")
        record = LaunchRecord.from_json(json.dumps(plain))
        if hashlib.sha256(cubin).hexdigest() != record.cubin_sha256:
            raise ValueError(f"{CUBIN} of {len(cubin)} bytes is not what was written")
    except (OSError, ValueError) as error:
        if not os.path.exists(entry):
            return None
        raise DamagedImage(f"{entry}: {error}") from error
    return Image(cubin, record)


def _seal(arch: str, key: str, record: dict[str, Any]) -> str:
    """Binds a launch record to its place: sha256 over both."""
    text = json.dumps([arch, key, record], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _write_file(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
