"""`cutlass-moe list | verify | pack | merge | prune`: what they print, write and return."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.cli import images
from cutlass_moe.cli import main as cli
from cutlass_moe.images.cache import Cache
from cutlass_moe.images.roots import CUBIN, RECORD
from cutlass_moe.models.files import read_config
from cutlass_moe.models.problems import model_problems
from cutlass_moe.models.shapes import DTYPES, MODELS, MoeShape
from emitters.spec.image import Image, image_key
from tests.support.fake_images import ARCH, OTHER, cut, files_below, image_for, make_image

TINY = MoeShape("tiny", 8, 2, 256, 128)
SMALL = MoeShape("small", 4, 2, 512, 128)
PAIRS = [(p, c) for p in model_problems(TINY, "fp8").values() for c in every_config(p)]
CU12, CU13 = "nvidia-cutlass-dsl 4.8.1 cu12 emitters 0", "nvidia-cutlass-dsl 4.8.1 cu13 emitters 0"


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(word) for word in words])


def fill(root: Path, build: str = CU12, shape: MoeShape = TINY, dtype: str = "fp8") -> list[str]:
    """Writes all images of a model and returns their keys."""
    keys = []
    for problem in model_problems(shape, dtype).values():
        for config in every_config(problem):
            key, image = image_for(problem, config, build)
            Cache([root]).store(ARCH, key, image)
            keys.append(key)
    return keys


def keys_in(root: Path) -> set[str]:
    return {entry.key for entry in Cache([root]).entries()}


@pytest.fixture(autouse=True)
def default(tmp_path, monkeypatch):
    """The default cache's root; qwen3-30b and mixtral are small models; no driver."""
    root = tmp_path / "default"
    monkeypatch.setenv("CUTLASS_MOE_CACHE_DIR", str(root))
    monkeypatch.setattr(images, "driver_cuda", lambda: None)
    monkeypatch.setitem(MODELS, "qwen3-30b", TINY)
    monkeypatch.setitem(MODELS, "mixtral", SMALL)
    return root


@pytest.fixture
def root(tmp_path):
    fill(tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture
def archive(root, tmp_path):
    assert call("pack", root, tmp_path / "images.zip").exit_code == 0
    return tmp_path / "images.zip"


def test_list(root, archive):
    result = call("list", root, archive)
    assert result.exit_code == 0
    for key in keys_in(root):
        assert result.output.count(key[:12]) == 2
    for words in ("e4m3 > bf16 E 8 N 256", "route E 8 int64", "combine bf16 > bf16"):
        assert words in result.output


@pytest.mark.parametrize("part", ["problem", "config"])
def test_list_names_records_that_it_does_not_know(root, part):
    """Of the version after this one, or before, with the same image ABI."""
    key, image = image_for(*PAIRS[0])
    unknown = {"op": "scatter"} if part == "problem" else {"template": "wide"}
    record = dataclasses.replace(image.record, **{part: unknown})
    Cache([root]).store(ARCH, "f" * len(key), Image(image.cubin, record))
    result = call("list", root)
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    for said in (key[:12], "f" * 12, repr(next(iter(unknown.values())))):
        assert said in words


def test_list_as_json(root, archive):
    listed = json.loads(call("list", "--json", archive).output)
    assert {entry["key"] for entry in listed} == keys_in(root)
    (entry,) = (e for e in Cache([root]).entries() if e.key == listed[0]["key"])
    assert listed[0]["root"] == str(archive)
    assert listed[0]["problem"] == entry.record.problem
    assert listed[0]["cubin_bytes"] == len((root / ARCH / entry.key / CUBIN).read_bytes())
    assert json.loads(call("list", "--json").output) == []


def test_list_of_an_empty_cache(default):
    result = call("list")
    assert (result.exit_code, result.output) == (0, f"{default}: no images\n")
    assert not default.exists()


def test_verify_of_a_sound_root(root, archive):
    result = call("verify", root, archive, "--model", "qwen3-30b", "--cuda", "12.4")
    assert result.exit_code == 0, result.output
    assert f"{len(keys_in(root))} images are sound, 0 faulty, 0 missing" in result.output


def test_verify_without_images_fails(default):
    assert call("verify").exit_code == 1


def swap(root: Path) -> str:
    """Puts a sound image of another problem in an image's place, seal and all."""
    key, other = sorted(keys_in(root))[:2]
    Cache([root]).store(ARCH, key, Cache([root]).load(ARCH, other))
    return f"{ARCH}/{key}"


def unknown_arch(root: Path) -> str:
    _, image = image_for(*PAIRS[0])
    key = image_key(*PAIRS[0], "sm_75")
    record = dataclasses.replace(image.record, arch="sm_75")
    Cache([root]).store("sm_75", key, Image(image.cubin, record))
    return f"sm_75/{key}"


def damaged(root: Path) -> str:
    key = min(keys_in(root))
    cut(root / ARCH / key / CUBIN)
    return f"{ARCH}/{key}"


def no_record(root: Path) -> str:
    key = min(keys_in(root))
    (root / ARCH / key / RECORD).unlink()
    return f"{ARCH}/{key}"


def no_problem(root: Path) -> str:
    Cache([root]).store(ARCH, OTHER, make_image())
    return f"{ARCH}/{OTHER}"


def writable(root: Path) -> str:
    key = min(keys_in(root))
    (root / ARCH / key / CUBIN).chmod(0o666)
    return f"{ARCH}/{key}"


def too_new(root: Path) -> str:
    key, image = image_for(*PAIRS[0], CU13)
    Cache([root]).store(ARCH, key, image)
    return f"{ARCH}/{key}"


FAULTS = [
    (swap, "its problem and config belong at sm_90a/"),
    (unknown_arch, "supported are sm_90a"),
    (damaged, "is not what was written"),
    (no_record, "launch.json"),
    (no_problem, "a problem's op must be one of"),
    (writable, "can be written by others"),
    (too_new, "need driver R580 or newer (CUDA 13.0)"),
]


@pytest.mark.parametrize(("spoil", "words"), FAULTS, ids=[f[0].__name__ for f in FAULTS])
def test_verify_finds(root, spoil, words):
    place = spoil(root)
    result = call("verify", root, "--cuda", "12.4", "--json")
    assert result.exit_code == 1
    report = json.loads(result.output)
    (fault,) = report["faults"]
    assert (report["ok"], fault["root"], fault["image"]) == (False, str(root), place)
    assert words in fault["reason"]
    assert f"{root} {place}: " in call("verify", root, "--cuda", "12.4").output


def test_verify_finds_a_file_that_is_no_archive(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"no zip")
    result = call("verify", tmp_path / "images.zip")
    assert result.exit_code == 1
    assert "not a zip file" in result.output


@pytest.mark.parametrize(
    ("build", "driver", "code"),
    [
        (CU12, 12000, 0),
        (CU12, 13010, 0),
        (CU13, 13000, 0),
        (CU13, 12090, 1),
        (CU12, 11080, 1),
        (CU13, None, 0),
    ],
)
def test_verify_asks_the_driver_here(tmp_path, monkeypatch, build, driver, code):
    fill(tmp_path / "new", build)
    monkeypatch.setattr(images, "driver_cuda", lambda: driver)
    result = call("verify", tmp_path / "new")
    assert result.exit_code == code
    assert ("not checked" in result.output) == (driver is None)
    assert ("R580 or newer (CUDA 13.0)" in result.output) == (driver == 12090)


def test_verify_tells_what_a_model_would_miss(root, tmp_path):
    gone = min(keys_in(root))
    Cache([root]).prune(lambda entry: entry.key == gone)
    words = ("verify", root, "--model", "qwen3-30b")
    result = call(*words)
    assert result.exit_code == 1
    assert result.output.count("missing: ") == 1
    assert f"missing: {ARCH}/{gone} for qwen3-30b fp8" in result.output
    assert "cutlass-moe build --model=qwen3-30b --dtype=fp8" in result.output
    (missing,) = json.loads(call(*words, "--json").output)["missing"]
    assert (missing["key"], missing["model"], missing["dtype"]) == (gone, "qwen3-30b", "fp8")
    fill(tmp_path / "rest")
    assert call(*words, tmp_path / "rest").exit_code == 0
    assert call(*words, tmp_path / "rest", "--dtype", "int8").exit_code == 1


def test_verify_and_prune_take_one_rank_of_a_config_file(tmp_path):
    config = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 8}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**config, "num_experts_per_tok": 2}))
    keys = fill(tmp_path / "rank", shape=read_config(file).shard(tp=2, ep=4))
    rank = ("--tp", "2", "--ep", "4")
    assert call("verify", tmp_path / "rank", "--model", file, *rank).exit_code == 0
    whole = call("verify", tmp_path / "rank", "--model", file)
    assert whole.exit_code == 1
    assert f"build --model={file} --dtype=fp8" in whole.output
    other = call("verify", tmp_path / "rank", "--model", file, "--tp", "4")
    assert f"build --model={file} --dtype=fp8 --tp=4" in other.output
    result = call("prune", tmp_path / "rank", "--keep-model", file, *rank)
    assert result.exit_code == 0, result.output
    assert keys_in(tmp_path / "rank") == set(keys)
    assert call("prune", tmp_path / "rank", "--keep-model", file).exit_code == 0
    left = [entry.record.problem["op"] for entry in Cache([tmp_path / "rank"]).entries()]
    assert 0 < len(left) < len(keys)
    assert "grouped_gemm" not in left  # but steps that the whole layer has too


def test_pack(root, archive):
    assert keys_in(archive) == keys_in(root)


def test_merge(root, tmp_path):
    fill(tmp_path / "small", shape=SMALL)
    theirs = fill(tmp_path / "theirs", CU13)
    both = keys_in(root) | keys_in(tmp_path / "small")
    for output in (tmp_path / "out", tmp_path / "out.zip"):
        result = call("merge", tmp_path / "small", root, tmp_path / "theirs", output)
        assert result.exit_code == 0, result.output
        assert f"{len(both)} images in {output}, {len(both)} of them new" in result.output
        assert keys_in(output) == both
        assert {e.record.build for e in Cache([output]).entries()} == {CU12}  # the first's
        again = call("merge", tmp_path / "theirs", output)
        assert f"{len(both)} images in {output}, 0 of them new" in again.output
        builds = {e.key: e.record.build for e in Cache([output]).entries()}
        assert builds == {key: CU13 if key in theirs else CU12 for key in both}


def test_merge_of_a_directory_and_back_changes_nothing(root, archive, tmp_path):
    assert call("merge", archive, tmp_path / "out").exit_code == 0
    before = files_below(tmp_path / "out")
    assert call("merge", root, tmp_path / "out").exit_code == 0
    assert files_below(tmp_path / "out") == before
    assert call("pack", tmp_path / "out", tmp_path / "again.zip").exit_code == 0
    assert (tmp_path / "again.zip").read_bytes() == archive.read_bytes()


def test_prune_by_build(root):
    new = {
        image_for(*PAIRS[0], CU13)[0]: image_for(*PAIRS[0], CU13)[1],
        image_for(*PAIRS[1], CU13)[0]: image_for(*PAIRS[1], CU13)[1],
    }
    for key, image in new.items():
        Cache([root]).store(ARCH, key, image)
    before = files_below(root)
    dry = call("prune", root, "--keep-build", "cu13", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "would be removed" in dry.output
    assert files_below(root) == before
    result = call("prune", root, "--keep-build", "cu13")
    assert f"{len(PAIRS)} images" in result.output  # two of them no longer in their place
    assert keys_in(root) == set(new)
    assert "0 images" in call("prune", root, "--keep-build", "cu13").output


def test_prune_of_other_builds_than_the_installed_one(root, monkeypatch):
    monkeypatch.setattr(images, "default_build", lambda: CU12)
    assert "0 images" in call("prune", root, "--keep-build", "installed").output
    monkeypatch.setattr(images, "default_build", lambda: CU13)
    assert f"{len(PAIRS)} images" in call("prune", root, "--keep-build", "installed").output


def test_prune_by_model(root):
    fill(root, shape=SMALL, dtype="bf16")
    before = keys_in(root)
    every = [problem for dtype in DTYPES for problem in model_problems(SMALL, dtype).values()]
    used = {
        image_key(problem, config, ARCH) for problem in every for config in every_config(problem)
    }
    assert call("prune", root, "--keep-model", "mixtral").exit_code == 0
    assert keys_in(root) == before & used != before


def test_prune_by_age(root):
    old, future = sorted(keys_in(root))[:2]
    for key, days in ((old, -40), (future, 4000)):
        then = time.time() + days * 86_400
        os.utime(root / ARCH / key / RECORD, (then, then))
    kept = call("prune", root, "--older-than", "30", "--keep-model", "qwen3-30b", "--dry-run")
    assert "0 images" in kept.output
    result = call("prune", root, "--older-than", "30")
    assert f"{ARCH}/{old} {CU12}" in result.output
    assert keys_in(root) == {key for key in (image_for(*pair)[0] for pair in PAIRS) if key != old}


REFUSED = [
    ("no_such_root", ("list", "NONE"), 2, "does not exist"),
    ("verify_of_nothing", ("verify", "NONE"), 2, "does not exist"),
    ("dtype_of_no_model", ("verify", "--dtype", "fp8"), 2, "--model"),
    ("unknown_model", ("verify", "--model", "bert"), 2, "qwen3-30b"),
    ("unknown_model_to_keep", ("prune", "ROOT", "--keep-model", "bert"), 2, "qwen3-30b"),
    ("rank_of_no_model", ("verify", "--tp", "2"), 2, "--model"),
    ("no_such_rank", ("verify", "--model", "mixtral", "--tp", "3"), 2, "tp 3 does not divide"),
    ("no_version", ("verify", "--cuda", "R580"), 2, "like 12.4"),
    ("pack_without_images", ("pack", "EMPTY", "NONE.zip"), 1, "must hold images of this version"),
    ("pack_into_nowhere", ("pack", "ROOT", "NONE/images.zip"), 1, "No such file"),
    ("merge_without_images", ("merge", "EMPTY", "NONE.zip"), 1, "the sources hold none"),
    ("merge_of_one", ("merge", "ROOT"), 2, "Missing argument"),
    ("merge_of_other_files", ("merge", "TEXT", "NONE"), 1, "not a zip file"),
    ("merge_into_other_file", ("merge", "ROOT", "TEXT"), 1, "not a zip file"),
    ("prune_without_criteria", ("prune", "ROOT"), 2, "expected --keep-build"),
    ("prune_of_an_archive", ("prune", "ZIP", "--older-than", "1"), 1, "can't be written to"),
]


@pytest.mark.parametrize(
    ("words", "code", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_refused(root, archive, tmp_path, words, code, message):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "TEXT").write_text("no archive")
    root.rename(tmp_path / "ROOT")
    archive.rename(tmp_path / "ZIP")
    before = files_below(tmp_path)
    named = ("NONE", "EMPTY", "TEXT", "ROOT", "ZIP")
    result = call(*(tmp_path / w if w.startswith(named) else w for w in words))
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    assert files_below(tmp_path) == before


@pytest.mark.parametrize(
    "words", [("list", "ROOT"), ("pack", "ROOT", "x.zip"), ("merge", "ROOT", "out")], ids=str
)
def test_untrusted_root_is_refused(root, tmp_path, words):
    root.chmod(0o777)
    result = call(words[0], *(root if w == "ROOT" else tmp_path / w for w in words[1:]))
    assert result.exit_code == 1
    assert "images are code" in result.output


def test_damaged_image_is_not_merged_or_packed(root, tmp_path):
    damaged(root)
    for words in (("pack", root, tmp_path / "x.zip"), ("merge", root, tmp_path / "x.zip")):
        result = call(*words)
        assert result.exit_code == 1
        assert "is not what was written" in result.output
        assert not (tmp_path / "x.zip").exists()
