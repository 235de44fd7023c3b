"""Where kernel images wait between processes: roots, searched in order, of which one is written to.

A directory holds <arch>/<key>/{kernel.cubin, launch.json}, and in .work locks, half-written and
damaged images, and images of other builds. Nothing here knows what a kernel computes.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from cutlass_moe.environment import CACHE_DIR
from cutlass_moe.images.archive import SUFFIX, Archive
from cutlass_moe.images.roots import (
    CUBIN,
    RECORD,
    DamagedImage,
    Directory,
    Entry,
    Nowhere,
    OutdatedImage,
    Root,
    UntrustedRoot,
    files_of,
    make_directory,
    read_image,
    sync_directory,
    write_file,
)
from emitters.spec.image import Image

WORK = ".work"
LOCK_SECONDS = 300.0  # longer than any build: beyond it, the holder of a lock hangs
GAP_SECONDS = 0.05  # longer than an image is out of sight while another build takes its place
SCRAP_SECONDS = 86_400.0  # what is older in .work was left by a process that was killed
ENTRY_POINTS = "cutlass_moe.kernels"


_NAME_A_ROOT = f"or name a directory of this user alone in {CACHE_DIR.name}"


class MissingImage(LookupError):
    """An image is in no root, and may not be built here."""


class Cache:
    """Images by (arch, key): a dictionary in memory before one or more roots.

    A root is a directory or an archive. Roots are searched in order. All but the last are only
    read; the last one is written to where it is a directory and the file system allows it. A
    read-only root serves every build of this image ABI. The one that is written to serves exactly
    the build asked for: it may keep several, of which the last asked for is the one that readers
    see who take any. Threads and processes may share roots freely.

    All methods that read raise UntrustedRoot where others could have written what they read; but
    with or_memory, where that is the last root, or this user has no access to it, it is not used, a
    warning says so once, and what is built stays in memory.
    """

    def __init__(self, roots: Sequence[str | os.PathLike[str]], *, or_memory: bool = False) -> None:
        if isinstance(roots, (str, os.PathLike)) or not roots:
            raise ValueError(f"expected a list of one or more directories, got {roots!r}")
        self._or_memory = or_memory
        self._memory: dict[tuple[str, str, str | None], Image] = {}
        self._warned = False  # of images that stay in memory
        self._roots = (*map(open_root, roots[:-1]), self._open_last(roots[-1]))
        self.roots = tuple(root.path for root in self._roots)

    @property
    def root(self) -> Path:
        """The root that is written to."""
        return self.roots[-1]

    @property
    def writable(self) -> bool:
        """Whether this process may create or change files in `root`."""
        existing = next(p for p in (self.root, *self.root.parents) if os.path.exists(p))
        return isinstance(self._roots[-1], Directory) and os.access(existing, os.W_OK)

    def load(self, arch: str, key: str, build: str | None = None) -> Image | None:
        """The image, or None; waits for a process that is building it.

        build: the build identity that the writable root's image must have; None takes any.
        """
        image = self._find(arch, key, build)
        if image is None and os.path.exists(self._lock_path(arch, key)):
            if not self.writable:
                time.sleep(GAP_SECONDS)
            with self._locked(arch, key):  # it may be being built, or replaced
                image = self._find(arch, key, build) or self._bring_back(arch, key, build)
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
            image = image or self._bring_back(arch, key, build_identity)
            if image is None:
                image = build()
                got = (image.record.arch, image.record.build)
                if got != (arch, build_identity):
                    raise ValueError(f"expected an image of {(arch, build_identity)}, got {got}")
                self._try_to_write(arch, key, image)
                self._memory[arch, key, build_identity] = image
        return image

    def store(self, arch: str, key: str, image: Image) -> None:
        """Writes an image into the writable root, in place of one of its build. Raises OSError."""
        with self._locked(arch, key):
            self._write(arch, key, image)

    def entries(self) -> Iterator[Entry]:
        """Every sound image of every root."""
        for root in self._roots:
            yield from _entries(root)

    def prune(self, unwanted: Callable[[Entry], bool], dry_run: bool = False) -> list[Entry]:
        """Removes unwanted images, and scraps, from the writable root; returns those images.

        Among them are images of builds that others have taken the place of. dry_run: only tells.
        Raises OSError.
        """
        self._require_directory()
        homes = [Directory(self.root), *self._other_builds()]
        found = [entry for home in homes for entry in _entries(home) if unwanted(entry)]
        if dry_run:
            return found
        self._memory.clear()
        for entry in found:
            with self._locked(entry.arch, entry.key):
                self._remove(entry.root / entry.arch / entry.key)
        for arch, key in {name for home in homes[1:] for name in home.names()}:
            with self._locked(arch, key):
                if not (self.root / arch / key).exists():
                    self._bring_back(arch, key, None)
        self._remove_scraps()
        return found

    def clear(self) -> int:
        """Forgets what is in memory, empties the writable root and returns how many it had."""
        self._require_directory()
        self._memory.clear()
        names = Directory(self.root).names()
        for arch, key in names:
            self._remove(self.root / arch / key)
        if (self.root / WORK).exists():
            shutil.rmtree(self.root / WORK)
        return len(names)

    def _find(self, arch: str, key: str, build: str | None) -> Image | None:
        image = self._memory.get((arch, key, build))
        if image is not None:
            return image
        exact = self._roots[-1] if build is not None and self.writable else None
        for root in self._roots:
            image = self._read(root, arch, key)
            if image is not None and (root is not exact or image.record.build == build):
                self._memory[arch, key, build] = image
                return image
        return None

    def _bring_back(self, arch: str, key: str, build: str | None) -> Image | None:
        """An image of `build` (None: of any) whose place another build has taken, in its place."""
        for home in self._other_builds(build) if self.writable else ():
            image = self._read(home, arch, key)
            if image is not None:
                self._try_to_write(arch, key, image)
                self._memory[arch, key, build] = image
                return image
        return None

    def _open_last(self, path: str | os.PathLike[str]) -> Root:
        try:
            root = open_root(path)
            if self._or_memory:
                with suppress(FileNotFoundError):
                    os.stat(root.path)
            return root
        except (OSError, ValueError) as error:
            if not self._or_memory:
                raise
            self._warn_of_memory(f"images stay in memory: {error}. Set HOME, {_NAME_A_ROOT}")
            return Nowhere(Path(os.devnull) / "cutlass_moe")

    def _read(self, root: Root, arch: str, key: str) -> Image | None:
        try:
            return _read_or_warn(root, arch, key)
        except UntrustedRoot as error:
            if not (self._or_memory and root.path.is_relative_to(self.root)):
                raise
            self._roots = (*self._roots[:-1], Nowhere(self.root))
            self._warn_of_memory(f"images stay in memory: {error}, {_NAME_A_ROOT}")
            return None

    def _try_to_write(self, arch: str, key: str, image: Image) -> None:
        try:
            self._write(arch, key, image)
        except OSError as error:
            self._warn_of_memory(f"image {key} stays in memory: {error}. Make room, {_NAME_A_ROOT}")

    def _warn_of_memory(self, words: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"{words} (said once)", RuntimeWarning, stacklevel=4)

    def _write(self, arch: str, key: str, image: Image) -> None:
        self._require_directory()
        fresh = self._work_path("new", arch, key)
        files = files_of(arch, key, image)
        try:
            make_directory(fresh)
            write_file(fresh / CUBIN, files.cubin)
            write_file(fresh / RECORD, files.record)
            sync_directory(fresh)
            place = self.root / arch / key
            make_directory(place.parent)
            self._make_room(arch, key, image.record.build)
            try:
                fresh.rename(place)
            except OSError:
                if not place.exists():  # else one without a lock was faster: its image is as good
                    raise
            sync_directory(place.parent)
            self._remove(self._other_builds(image.record.build)[0].path / arch / key)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)  # what a failure or a lost race left

    def _require_directory(self) -> None:
        if not isinstance(self._roots[-1], Directory):
            archive = isinstance(self._roots[-1], Archive)
            why = "an archive is only read" if archive else "images stay in memory"
            raise OSError(errno.EROFS, why, str(self.root))

    def _make_room(self, arch: str, key: str, build: str) -> None:
        """Moves what is at an image's place: other builds are kept, and so is damage, as proof."""
        place = self.root / arch / key
        if not place.exists():
            return
        there = _read_or_warn(Directory(self.root), arch, key)
        if there is None:
            aside = self._work_path("damaged", arch, key)
        else:
            aside = self._other_builds(there.record.build)[0].path / arch / key
        if aside.exists() or (there is not None and there.record.build == build):
            self._remove(place)
        else:
            make_directory(aside.parent)
            with suppress(FileNotFoundError):  # one without a lock was faster
                place.rename(aside)

    def _remove(self, place: Path) -> None:
        """Removes an image at once, for all to see, and then its files."""
        if not place.exists():
            return
        aside = self._work_path("old", *place.parts[-2:])
        make_directory(aside.parent)
        with suppress(FileNotFoundError):  # one without a lock was faster
            place.rename(aside)
            shutil.rmtree(aside)

    def _remove_scraps(self) -> None:
        for kind in ("new", "old", "damaged"):
            for scrap in (self.root / WORK / kind).glob("*"):
                with suppress(FileNotFoundError):
                    if time.time() - scrap.stat().st_mtime > SCRAP_SECONDS:
                        shutil.rmtree(scrap)

    def _other_builds(self, build: str | None = None) -> list[Directory]:
        """Where images of one build, or of all, are when another build has taken their place."""
        homes = self.root / WORK / "builds"
        if build is None:
            return [Directory(path) for path in sorted(homes.glob("*"))]
        return [Directory(homes / hashlib.sha256(build.encode()).hexdigest()[:16])]

    def _work_path(self, kind: str, arch: str, key: str) -> Path:
        return self.root / WORK / kind / f"{arch}-{key}-{secrets.token_hex(8)}"

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
                make_directory(path.parent)
                lock.acquire()
            except (OSError, NotImplementedError) as error:
                warnings.warn(f"no lock for image {key}: {error}", RuntimeWarning, stacklevel=4)
        try:
            yield
        finally:
            lock.release()


def open_root(path: str | os.PathLike[str]) -> Root:
    """The images at a path: an archive where a file is, or the name ends in .zip; else a directory.

    Neither needs to exist. Raises ValueError where a ~ in the path stands for nothing.
    """
    try:
        path = Path(path).expanduser().absolute()
    except RuntimeError as error:  # HOME is not set, and the user is in no passwd
        message = f"{path} must start with a directory, user {os.geteuid()} has no home"
        raise ValueError(message) from error
    return Archive(path) if path.suffix == SUFFIX or path.is_file() else Directory(path)


def default_cache() -> Cache:
    """The cache of this process.

    Roots: those of CUTLASS_MOE_CACHE_DIR, a list like PATH, and before the last, which is written
    to, those that packages ship. Without that variable `cutlass_moe` in XDG_CACHE_HOME or ~/.cache,
    or memory alone, where that can't be had or others can write to it.
    """
    given = CACHE_DIR.paths()
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    roots = given or [str(home / "cutlass_moe")]
    roots = [*roots[:-1], *package_roots(), roots[-1]]
    return _cache_of(tuple(map(os.path.expanduser, roots)), or_memory=not given)


@functools.cache
def package_roots() -> tuple[str, ...]:
    """Paths of roots that installed packages name in entry points of group cutlass_moe.kernels."""
    roots = []
    for entry in sorted(metadata.entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        try:
            roots.append(os.fspath(entry.load()))
        except Exception as error:  # whatever a package does wrong, images are elsewhere too
            warnings.warn(f"images of {entry.value}: {error}", RuntimeWarning, stacklevel=3)
    return tuple(roots)


@functools.cache
def _cache_of(roots: tuple[str, ...], or_memory: bool) -> Cache:
    return Cache(roots, or_memory=or_memory)


def _entries(root: Root) -> Iterator[Entry]:
    try:
        names = root.names()
    except DamagedImage as error:
        _warn_of(error)
        names = []
    for arch, key in names:
        image = _read_or_warn(root, arch, key)
        if image is not None:
            yield Entry(root.path, arch, key, image.record, len(image.cubin))


def _read_or_warn(root: Root, arch: str, key: str) -> Image | None:
    try:
        return read_image(root, arch, key)
    except OutdatedImage:
        return None
    except DamagedImage as error:
        _warn_of(error)
        return None


def _warn_of(error: DamagedImage) -> None:
    warnings.warn(f"damaged image skipped: {error}", RuntimeWarning, stacklevel=5)
