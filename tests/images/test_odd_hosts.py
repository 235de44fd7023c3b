"""Hosts that containers make: users without a home, directories that a group may write to."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import cutlass_moe.images.cache as cache_module
from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.cli import main as cli
from cutlass_moe.images.cache import Cache, default_cache
from cutlass_moe.images.compiler import compile_image
from cutlass_moe.images.roots import UntrustedRoot
from cutlass_moe.images.toolchains import default_build
from cutlass_moe.models.problems import model_problems
from cutlass_moe.models.shapes import MoeShape
from tests.images.test_cache_faults import call_libc, in_process
from tests.support.fake_images import ARCH, KEY, OTHER, files_below, make_image, never

UNKNOWN = 54_321  # a user that no passwd has
NEW_USERS = 0x10000000  # a namespace of them
VARIABLES = ("HOME", "XDG_CACHE_HOME", "CUTLASS_MOE_CACHE_DIR", "CUTLASS_MOE_TRUST_ROOT")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory that every user may enter, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


def told(function: Callable[..., Any], *arguments: Any) -> tuple[Any, list[str]]:
    """What a function returns, and its warnings; each comes once."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        returned = function(*arguments)
    return returned, [str(one.message) for one in warned]


def as_user(user: int | None, environment: dict[str, str], function: Callable[..., Any]) -> Any:
    """What `told` says of a function in a process of its own, of that user, with no other of
    VARIABLES than these."""

    def run() -> Any:
        for name in VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(environment)
        if user is not None:
            os.setgid(user)
            os.setuid(user)
        cache_module._cache_of.cache_clear()
        return told(function)

    return in_process(run)


def build_two() -> bool:
    """Two images in the default cache, and each again."""
    first = default_cache().load_or_build(ARCH, KEY, make_image, "today")
    second = default_cache().load_or_build(ARCH, OTHER, lambda: make_image(cubin=b"2"), "today")
    for key, image in ((KEY, first), (OTHER, second)):
        assert default_cache().load_or_build(ARCH, key, never, "today") is image
        assert default_cache().load(ARCH, key) in (image, None)
    return default_cache().writable


# No home


@as_root
def test_no_home_and_no_passwd() -> None:
    """As where a container runs with any user: `docker run --user 54321`, OpenShift."""
    writable, (warning,) = as_user(UNKNOWN, {}, build_two)
    assert not writable
    assert f"user {UNKNOWN} has no home" in warning
    assert "stay in memory" in warning
    assert "Set HOME, or name a directory of this user alone in CUTLASS_MOE_CACHE_DIR" in warning


@as_root
@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_home_of_another_user(home: Path, mode: int) -> None:
    """As where HOME stays root's, which the user may not enter, or not write to."""
    home.chmod(mode)
    writable, (warning,) = as_user(UNKNOWN, {"HOME": str(home)}, build_two)
    assert not writable
    assert "in memory" in warning and "Permission denied" in warning
    assert "CUTLASS_MOE_CACHE_DIR" in warning
    assert not list(home.iterdir())


@as_root
def test_a_directory_of_its_own_is_all_that_such_a_user_needs(home: Path) -> None:
    os.chown(home, UNKNOWN, UNKNOWN)
    for environment in ({"CUTLASS_MOE_CACHE_DIR": str(home / "a")}, {"XDG_CACHE_HOME": str(home)}):
        assert as_user(UNKNOWN, environment, build_two) == (True, [])
    assert len(list(Cache([home / "a"])._roots[0].names())) == 2


@pytest.mark.skipif(default_build() is None, reason="needs nvidia-cutlass-dsl")
def test_compiler_of_a_user_without_a_home() -> None:
    """The user is renamed, not changed: another one may not enter the interpreter's directory."""

    def compile_one() -> tuple[int, str | int]:
        user, group = os.geteuid(), os.getegid()
        try:
            call_libc("unshare", NEW_USERS)
            with contextlib.suppress(FileNotFoundError):
                Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{UNKNOWN} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{UNKNOWN} {group} 1")
        except OSError as error:
            return os.geteuid(), str(error)
        problem = model_problems(MoeShape("m", 8, 2, 256, 128), "bf16")["combine bf16"]
        image = compile_image(problem, every_config(problem)[0], ARCH)
        return os.geteuid(), len(image.cubin)

    (user, size), warned = as_user(None, {}, compile_one)
    if isinstance(size, str):
        pytest.skip(f"no users can be renamed here: {size}")
    assert (user, warned) == (UNKNOWN, [])
    assert size > 1000


COMMANDS = {  # and their exit codes
    ("list",): 0,
    ("verify",): 1,
    ("env",): None,
    ("clear-cache",): 1,
    ("prune", "--older-than", "1"): 1,
    ("build", "--model", "mixtral"): 1,
    ("show-config", "mixtral"): 0,
}


@as_root
@pytest.mark.parametrize(("words", "code"), COMMANDS.items(), ids=lambda value: str(value))
def test_commands_without_a_home(words: tuple[str, ...], code: int | None) -> None:
    """They say what they can, and no traceback."""

    def call() -> tuple[int, str, str]:
        result = CliRunner().invoke(cli.main, words)
        return result.exit_code, result.output, str(result.exception or "")

    (exit_code, output, exception), warned = as_user(UNKNOWN, {}, call)
    assert code is None or exit_code == code, (output, exception)
    assert exception in ("", "0", "1"), exception
    assert len(warned) <= 1


def test_explicit_root_without_a_home_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTLASS_MOE_CACHE_DIR", "~nobody-of-that-name/cache")
    with pytest.raises(ValueError, match=r"~nobody-of-that-name/cache must start with a directory"):
        default_cache()


# Directories of groups


@pytest.fixture
def own(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default cache's root, with an image."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    cache_module._cache_of.cache_clear()
    root = home / ".cache" / "cutlass_moe"
    Cache([root]).store(ARCH, KEY, make_image())
    return root


GROUPS = {  # which paths are opened up, and how
    "umask_002": lambda root: [(root, 0o775)],
    "empty_dir": lambda root: [(root, 0o2777)],
    "fs_group": lambda root: (
        [(path, path.stat().st_mode | 0o060) for path in root.rglob("*")] + [(root, 0o2775)]
    ),
    "a_file": lambda root: [(root / ARCH / KEY / "kernel.cubin", 0o664)],
}


@pytest.mark.parametrize("opened", GROUPS.values(), ids=GROUPS)
def test_default_cache_that_a_group_can_write(
    own: Path, opened: Callable[[Path], list[tuple[Path, int]]]
) -> None:
    for path, mode in opened(own):
        path.chmod(stat.S_IMODE(mode))
    before = files_below(own)
    writable, (warning,) = told(build_two)
    assert not writable
    assert files_below(own) == before  # nothing is written where others write
    assert "images stay in memory" in warning
    assert "can be written by others" in warning
    assert f"chmod -R go-w {own}" in warning
    assert "CUTLASS_MOE_TRUST_ROOT=1" in warning and "CUTLASS_MOE_CACHE_DIR" in warning


def test_what_the_remedy_does(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own.chmod(0o775)
    monkeypatch.setenv("CUTLASS_MOE_TRUST_ROOT", "1")
    assert told(build_two) == (True, [])
    monkeypatch.delenv("CUTLASS_MOE_TRUST_ROOT")
    own.chmod(0o755)
    cache_module._cache_of.cache_clear()
    assert told(default_cache().load, ARCH, KEY) == (make_image(), [])


def test_parent_that_a_group_can_write(own: Path) -> None:
    """An emptyDir at ~/.cache: the root in it is made by this user alone."""
    own.parent.chmod(0o2777)
    assert told(build_two) == (True, [])


def test_explicit_root_that_a_group_can_write_is_refused(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.chmod(0o775)
    monkeypatch.setenv("CUTLASS_MOE_CACHE_DIR", str(own))
    with pytest.raises(UntrustedRoot, match="images are code"):
        default_cache().load_or_build(ARCH, OTHER, never, "today")


def test_untrusted_root_before_the_last_is_refused(own: Path) -> None:
    own.chmod(0o775)
    with pytest.raises(UntrustedRoot, match="images are code"):
        Cache([own, own.parent / "mine"], or_memory=True).load(ARCH, KEY)


def test_images_of_packages_serve_without_a_home(
    own: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "package_roots", lambda: (str(home / "shipped"),))
    Cache([home / "shipped"]).store(ARCH, OTHER, make_image("theirs"))
    own.chmod(0o775)
    image, warned = told(default_cache().load, ARCH, OTHER)
    assert image == make_image("theirs")
    assert len(warned) <= 1


def test_memory_alone_has_nothing_to_list_or_clear(own: Path) -> None:
    own.chmod(0o775)
    told(build_two)
    assert list(default_cache().entries()) == []
    for change in (default_cache().clear, lambda: default_cache().prune(lambda _: True)):
        with pytest.raises(OSError, match="images stay in memory"):
            change()


# Full disks: the default cache, once


def test_full_default_cache_is_told_once(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/images/test_cache_faults.py fills real ones."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "write_file", full)
    cache = default_cache()
    before = files_below(own)
    _, warned = told(lambda: [cache.load_or_build(ARCH, k * 64, make_image, "today") for k in "12"])
    (warning,) = warned
    assert "stays in memory: [Errno 28] No space left on device. Make room, or name" in warning
    after = {name: content for name, content in files_below(own).items() if "locks" not in name}
    assert after.items() <= before.items()
