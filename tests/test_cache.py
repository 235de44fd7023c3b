"""The cache among threads, processes, kills, damage, read-only roots. Images are mere bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from cutlass_moe.cache import WORK, Cache, default_cache
from emitters.image import IMAGE_ABI, Image, LaunchRecord, Param, ParamKind, TensorMapBox

ARCH, KEY = "sm_90a", "5eed" * 16
FORK = multiprocessing.get_context("fork")


def make_image(build: str = "today", cubin: bytes = b"\x7fELF" * 100) -> Image:
    record = LaunchRecord(
        symbol="kernel",
        params=(Param("x", ParamKind.POINTER, 128, 8),),
        tensor_maps=(TensorMapBox("weight", 128, 256, 128, 128),),
        smem_bytes=1024,
        threads=384,
        cluster=(1, 1, 1),
        arch=ARCH,
        abi=IMAGE_ABI,
        registers=168,
        spill_bytes=0,
        build=build,
        problem={"n": 2048},
        config={"tile_m": 128},
        cubin_sha256=hashlib.sha256(cubin).hexdigest(),
    )
    return Image(cubin, record)


def never() -> Image:
    raise AssertionError("built although it was there")


def files_below(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A root that holds the image."""
    Cache([tmp_path]).store(ARCH, KEY, make_image())
    return tmp_path


def test_empty_root_is_not_created(tmp_path):
    root = tmp_path / "not" / "there"
    assert Cache([root]).load(ARCH, KEY) is None
    assert list(Cache([root]).entries()) == []
    assert Cache([root]).clear() == 0
    assert not root.exists()


def test_layout_and_round_trip(filled):
    entry = filled / ARCH / KEY
    assert sorted(p.name for p in entry.iterdir()) == ["kernel.cubin", "launch.json"]
    assert Cache([filled]).load(ARCH, KEY) == make_image()
    assert Cache([filled]).load_or_build(ARCH, KEY, never, "today") == make_image()
    assert [(e.root, e.arch, e.key) for e in Cache([filled]).entries()] == [(filled, ARCH, KEY)]


def test_second_load_comes_from_memory(filled):
    cache = Cache([filled])
    first = cache.load(ARCH, KEY)
    (filled / ARCH / KEY / "kernel.cubin").unlink()
    assert cache.load(ARCH, KEY) is first


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def edit_threads(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "threads": 256}))


def unseal(path: Path) -> None:
    path.write_text(make_image().record.to_json())


DAMAGE = [
    ("cubin_truncated", "kernel.cubin", cut),
    ("cubin_altered", "kernel.cubin", flip),
    ("cubin_missing", "kernel.cubin", Path.unlink),
    ("cubin_empty", "kernel.cubin", lambda path: path.write_bytes(b"")),
    ("record_truncated", "launch.json", cut),
    ("record_altered", "launch.json", edit_threads),
    ("record_without_seal", "launch.json", unseal),
    ("record_missing", "launch.json", Path.unlink),
    ("record_empty", "launch.json", lambda path: path.write_bytes(b"")),
    ("record_a_list", "launch.json", lambda path: path.write_text("[]")),
    ("record_not_text", "launch.json", lambda path: path.write_bytes(b"\xff\xfe")),
    ("record_a_directory", "launch.json", lambda path: (path.unlink(), path.mkdir())),
]
damage = pytest.mark.parametrize(
    ("file", "harm"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE]
)


@damage
def test_damaged_entry_is_set_aside_and_rebuilt(filled, file, harm):
    harm(filled / ARCH / KEY / file)
    with pytest.warns(RuntimeWarning, match="damaged image skipped"):
        image = Cache([filled]).load_or_build(ARCH, KEY, make_image, "today")
    assert image == make_image()
    assert Cache([filled]).load(ARCH, KEY, "today") == make_image()
    assert len(list((filled / WORK / "damaged").iterdir())) == 1


@damage
def test_damaged_entry_of_a_read_only_root_is_skipped(filled, tmp_path_factory, file, harm):
    harm(filled / ARCH / KEY / file)
    before = files_below(filled)
    cache = Cache([filled, tmp_path_factory.mktemp("writable")])
    with pytest.warns(RuntimeWarning, match="damaged image skipped"):
        assert cache.load(ARCH, KEY) is None
        assert list(cache.entries()) == []
        assert cache.load_or_build(ARCH, KEY, make_image, "today") == make_image()
    assert files_below(filled) == before


def test_entry_in_another_entrys_place_is_damaged(filled):
    (filled / ARCH / KEY).rename(filled / ARCH / KEY[::-1])
    with pytest.warns(RuntimeWarning, match="not what was written"):
        assert Cache([filled]).load(ARCH, KEY[::-1]) is None


def test_damage_without_a_build_is_left_alone(filled):
    cut(filled / ARCH / KEY / "kernel.cubin")
    with pytest.warns(RuntimeWarning, match="kernel.cubin of 393 bytes"):
        assert Cache([filled]).load(ARCH, KEY) is None
    assert (filled / ARCH / KEY).exists()


def test_writable_root_wants_the_exact_build(filled):
    tomorrow = make_image("tomorrow", b"better")
    assert Cache([filled]).load(ARCH, KEY, "tomorrow") is None
    assert Cache([filled]).load_or_build(ARCH, KEY, lambda: tomorrow, "tomorrow") == tomorrow
    assert Cache([filled]).load(ARCH, KEY) == tomorrow
    assert Cache([filled]).load(ARCH, KEY, "today") is None
    assert not list((filled / WORK).glob("old/*"))


def test_read_only_root_serves_any_build(filled, tmp_path_factory):
    writable = tmp_path_factory.mktemp("writable")
    image = Cache([filled, writable]).load_or_build(ARCH, KEY, never, "tomorrow")
    assert image == make_image()
    assert list(writable.iterdir()) == []


def test_another_abi_is_not_served(filled):
    other = make_image()
    other = Image(other.cubin, dataclasses.replace(other.record, abi=IMAGE_ABI + 1))
    Cache([filled]).store(ARCH, KEY, other)
    with pytest.warns(RuntimeWarning, match="ABI"):
        assert Cache([filled]).load(ARCH, KEY) is None


def test_roots_are_searched_in_order(tmp_path):
    first, second, writable = (tmp_path / name for name in ("first", "second", "writable"))
    for root in (first, second, writable):
        Cache([root]).store(ARCH, KEY, make_image(cubin=root.name.encode()))
    Cache([second]).store(ARCH, "other", make_image(cubin=b"other"))
    cache = Cache([first, second, writable])
    assert cache.load(ARCH, KEY).cubin == b"first"
    assert cache.load(ARCH, "other").cubin == b"other"
    assert [(e.root, e.key) for e in cache.entries()] == [
        (first, KEY),
        (second, KEY),
        (second, "other"),
        (writable, KEY),
    ]


def test_clear_empties_the_writable_root_only(filled, tmp_path_factory):
    cache = Cache([filled, tmp_path_factory.mktemp("writable")])
    for key in ("a", "b"):
        cache.store(ARCH, key, make_image())
    mine = cache.root / "notes.txt"
    mine.write_text("kept")
    cut(cache.root / ARCH / "b" / "launch.json")
    assert cache.load(ARCH, "a") is not None
    assert cache.clear() == 2
    assert cache.load(ARCH, "a") is None
    assert cache.load(ARCH, KEY) == make_image()
    assert files_below(cache.root) == {"notes.txt": b"kept"}


@pytest.mark.parametrize(
    ("image", "message"),
    [(make_image("tomorrow"), "tomorrow"), (make_image(), "sm_100a")],
    ids=["build", "arch"],
)
def test_image_of_another_build_or_arch_is_refused(tmp_path, image, message):
    arch = ARCH if message == "tomorrow" else "sm_100a"
    with pytest.raises(ValueError, match=message):
        Cache([tmp_path]).load_or_build(arch, KEY, lambda: image, "today")
    assert list(Cache([tmp_path]).entries()) == []


def test_failed_build_leaves_nothing_and_frees_the_lock(tmp_path):
    cache = Cache([tmp_path])
    with pytest.raises(AssertionError, match="built although"):
        cache.load_or_build(ARCH, KEY, never, "today")
    assert cache.load_or_build(ARCH, KEY, make_image, "today") == make_image()


@pytest.mark.parametrize("roots", [[], "/a/path", Path("/a/path")], ids=["none", "str", "path"])
def test_roots_must_be_a_list(roots):
    with pytest.raises(ValueError, match="list of one or more directories"):
        Cache(roots)


def counting_build(log: Path) -> Image:
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.2)  # long enough for the others to come by
    return make_image()


def load_or_build_at(root: Path, log: Path) -> Image:
    return Cache([root]).load_or_build(ARCH, KEY, lambda: counting_build(log), "today")


def _ask(root: Path, log: Path, gate) -> Image:
    gate.wait()
    return load_or_build_at(root, log)


def test_sixteen_processes_build_once(tmp_path):
    log = tmp_path / "log"
    with FORK.Manager() as manager, ProcessPoolExecutor(16, mp_context=FORK) as pool:
        gate = manager.Barrier(16)
        futures = [pool.submit(_ask, tmp_path / "root", log, gate) for _ in range(16)]
        images = [future.result() for future in futures]
    assert images == [make_image()] * 16
    assert len(log.read_text().splitlines()) == 1


@pytest.mark.parametrize("shared", [True, False], ids=["one_cache", "a_cache_each"])
def test_sixteen_threads_build_once(tmp_path, shared):
    log, gate, cache = tmp_path / "log", threading.Barrier(16), Cache([tmp_path / "root"])

    def ask(_: int) -> Image:
        mine = cache if shared else Cache(cache.roots)
        gate.wait()
        return mine.load_or_build(ARCH, KEY, lambda: counting_build(log), "today")

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == [make_image()] * 16
    assert len(log.read_text().splitlines()) == 1


def _hang_in_build(root: Path, inside) -> None:
    def build() -> Image:
        inside.set()
        signal.pause()
        return never()

    Cache([root]).load_or_build(ARCH, KEY, build, "today")


@pytest.fixture
def holder(tmp_path):
    """A process that holds the image's lock and never lets go."""
    inside = FORK.Event()
    process = FORK.Process(target=_hang_in_build, args=(tmp_path, inside))
    process.start()
    assert inside.wait(60)
    yield process
    process.kill()
    process.join()


def test_killed_lock_holder_holds_nobody(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    assert load_or_build_at(tmp_path, tmp_path / "log") == make_image()


def test_hanging_lock_holder_is_not_waited_for_forever(tmp_path, holder, monkeypatch):
    monkeypatch.setattr("cutlass_moe.cache.LOCK_SECONDS", 0.1)
    with pytest.warns(RuntimeWarning, match="no lock"):
        assert load_or_build_at(tmp_path, tmp_path / "log") == make_image()


def test_lost_race_is_no_error(tmp_path, monkeypatch):
    """Without a lock, another process's image may appear at any time."""
    cache = Cache([tmp_path])
    rename = Path.rename

    def late(path: Path, target: Path) -> Path:
        if path.parent.name == "new":
            monkeypatch.setattr(Path, "rename", rename)
            Cache([tmp_path]).store(ARCH, KEY, make_image())
        return rename(path, target)

    monkeypatch.setattr(cache, "_lock_path", lambda arch, key: tmp_path / "another_lock")
    monkeypatch.setattr(Path, "rename", late)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.load_or_build(ARCH, KEY, make_image, "today") == make_image()
    assert len(list(cache.entries())) == 1
    assert not list((tmp_path / WORK).glob("new/*"))


def test_full_disk_leaves_the_old_entry_and_no_scraps(filled, monkeypatch):
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cutlass_moe.cache._write_file", full)
    tomorrow = make_image("tomorrow")
    with pytest.raises(OSError, match="No space"):
        Cache([filled]).store(ARCH, KEY, tomorrow)
    with pytest.warns(RuntimeWarning, match="stays in memory: .* No space"):
        assert Cache([filled]).load_or_build(ARCH, KEY, lambda: tomorrow, "tomorrow") == tomorrow
    assert Cache([filled]).load(ARCH, KEY) == make_image()
    assert not list((filled / WORK).glob("new/*"))


def _replace_again_and_again(root: Path, builds: int) -> None:
    for i in range(builds):
        image = make_image(f"build {i}", f"cubin {i}".encode() * 1000)
        Cache([root]).load_or_build(ARCH, KEY, lambda image=image: image, image.record.build)


def test_readers_see_old_or_new_while_an_entry_is_replaced(filled):
    writer = FORK.Process(target=_replace_again_and_again, args=(filled, 100))
    writer.start()
    seen = set()
    with warnings.catch_warnings():
        # An entry that is exchanged between its two reads looks damaged; it is looked at again.
        warnings.simplefilter("ignore", RuntimeWarning)
        while writer.is_alive():
            image = Cache([filled]).load(ARCH, KEY)
            assert image is not None
            assert hashlib.sha256(image.cubin).hexdigest() == image.record.cubin_sha256
            seen.add(image.record.build)
    writer.join()
    assert writer.exitcode == 0
    assert len(seen) > 1


def _drop_privileges() -> None:
    if os.geteuid() == 0:
        os.setuid(65534)


def _use_read_only(root: Path) -> tuple[Image | None, Image, Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Cache([root]).load(ARCH, KEY)
        other_build = Cache([root]).load_or_build(ARCH, KEY, never, "tomorrow")
    with pytest.warns(RuntimeWarning, match="stays in memory"):
        cache = Cache([root])
        built = cache.load_or_build(ARCH, "missing", make_image, "today")
    assert cache.load_or_build(ARCH, "missing", never, "today") is built
    return found, other_build, built


def test_root_without_write_permission():
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        Cache([root]).store(ARCH, KEY, make_image())
        (root / WORK).rename(root / "gone")
        for path in (root, root / ARCH, root / ARCH / KEY):
            path.chmod(0o555)
        before = files_below(root)
        with ProcessPoolExecutor(1, mp_context=FORK, initializer=_drop_privileges) as pool:
            images = pool.submit(_use_read_only, root).result()
        assert images == (make_image(),) * 3
        assert files_below(root) == before
        for path in (root, root / ARCH, root / ARCH / KEY):
            path.chmod(0o755)


def test_image_is_served_without_the_dsl(filled):
    program = f"""
        import sys
        sys.modules["cutlass"] = None  # an import of it fails
        from cutlass_moe.cache import Cache
        root, asked = {str(filled)!r}, ({ARCH!r}, {KEY!r}, "another build")
        print(Cache([root]).load(*asked))
        print(Cache([root, "/none"]).load(*asked).record.symbol)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["None", "kernel"]


@pytest.mark.parametrize(
    ("environment", "roots"),
    [
        ({"HOME": "/h"}, ["/h/.cache/cutlass_moe"]),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, ["/x/cutlass_moe"]),
        ({"HOME": "/h", "XDG_CACHE_HOME": ""}, ["/h/.cache/cutlass_moe"]),
        ({"HOME": "/h", "CUTLASS_MOE_CACHE_DIR": "/a"}, ["/a"]),
        ({"HOME": "/h", "CUTLASS_MOE_CACHE_DIR": "/a::~/b:"}, ["/a", "/h/b"]),
        ({"HOME": "/h", "CUTLASS_MOE_CACHE_DIR": ""}, ["/h/.cache/cutlass_moe"]),
    ],
    ids=["home", "xdg", "xdg_empty", "one", "list", "empty"],
)
def test_default_cache(monkeypatch, environment, roots):
    for name in ("XDG_CACHE_HOME", "CUTLASS_MOE_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert [str(root) for root in default_cache().roots] == roots
    assert default_cache() is default_cache()
