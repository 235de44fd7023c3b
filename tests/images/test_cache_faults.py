"""The cache among processes, threads, kills, full disks, wrong clocks: each for real."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import resource
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from cutlass_moe.images import cache as cache_module
from cutlass_moe.images.archive import pack
from cutlass_moe.images.cache import WORK, Cache
from emitters.spec.image import Image
from tests.support.fake_images import (
    ARCH,
    FORK,
    KEY,
    OTHER,
    counting_build,
    files_below,
    load_or_build_at,
    lock_that_tells,
    make_image,
    never,
)

TODAY, TOMORROW = make_image("today"), make_image("tomorrow", b"better")


Hear = Callable[[], Any]


def fork(function: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Hear]:
    """A process that calls function(say, *arguments), and what hears the next thing it says.

    Hearing waits as long as the process lives, and raises EOFError once it is dead.
    """
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=function, args=(sender.send, *arguments), daemon=True)
    process.start()
    sender.close()
    return process, receiver.recv


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns or raises in a process of its own."""

    def run(say: Callable[[Any], None]) -> None:
        try:
            say((function(*arguments), None))
        except Exception as error:
            say((None, error))

    process, hear = fork(run)
    returned, raised = hear()
    process.join()
    if raised is not None:
        raise raised
    return returned


def strictly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function; its warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*arguments)


# Many at once


@pytest.fixture
def wait_for_others(monkeypatch) -> Callable[[int], None]:
    """Waits, in a build, until so many others have asked for its lock."""
    refused = FORK.Semaphore(0)
    monkeypatch.setattr(cache_module, "FileLock", lock_that_tells(refused.release))

    def wait(others: int) -> None:
        for _ in range(others):
            refused.acquire()

    return wait


@pytest.mark.parametrize(
    "builds", [["today"], ["today", "tomorrow"]], ids=["one_version", "two_versions"]
)
def test_sixteen_processes_build_once(tmp_path, builds, wait_for_others):
    """Versions of the library that share a root compile once each, and never for the other."""
    log, root = tmp_path / "log", tmp_path / "root"
    asked = builds * (16 // len(builds))

    def ask(say: Callable[[Image], None], version: str) -> None:
        def build() -> Image:
            first = not log.exists()
            image = counting_build(log, version)
            if first:
                wait_for_others(15)
            return image

        say(Cache([root]).load_or_build(ARCH, KEY, build, version))

    hears = [fork(ask, build)[1] for build in asked]
    assert [hear() for hear in hears] == [make_image(build) for build in asked]
    assert sorted(log.read_text().split()) == builds
    for build in builds:
        assert strictly(Cache([root]).load, ARCH, KEY, build) == make_image(build)


@pytest.mark.parametrize("shared", [True, False], ids=["one_cache", "a_cache_each"])
def test_sixteen_threads_build_once(tmp_path, shared, wait_for_others):
    log, cache = tmp_path / "log", Cache([tmp_path / "root"])

    def build() -> Image:
        image = counting_build(log)
        wait_for_others(15)
        return image

    def ask(_: int) -> Image:
        mine = cache if shared else Cache(cache.roots)
        return mine.load_or_build(ARCH, KEY, build, "today")

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == [make_image()] * 16
    assert len(log.read_text().splitlines()) == 1


def _replace_again_and_again(root: Path, builds: int) -> None:
    for i in range(builds):
        image = make_image(f"build {i}", f"cubin {i}".encode() * 1000)
        Cache([root]).load_or_build(ARCH, KEY, lambda image=image: image, image.record.build)


def test_readers_see_old_or_new_while_an_entry_is_replaced(tmp_path):
    Cache([tmp_path]).store(ARCH, KEY, TODAY)
    writer = FORK.Process(target=_replace_again_and_again, args=(tmp_path, 100))
    writer.start()
    seen = set()
    while writer.is_alive():
        image = strictly(Cache([tmp_path]).load, ARCH, KEY)
        assert image is not None
        seen.add(image.record.build)
    writer.join()
    assert writer.exitcode == 0
    assert len(seen) > 1


def test_lost_race_is_no_error(tmp_path, monkeypatch):
    """Without a lock, another process's image may appear at any time."""
    cache = Cache([tmp_path])
    rename = Path.rename

    def late(path: Path, target: Path) -> Path:
        if path.parent.name == "new":
            monkeypatch.setattr(Path, "rename", rename)
            Cache([tmp_path]).store(ARCH, KEY, TODAY)
        return rename(path, target)

    monkeypatch.setattr(cache, "_lock_path", lambda arch, key: tmp_path / "another_lock")
    monkeypatch.setattr(Path, "rename", late)
    assert strictly(cache.load_or_build, ARCH, KEY, make_image, "today") == TODAY
    assert len(list(cache.entries())) == 1
    assert not list((tmp_path / WORK).glob("new/*"))


def test_rename_that_was_done_but_failed_is_no_error(tmp_path, monkeypatch):
    """As where an NFS server's answer is lost, and its client asks again."""
    rename = Path.rename

    def twice(path: Path, target: Path) -> Path:
        rename(path, target)
        return rename(path, target)

    for image in (TODAY, TOMORROW, TODAY):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", twice)
            strictly(Cache([tmp_path]).store, ARCH, KEY, image)
        assert strictly(Cache([tmp_path]).load, ARCH, KEY) == image


# Killed


def _hang_in_build(say: Callable[[str], None], root: Path, key: str) -> None:
    def build() -> Image:
        say("builds")
        signal.pause()
        return never()

    Cache([root]).load_or_build(ARCH, key, build, "today")


@contextlib.contextmanager
def hanging_in_builds(root: Path, keys: list[str]) -> Iterator[list[BaseProcess]]:
    """Processes that hold the locks of these images and never let go."""
    processes, hears = zip(*(fork(_hang_in_build, root, key) for key in keys), strict=True)
    assert [hear() for hear in hears] == ["builds"] * len(keys)
    yield list(processes)
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture
def holder(tmp_path):
    """A process that holds the image's lock and never lets go."""
    with hanging_in_builds(tmp_path, [KEY]) as [process]:
        yield process


def _wait_and_build(say: Callable[[Any], None], root: Path, log: Path) -> None:
    cache_module.FileLock = lock_that_tells(lambda: say("waits"))
    say(load_or_build_at(root, log))


def test_killed_lock_holder_holds_nobody(tmp_path, holder):
    log = tmp_path / "log"
    hears = [fork(_wait_and_build, tmp_path, log)[1] for _ in range(4)]
    assert [hear() for hear in hears] == ["waits"] * 4
    assert not log.exists()
    os.kill(holder.pid, signal.SIGKILL)
    assert [hear() for hear in hears] == [TODAY] * 4
    assert len(log.read_text().splitlines()) == 1


def test_hanging_lock_holder_is_not_waited_for_forever(tmp_path, holder, monkeypatch):
    monkeypatch.setattr("cutlass_moe.images.cache.LOCK_SECONDS", 0.1)
    with pytest.warns(RuntimeWarning, match="no lock"):
        assert load_or_build_at(tmp_path, tmp_path / "log") == TODAY


def _killed_at(step: int, root: Path) -> None:
    """Brings tomorrow's image in and dies before the step-th thing that it does to files."""
    left = step

    def before(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return call(*arguments, **options)

        return wrapped

    for home, name in [(Path, "rename"), (Path, "mkdir"), (os, "fsync"), (shutil, "rmtree")]:
        setattr(home, name, before(getattr(home, name)))
    Cache([root]).load_or_build(ARCH, KEY, lambda: TOMORROW, "tomorrow")


@pytest.mark.parametrize("there", [None, TODAY], ids=["first", "in_place_of_another"])
def test_killed_at_any_step_leaves_a_whole_image_or_none(tmp_path, there):
    seen = []
    for step in range(100):
        root = tmp_path / str(step)
        if there:
            Cache([root]).store(ARCH, KEY, there)
        process = FORK.Process(target=_killed_at, args=(step, root))
        process.start()
        process.join()
        seen.append(strictly(Cache([root]).load, ARCH, KEY))
        assert seen[-1] in (there, TOMORROW)
        assert strictly(load_or_build_at, root, tmp_path / "log", "today") == TODAY
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert step > 5
    assert (seen[0], seen[-1]) == (there, TOMORROW)


KEYS = [digit * 64 for digit in "01234567"]


def _build_all(say: Callable[[str], None], root: Path, log: Path, seed: int) -> None:
    """Asks for every image, in its own order."""
    cache_module.FileLock = lock_that_tells(lambda: say("waits"))
    for key in random.Random(seed).sample(KEYS, len(KEYS)):

        def build(key: str = key) -> Image:
            with log.open("a") as file:
                file.write(f"{key}\n")
            return TODAY

        assert strictly(Cache([root]).load_or_build, ARCH, key, build, "today") == TODAY
    say("done")


def test_of_many_processes_those_killed_in_a_compile_are_replaced(tmp_path):
    root, log = tmp_path / "root", tmp_path / "log"
    with hanging_in_builds(root, KEYS[:6]) as doomed:
        hears = [fork(_build_all, root, log, seed)[1] for seed in range(6)]
        assert [hear() for hear in hears] == ["waits"] * 6
        for process in doomed:
            os.kill(process.pid, signal.SIGKILL)
        for hear in hears:
            while hear() != "done":
                pass
    assert sorted(log.read_text().split()) == KEYS
    entries = strictly(lambda: list(Cache([root]).entries()))
    assert [entry.key for entry in entries] == KEYS


# No room


def check_full(root: Path, error: str) -> None:
    """On a disk too full for another image: what is there stays, what is built is returned."""
    before = files_below(root)
    cache = Cache([root])
    with pytest.raises(OSError, match=error):
        cache.store(ARCH, KEY, TOMORROW)
    with pytest.warns(RuntimeWarning, match=f"stays in memory: .*{error}"):
        assert cache.load_or_build(ARCH, KEY, lambda: TOMORROW, "tomorrow") is TOMORROW
    with pytest.warns(RuntimeWarning, match="stays in memory"):
        assert Cache([root]).load_or_build(ARCH, OTHER, make_image, "today") == TODAY
    assert strictly(cache.load_or_build, ARCH, KEY, never, "tomorrow") is TOMORROW
    assert strictly(Cache([root]).load, ARCH, KEY) == TODAY
    with pytest.raises(OSError, match=error):
        pack(root, root / "images.zip")
    after = {name: content for name, content in files_below(root).items() if "locks" not in name}
    assert after.items() <= before.items()
    assert not list((root / WORK).glob("new/*"))


def _check_file_size_limit(root: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
    check_full(root, "File too large")


def test_file_size_limit(tmp_path):
    Cache([tmp_path]).store(ARCH, KEY, TODAY)
    in_process(_check_file_size_limit, tmp_path)


NEW_NAMESPACES = 0x00020000 | 0x10000000  # of mounts and users
READ_ONLY, REMOUNT = 1, 32
LIBC = ctypes.CDLL(None, use_errno=True)


def call_libc(name: str, *arguments: Any) -> None:
    if getattr(LIBC, name)(*arguments):
        error = ctypes.get_errno()
        raise PermissionError(error, f"{name}: {os.strerror(error)}")


def on_tmpfs(function: Callable[[Path], None], directory: Path) -> None:
    """Runs a function in a process that alone sees a file system of 64 KiB at a directory."""

    def run() -> str | None:
        user, group = os.geteuid(), os.getegid()
        place = str(directory).encode()
        try:
            call_libc("unshare", NEW_NAMESPACES)
            with contextlib.suppress(FileNotFoundError):
                Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
            call_libc("mount", b"tmpfs", place, b"tmpfs", 0, b"size=64k,mode=755")
        except OSError as error:
            return str(error)
        function(directory)
        return None

    why_not = in_process(run)
    if why_not:
        pytest.skip(f"no file system can be mounted here: {why_not}")


def _check_full_tmpfs(root: Path) -> None:
    Cache([root]).store(ARCH, KEY, TODAY)
    filler = root / "filler"
    with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    check_full(root, "No space left")
    filler.unlink()
    assert strictly(Cache([root]).load_or_build, ARCH, KEY, lambda: TOMORROW, "tomorrow")
    assert strictly(Cache([root]).load, ARCH, KEY) == TOMORROW


def test_full_disk(tmp_path):
    on_tmpfs(_check_full_tmpfs, tmp_path)


# No permission


def _check_read_only(root: Path) -> None:
    before = files_below(root)
    cache = Cache([root])
    assert not cache.writable
    assert strictly(cache.load, ARCH, KEY) == TODAY
    assert strictly(cache.load_or_build, ARCH, KEY, never, "tomorrow") == TODAY
    with pytest.warns(RuntimeWarning, match="stays in memory"):
        built = cache.load_or_build(ARCH, OTHER, make_image, "today")
    assert strictly(cache.load_or_build, ARCH, OTHER, never, "today") is built
    with pytest.raises(OSError, match=r"Read-only|Permission"):
        cache.store(ARCH, KEY, TODAY)
    with pytest.raises(OSError, match=r"Read-only|Permission"):
        pack(root, root / "images.zip")
    assert files_below(root) == before


def _check_unprivileged(root: Path) -> None:
    if os.geteuid() == 0:
        os.setuid(65534)
    _check_read_only(root)


def test_root_without_write_permission():
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        Cache([root]).store(ARCH, KEY, TODAY)
        (root / WORK).rename(root / "gone")
        for path in (root, root / ARCH, root / ARCH / KEY):
            path.chmod(0o555)
        in_process(_check_unprivileged, root)
        for path in (root, root / ARCH, root / ARCH / KEY):
            path.chmod(0o755)


def _check_read_only_file_system(root: Path) -> None:
    Cache([root]).store(ARCH, KEY, TODAY)
    call_libc("mount", None, str(root).encode(), None, REMOUNT | READ_ONLY, None)
    _check_read_only(root)


def test_read_only_file_system(tmp_path):
    on_tmpfs(_check_read_only_file_system, tmp_path)


# No common time


@pytest.mark.parametrize("when", [0.0, 4e9], ids=["1970", "2096"])
def test_wrong_clocks_do_no_harm(tmp_path, when, wait_for_others):
    root, log = tmp_path / "root", tmp_path / "log"
    load_or_build_at(root, log, "yesterday")
    for path in [root, *root.rglob("*")]:
        os.utime(path, (when, when))

    def ask(say: Callable[[Image], None]) -> None:
        def build() -> Image:
            wait_for_others(3)
            return counting_build(log)

        say(Cache([root]).load_or_build(ARCH, KEY, build, "today"))

    hears = [fork(ask)[1] for _ in range(4)]
    assert [hear() for hear in hears] == [TODAY] * 4
    assert log.read_text().split() == ["yesterday", "today"]
    assert strictly(Cache([root]).load, ARCH, KEY, "yesterday") == make_image("yesterday")
