"""The cache: lookup, layout, damage, builds, trust, default roots. Images are mere bytes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cutlass_moe.images.cache import SCRAP_SECONDS, WORK, Cache, default_cache, package_roots
from cutlass_moe.images.roots import CUBIN, RECORD, UntrustedRoot
from emitters.spec.image import IMAGE_ABI, Image
from tests.support.fake_images import ARCH, KEY, OTHER, cut, files_below, make_image, never


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


@pytest.mark.parametrize("ask", ["load", "load_or_build"])
def test_build_whose_place_another_took_comes_back(filled, ask):
    tomorrow = make_image("tomorrow", b"better")
    Cache([filled]).store(ARCH, KEY, tomorrow)
    cache = Cache([filled])
    if ask == "load":
        assert cache.load(ARCH, KEY, "today") == make_image()
    else:
        assert cache.load_or_build(ARCH, KEY, never, "today") == make_image()
    assert Cache([filled]).load(ARCH, KEY) == make_image()
    assert Cache([filled]).load_or_build(ARCH, KEY, never, "tomorrow") == tomorrow
    assert len(list((filled / WORK).glob("builds/*/*/*"))) == 1
    assert not list((filled / WORK).glob("old/*"))


def test_image_of_the_same_build_is_replaced(filled):
    other = make_image(cubin=b"other flags")
    Cache([filled]).store(ARCH, KEY, other)
    assert Cache([filled]).load(ARCH, KEY) == other
    assert len(list(filled.rglob(CUBIN))) == 1


def test_read_only_root_serves_any_build(filled, tmp_path_factory):
    writable = tmp_path_factory.mktemp("writable")
    image = Cache([filled, writable]).load_or_build(ARCH, KEY, never, "tomorrow")
    assert image == make_image()
    assert list(writable.iterdir()) == []


def test_another_abi_is_not_served(filled):
    other = make_image()
    other = Image(other.cubin, dataclasses.replace(other.record, abi=IMAGE_ABI + 1))
    Cache([filled]).store(ARCH, KEY, other)
    assert Cache([filled]).load(ARCH, KEY) is None
    assert list(Cache([filled]).entries()) == []


def test_roots_are_searched_in_order(tmp_path):
    first, second, writable = (tmp_path / name for name in ("first", "second", "writable"))
    for root in (first, second, writable):
        Cache([root]).store(ARCH, KEY, make_image(cubin=root.name.encode()))
    Cache([second]).store(ARCH, OTHER, make_image(cubin=b"other"))
    cache = Cache([first, second, writable])
    assert cache.load(ARCH, KEY).cubin == b"first"
    assert cache.load(ARCH, OTHER).cubin == b"other"
    assert [(e.root, e.key) for e in cache.entries()] == [
        (first, KEY),
        (second, OTHER),
        (second, KEY),
        (writable, KEY),
    ]


def test_clear_empties_the_writable_root_only(filled, tmp_path_factory):
    cache = Cache([filled, tmp_path_factory.mktemp("writable")])
    for key in (KEY, OTHER):
        cache.store(ARCH, key, make_image(cubin=b"mine"))
    mine = cache.root / "notes.txt"
    mine.write_text("kept")
    cut(cache.root / ARCH / OTHER / RECORD)
    assert cache.load(ARCH, KEY) == make_image()
    assert cache.clear() == 2
    assert cache.load(ARCH, KEY) == make_image()
    assert files_below(cache.root) == {"notes.txt": b"kept"}


def test_prune_removes_what_is_unwanted(filled):
    cache = Cache([filled])
    tomorrow = make_image("tomorrow", b"better")
    cache.store(ARCH, KEY, tomorrow)  # today's is now out of the way
    cache.store(ARCH, OTHER, tomorrow)

    def old(entry):
        return entry.record.build == "today"

    before = files_below(filled)
    assert [entry.key for entry in cache.prune(old, dry_run=True)] == [KEY]
    assert files_below(filled) == before
    (removed,) = cache.prune(old)
    assert (removed.key, removed.record, removed.cubin_bytes) == (KEY, make_image().record, 400)
    assert cache.prune(old) == []
    assert Cache([filled]).load(ARCH, KEY, "today") is None
    assert Cache([filled]).load(ARCH, KEY) == Cache([filled]).load(ARCH, OTHER) == tomorrow


def test_prune_gives_what_is_kept_its_place_back(filled):
    Cache([filled]).store(ARCH, KEY, make_image("tomorrow"))
    assert len(Cache([filled]).prune(lambda entry: entry.record.build == "tomorrow")) == 1
    assert [e.record.build for e in Cache([filled]).entries()] == ["today"]
    assert not list((filled / WORK).glob("builds/*/*/*"))


def test_prune_forgets_what_it_removed(filled):
    cache = Cache([filled])
    assert cache.load(ARCH, KEY) == make_image()
    cache.prune(lambda entry: True)
    assert cache.load(ARCH, KEY) is None


def test_prune_removes_scraps_a_day_old(filled):
    scraps = [filled / WORK / kind / "scrap" for kind in ("new", "old", "damaged")]
    for scrap in scraps:
        scrap.mkdir(parents=True)
    Cache([filled]).prune(lambda entry: False)
    assert all(scrap.exists() for scrap in scraps)
    for scrap in scraps:
        then = scrap.stat().st_mtime - SCRAP_SECONDS - 60
        os.utime(scrap, (then, then))
    Cache([filled]).prune(lambda entry: False)
    assert not any(scrap.exists() for scrap in scraps)
    assert Cache([filled]).load(ARCH, KEY) == make_image()


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


def test_image_is_served_without_the_dsl(filled):
    program = f"""
        import sys
        sys.modules["cutlass"] = None  # an import of it fails
        from cutlass_moe.images.cache import Cache
        root, asked = {str(filled)!r}, ({ARCH!r}, {KEY!r}, "another build")
        print(Cache([root]).load(*asked))
        print(Cache([root, "/none"]).load(*asked).record.symbol)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["None", "kernel"]


def _to_another_owner(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(path, 12345, -1)


def _for_the_group(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o020)


def _for_everyone(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o002)


@pytest.mark.parametrize("name", [".", f"{ARCH}/{KEY}/{CUBIN}", f"{ARCH}/{KEY}/{RECORD}"])
@pytest.mark.parametrize("open_up", [_to_another_owner, _for_the_group, _for_everyone])
def test_root_that_others_can_write_is_refused(filled, monkeypatch, name, open_up):
    open_up(filled / name)
    cache = Cache([filled])
    if name == ".":
        with pytest.raises(UntrustedRoot, match="images are code"):
            cache.load_or_build(ARCH, OTHER, never, "today")
    for use in (
        lambda: cache.load(ARCH, KEY),
        lambda: cache.load_or_build(ARCH, KEY, never, "today"),
        lambda: list(cache.entries()),
    ):
        with pytest.raises(UntrustedRoot, match=f"and {filled}.*CUTLASS_MOE_TRUST_ROOT=1"):
            use()
    monkeypatch.setenv("CUTLASS_MOE_TRUST_ROOT", "1")
    assert cache.load(ARCH, KEY) == make_image()


def test_image_out_of_sight_for_an_instant_is_looked_for_again(filled, monkeypatch):
    """By one who can't lock: while another build takes its place, there is nothing in it."""
    aside = filled / "aside"
    (filled / ARCH / KEY).rename(aside)
    monkeypatch.setattr(Cache, "writable", False)
    monkeypatch.setattr(
        "cutlass_moe.images.cache.time.sleep", lambda _: aside.rename(filled / ARCH / KEY)
    )
    assert Cache([filled]).load(ARCH, KEY) == make_image()


def test_what_is_written_is_trusted_whatever_the_umask(tmp_path):
    root = tmp_path / "parent" / "root"
    before = os.umask(0)
    try:
        Cache([root]).store(ARCH, KEY, make_image())
    finally:
        os.umask(before)
    assert Cache([root]).load(ARCH, KEY) == make_image()
    made = [path for path in (tmp_path / "parent").rglob("*") if "locks" not in path.parts]
    assert not any(path.stat().st_mode & 0o022 for path in made)


@pytest.mark.parametrize(
    ("environment", "roots"),
    [
        ({"HOME": "/h"}, ["/h/.cache/cutlass_moe"]),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, ["/x/cutlass_moe"]),
        ({"HOME": "/h", "XDG_CACHE_HOME": ""}, ["/h/.cache/cutlass_moe"]),
        ({"HOME": "/h", "CUTLASS_MOE_CACHE_DIR": "/a"}, ["/a"]),
        ({"HOME": "/h", "CUTLASS_MOE_CACHE_DIR": "/a::~/b:"}, ["/a", "/h/b"]),
        ({"HOME": "/h", "CUTLASS_MOE_CACHE_DIR": ""}, ["/h/.cache/cutlass_moe"]),
        ({"HOME": "/h", "CUTLASS_MOE_CACHE_DIR": "/a.zip:/b"}, ["/a.zip", "/b"]),
    ],
    ids=["home", "xdg", "xdg_empty", "one", "list", "empty", "archive"],
)
def test_default_cache(monkeypatch, environment, roots):
    for name in ("XDG_CACHE_HOME", "CUTLASS_MOE_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert [str(root) for root in default_cache().roots] == roots
    assert default_cache() is default_cache()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A directory of installed packages."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    package_roots.cache_clear()
    yield site
    package_roots.cache_clear()


def install(site: Path, name: str, code: str) -> None:
    (site / f"{name}.py").write_text(code)
    info = site / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[cutlass_moe.kernels]\n{name} = {name}:ROOT\n")


def test_packages_ship_roots(packages, tmp_path, monkeypatch):
    Cache([tmp_path / "shipped"]).store(ARCH, KEY, make_image("theirs"))
    install(packages, "their_kernels", f"ROOT = {str(tmp_path / 'shipped')!r}")
    install(packages, "more_kernels", "import pathlib; ROOT = pathlib.Path('/more.zip')")
    monkeypatch.setenv("CUTLASS_MOE_CACHE_DIR", f"/first:{tmp_path / 'mine'}")
    roots = [str(root) for root in default_cache().roots]
    assert roots == ["/first", "/more.zip", str(tmp_path / "shipped"), str(tmp_path / "mine")]
    with pytest.warns(RuntimeWarning, match="more.zip.*No such file"):
        assert default_cache().load_or_build(ARCH, KEY, never, "mine") == make_image("theirs")


def test_package_that_fails_is_passed_over(packages, monkeypatch):
    install(packages, "bad_kernels", "raise KeyError('bad day')")
    install(packages, "odd_kernels", "ROOT = 7")
    monkeypatch.setenv("CUTLASS_MOE_CACHE_DIR", "/mine")
    with pytest.warns(RuntimeWarning) as told:
        assert default_cache().roots == (Path("/mine"),)
    assert ["bad day" in str(told[0].message), "odd_kernels" in str(told[1].message)] == [True] * 2
