"""Archives: what is packed, how it is read, what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import multiprocessing
import os
import resource
import shutil
import struct
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlass_moe.images.archive import Archive, pack, write
from cutlass_moe.images.cache import Cache
from cutlass_moe.images.roots import CUBIN, RECORD, DamagedImage, UntrustedRoot, read_image
from emitters.spec.image import IMAGE_ABI, Image
from tests.support.fake_images import ARCH, KEY, OTHER, cut, files_below, make_image, never

IMAGES = {KEY: make_image(), OTHER: make_image(cubin=b"\x7fELFother" * 50)}


@pytest.fixture
def directory(tmp_path):
    root = tmp_path / "root"
    for key, image in IMAGES.items():
        Cache([root]).store(ARCH, key, image)
    return root


@pytest.fixture
def packed(directory, tmp_path):
    assert pack(directory, tmp_path / "images.zip") == 2
    return tmp_path / "images.zip"


def test_archive_serves_what_the_directory_held(directory, packed):
    shutil.rmtree(directory)
    cache = Cache([packed])
    assert not cache.writable
    assert {key: cache.load(ARCH, key) for key in IMAGES} == IMAGES
    assert cache.load(ARCH, "0" * 64) is None
    entries = list(Cache([packed]).entries())
    assert [(e.root, e.arch, e.key) for e in entries] == [(packed, ARCH, k) for k in sorted(IMAGES)]
    assert [e.record for e in entries] == [IMAGES[key].record for key in sorted(IMAGES)]


def test_archive_is_a_plain_zip_file_of_the_same_files(directory, packed, tmp_path):
    with zipfile.ZipFile(packed) as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        archive.extractall(tmp_path / "out")
    inside = {k: v for k, v in files_below(directory).items() if not k.startswith(".work")}
    assert files_below(tmp_path / "out") == inside


def test_archive_made_by_another_zip_program_is_served(packed, tmp_path):
    """With extra fields, a comment and members in another order."""
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(packed) as archive, zipfile.ZipFile(other, "w") as copy:
        copy.comment = b"by hand"
        for info in reversed(archive.infolist()):
            member = zipfile.ZipInfo(info.filename)
            member.extra = struct.pack("<HH5s", 0x5455, 5, b"\x03time")
            copy.writestr(member, archive.read(info))
    assert {key: Cache([other]).load(ARCH, key) for key in IMAGES} == IMAGES


def test_equal_images_make_equal_bytes(directory, packed, tmp_path):
    again = tmp_path / "again"
    for key, image in reversed(IMAGES.items()):
        Cache([again]).store(ARCH, key, image)
    for path in again.rglob("*"):
        os.utime(path, (0, 0))
    (again / "manifest.json").write_text("{}")  # what else lies there is no matter
    pack(again, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == packed.read_bytes()


def test_archive_before_a_writable_directory(packed, tmp_path):
    cache = Cache([packed, tmp_path / "writable"])
    assert cache.writable
    assert cache.load_or_build(ARCH, KEY, never, "another build") == IMAGES[KEY]
    built = make_image("mine")
    assert cache.load_or_build(ARCH, "1" * 64, lambda: built, "mine") == built
    assert [e.key for e in Cache([tmp_path / "writable"]).entries()] == ["1" * 64]


def test_archive_as_the_last_root_is_not_written_to(packed):
    before = packed.read_bytes()
    cache = Cache([packed])
    for change in (
        lambda: cache.store(ARCH, KEY, make_image("other")),
        lambda: cache.prune(lambda entry: True),
        cache.clear,
    ):
        with pytest.raises(OSError, match="an archive is only read"):
            change()
    with pytest.warns(RuntimeWarning, match="stays in memory: .*an archive is only read"):
        built = cache.load_or_build(ARCH, "1" * 64, make_image, "today")
    assert cache.load_or_build(ARCH, "1" * 64, never, "today") is built
    assert packed.read_bytes() == before


def test_archive_that_is_replaced_serves_those_who_opened_it(packed, tmp_path):
    cache = Cache([packed])
    assert cache.load(ARCH, KEY) == IMAGES[KEY]
    write(packed, [(ARCH, "1" * 64, make_image("tomorrow"))])
    assert cache.load(ARCH, OTHER) == IMAGES[OTHER]
    assert Cache([packed]).load(ARCH, OTHER) is None
    assert Cache([packed]).load(ARCH, "1" * 64) == make_image("tomorrow")


def _read_often(archive: Archive) -> bool:
    keys = [*IMAGES] * 200
    with ThreadPoolExecutor(4) as pool:
        return all(pool.map(lambda key: read_image(archive, ARCH, key) == IMAGES[key], keys))


OPENED = []


def _read_what_the_parent_opened() -> bool:
    return _read_often(OPENED[0])


def test_threads_and_forked_processes_read_one_open_archive(packed, monkeypatch):
    archive = Archive(packed)
    assert len(archive.names()) == 2
    monkeypatch.setattr(f"{__name__}.OPENED", [archive])
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as pool:
        readers = [pool.submit(_read_what_the_parent_opened) for _ in range(4)]
        assert all(reader.result(60) for reader in readers)


def test_missing_archive_is_told_and_passed_over(tmp_path):
    cache = Cache([tmp_path / "none.zip", tmp_path / "writable"])
    with pytest.warns(RuntimeWarning, match=r"none\.zip.*No such file"):
        assert cache.load(ARCH, KEY) is None
    with pytest.warns(RuntimeWarning, match=r"none\.zip.*No such file"):
        assert list(cache.entries()) == []


GOOD = f"{ARCH}/{KEY}/{CUBIN}"
FOREIGN = [
    f"../{GOOD}",
    f"/{GOOD}",
    f"{ARCH}/../{GOOD}",
    f"{ARCH}/{KEY}/../{CUBIN}",
    f"{ARCH}\\{KEY}\\{CUBIN}",
    f"{ARCH}/{KEY}/",
    f"{ARCH}/{KEY}/{CUBIN}/x",
    f"{ARCH}/{KEY}/{CUBIN}.py",
    f"{ARCH}/{KEY[:-1]}/{CUBIN}",
    f"{ARCH}/{KEY.upper()}/{CUBIN}",
    f"sm_90a\n/{KEY}/{CUBIN}",
    f"{GOOD}\n",
    "manifest.json",
    "",
]


def refuse(path: Path, words: str) -> None:
    for ask in (Archive(path).names, lambda: Archive(path).files(ARCH, KEY)):
        with pytest.raises(DamagedImage, match=words) as raised:
            ask()
        assert str(path) in str(raised.value)


@pytest.mark.parametrize("name", FOREIGN, ids=repr)
def test_member_that_is_no_file_of_an_image_is_refused(packed, name):
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr(zipfile.ZipInfo(name), b"content")
    refuse(packed, "not an archive of images")


def test_compressed_member_is_refused(packed):
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr(f"{ARCH}/{'1' * 64}/{CUBIN}", bytes(1000), zipfile.ZIP_DEFLATED)
    refuse(packed, "compressed or encrypted")


def test_member_that_appears_twice_is_refused(packed):
    with zipfile.ZipFile(packed, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(GOOD, b"another")
    refuse(packed, "twice")


def test_size_beyond_the_archive_is_refused(packed):
    content = bytearray(packed.read_bytes())
    at = content.index(b"PK\x01\x02")  # of the directory's first member
    struct.pack_into("<II", content, at + 20, 0xFFFFFFF0, 0xFFFFFFF0)
    packed.write_bytes(bytes(content))
    refuse(packed, "ends beyond the archive")


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip file" * 99], ids=["empty", "pk", "text"])
def test_other_file_is_refused(tmp_path, content):
    (tmp_path / "images.zip").write_bytes(content)
    refuse(tmp_path / "images.zip", "not a zip file")


def test_truncated_archive_is_refused(packed):
    cut(packed)
    refuse(packed, "not a zip file")


def test_archive_cut_while_it_is_open_is_noticed(packed):
    archive = Archive(packed)
    assert len(archive.names()) == 2
    os.truncate(packed, 100)
    for key in IMAGES:
        with pytest.raises(DamagedImage, match=f"{packed}"):
            read_image(archive, ARCH, key)


def test_altered_image_is_skipped_and_others_are_served(packed):
    content = packed.read_bytes()
    packed.write_bytes(content.replace(IMAGES[OTHER].cubin, bytes(len(IMAGES[OTHER].cubin))))
    cache = Cache([packed])
    with pytest.warns(RuntimeWarning, match=f"damaged image skipped: .*{OTHER}"):
        assert cache.load(ARCH, OTHER) is None
    assert cache.load(ARCH, KEY) == IMAGES[KEY]


def test_image_without_its_cubin_is_skipped(tmp_path, packed):
    half = tmp_path / "half.zip"
    with zipfile.ZipFile(packed) as archive, zipfile.ZipFile(half, "w") as copy:
        copy.writestr(f"{ARCH}/{KEY}/{RECORD}", archive.read(f"{ARCH}/{KEY}/{RECORD}"))
    with pytest.warns(RuntimeWarning, match="expected both"):
        assert Cache([half]).load(ARCH, KEY) is None


def read_all_or_refuse(path: Path) -> None:
    archive = Archive(path)
    with contextlib.suppress(DamagedImage):
        for arch, key in archive.names():
            assert (arch, read_image(archive, arch, key)) == (ARCH, IMAGES[key])


def test_any_damage_to_a_byte_of_the_directory_is_found_or_harmless(packed):
    content = packed.read_bytes()
    for at in range(content.index(b"PK\x01\x02"), len(content)):
        for value in (0x40, content[at] ^ 1):
            packed.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
            read_all_or_refuse(packed)


@given(data=st.data())
def test_damage_anywhere_is_found_or_harmless(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.zip"
    write(path, [(ARCH, key, image) for key, image in IMAGES.items()])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    read_all_or_refuse(path)


def _for_the_group(path: Path) -> None:
    path.chmod(0o664)


def _to_another_owner(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(path, 12345, -1)


@pytest.mark.parametrize("open_up", [_for_the_group, _to_another_owner])
def test_archive_that_others_can_write_is_refused(packed, monkeypatch, open_up):
    open_up(packed)
    with pytest.raises(UntrustedRoot, match=f"and {packed}.*CUTLASS_MOE_TRUST_ROOT=1"):
        Cache([packed]).load(ARCH, KEY)
    monkeypatch.setenv("CUTLASS_MOE_TRUST_ROOT", "1")
    assert Cache([packed]).load(ARCH, KEY) == IMAGES[KEY]


def test_packed_archive_is_trusted_whatever_the_umask(directory, tmp_path):
    before = os.umask(0)
    try:
        pack(directory, tmp_path / "images.zip")
    finally:
        os.umask(before)
    assert Cache([tmp_path / "images.zip"]).load(ARCH, KEY) == IMAGES[KEY]


def _pack_nothing(directory: Path, archive: Path) -> None:
    shutil.rmtree(directory / ARCH)
    pack(directory, archive)


def _pack_damage(directory: Path, archive: Path) -> None:
    cut(directory / ARCH / KEY / CUBIN)
    pack(directory, archive)


def _pack_what_others_can_write(directory: Path, archive: Path) -> None:
    (directory / ARCH / KEY / CUBIN).chmod(0o666)
    pack(directory, archive)


FAILURES = [
    ("nothing", _pack_nothing, ValueError, "must hold images of this version"),
    ("damage", _pack_damage, DamagedImage, "not what was written"),
    ("untrusted", _pack_what_others_can_write, UntrustedRoot, "written by others"),
]


@pytest.mark.parametrize(
    ("fail", "error", "words"), [f[1:] for f in FAILURES], ids=[f[0] for f in FAILURES]
)
@pytest.mark.parametrize("there", [True, False], ids=["over_another", "new"])
def test_failed_pack_leaves_what_was_there(directory, packed, fail, error, words, there):
    before = hashlib.sha256(packed.read_bytes()).digest() if there else packed.unlink()
    with pytest.raises(error, match=words):
        fail(directory, packed)
    assert sorted(p.name for p in packed.parent.iterdir()) == ["images.zip", "root"][not there :]
    assert not there or hashlib.sha256(packed.read_bytes()).digest() == before


def _pack_beyond(limit: int, directory: Path, archive: Path) -> int | None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        pack(directory, archive)
    except OSError as error:
        return error.errno
    return None


@pytest.mark.parametrize("limit", [0, 300, 2000])
def test_pack_where_no_file_may_be_so_large(directory, packed, limit):
    before = packed.read_bytes()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        assert pool.submit(_pack_beyond, limit, directory, packed).result(60) == errno.EFBIG
    assert packed.read_bytes() == before
    assert sorted(p.name for p in packed.parent.iterdir()) == ["images.zip", "root"]


def test_images_of_another_abi_are_not_packed(directory, tmp_path):
    """Another version left them there: what is of this one is packed."""
    other = next(iter(IMAGES.values()))
    other = Image(other.cubin, dataclasses.replace(other.record, abi=IMAGE_ABI + 1))
    Cache([directory]).store(ARCH, "0" * 64, other)
    assert pack(directory, tmp_path / "packed.zip") == len(IMAGES)
    assert "0" * 64 not in {key for _, key in Archive(tmp_path / "packed.zip").names()}
