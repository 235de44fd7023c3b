"""Workers: what they compile, how they fail, and what becomes of the others then."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from cutlass_moe.images import compiler
from cutlass_moe.images.cache import Cache
from cutlass_moe.images.compiler import (
    CompileError,
    CompilerNotInstalled,
    Request,
    build_command,
    build_images,
    compile_image,
    compile_images,
    write_manifest,
)
from cutlass_moe.images.toolchains import default_build, default_toolchain
from emitters.spec.config_swap_sm90 import GemmSwapSm90Config
from emitters.spec.dtypes import Accumulation, DType
from emitters.spec.gemm import GemmProblem, Granularity, WeightFormat
from emitters.spec.identity import build_identity, installed_toolchains
from emitters.spec.registry import gemm_config_from_json
from tests.support import fake_worker

GOOD = GemmProblem(
    x=DType.E4M3,
    weight=WeightFormat(DType.E4M3),
    accumulation=Accumulation.FAST,
    out=DType.BF16,
    n=256,
    k=256,
    num_experts=4,
    gather=True,
    x_scale=Granularity.TOKEN,
    weight_scale=Granularity.CHANNEL,
)
CONFIG = GemmSwapSm90Config()
WIDER = GemmSwapSm90Config(tile_m=16)
ILLEGAL = GemmSwapSm90Config(tile_n=100)
needs_dsl = pytest.mark.skipif(default_build() is None, reason="needs nvidia-cutlass-dsl")


@pytest.fixture
def processes(monkeypatch):
    """Every worker process that is started."""
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    return started


@pytest.fixture
def fake_compiler(monkeypatch, tmp_path_factory):
    """Workers whose images are mere bytes, for what is not about the compiler."""
    program = fake_worker.executable(tmp_path_factory.mktemp("program"))
    monkeypatch.setattr(sys, "executable", program)


@pytest.fixture
def no_dsl(monkeypatch):
    monkeypatch.setattr("emitters.spec.identity._installed", lambda package: False)


@needs_dsl
def test_one_image(processes):
    image = compile_image(GOOD, CONFIG)
    record = image.record
    assert image.cubin.startswith(b"\x7fELF")
    assert record.cubin_sha256 == hashlib.sha256(image.cubin).hexdigest()
    assert (record.problem, record.config) == (GOOD.to_json(), CONFIG.to_json())
    assert (record.arch, record.build) == ("sm_90a", default_build())
    assert (record.threads, record.smem_bytes) == (CONFIG.threads, CONFIG.smem_bytes(GOOD))
    assert [process.returncode is not None for process in processes] == [True]


@needs_dsl
def test_images_of_two_workers_are_identical():
    first, second = compile_images([Request(GOOD, CONFIG)] * 2, jobs=2)
    assert first.image == second.image
    assert first.seconds > 0


@needs_dsl
def test_one_failure_leaves_the_others_alone(processes):
    asked = [Request(GOOD, config) for config in (CONFIG, ILLEGAL, WIDER)]
    results = {result.request: result for result in compile_images(asked, jobs=1)}
    assert [results[request].image is None for request in asked] == [False, True, False]
    failure = results[asked[1]]
    assert "tile_n must be" in failure.error
    assert failure.seconds is None
    assert len(processes) == 1


@needs_dsl
def test_a_dead_worker_is_replaced(processes, fake_compiler):
    workers = compiler._Workers(default_toolchain())
    try:
        with pytest.raises(CompileError, match="tile_n must be"):
            workers.compile(Request(GOOD, ILLEGAL), compiler.TIMEOUT)
        processes[0].kill()
        processes[0].wait()
        image, _ = workers.compile(Request(GOOD, CONFIG), compiler.TIMEOUT)
        assert image.record.config == CONFIG.to_json()
        assert len(processes) == 2
    finally:
        workers.close()


@needs_dsl
def test_worker_that_dies_at_work(monkeypatch):
    class Mortal(subprocess.Popen):
        """Killed as soon as it has been asked for something."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            flush = self.stdin.flush
            self.stdin.flush = lambda: (flush(), self.kill())

    monkeypatch.setattr(subprocess, "Popen", Mortal)
    with pytest.raises(CompileError, match="ended with exit code -9"):
        compile_image(GOOD, CONFIG)


@needs_dsl
def test_results_that_nobody_wants_end_the_workers(processes, fake_compiler):
    results = compile_images([Request(GOOD, CONFIG)] * 4, jobs=2)
    next(results)
    results.close()
    assert processes
    assert all(process.returncode is not None for process in processes)


@needs_dsl
def test_error_has_the_reason_and_the_workers_stderr():
    with pytest.raises(CompileError, match="ValueError: tile_n must be") as caught:
        compile_image(GOOD, ILLEGAL)
    assert "Traceback" in str(caught.value)


@needs_dsl
def test_hanging_worker_is_killed(processes):
    with pytest.raises(CompileError, match="killed after 0.01 s"):
        compile_image(GOOD, CONFIG, timeout=0.01)
    results = list(compile_images([Request(GOOD, CONFIG)] * 2, jobs=1, timeout=0.01))
    assert ["killed after 0.01 s" in result.error for result in results] == [True, True]
    assert len(processes) == 3


@needs_dsl
def test_worker_that_cannot_start(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    (result,) = compile_images([Request(GOOD, CONFIG)])
    assert "no compile worker could be started" in result.error
    with pytest.raises(CompileError, match="no compile worker could be started"):
        compile_image(GOOD, CONFIG)


def test_without_the_dsl_the_error_names_the_extra(no_dsl):
    for attempt in (
        lambda: compile_image(GOOD, CONFIG),
        lambda: list(compile_images([Request(GOOD, CONFIG)])),
    ):
        with pytest.raises(CompilerNotInstalled, match=r"pip install 'cutlass-moe\[jit\]'"):
            attempt()


def test_nothing_to_do():
    assert list(compile_images([], jobs=1)) == []


def test_worker_environment(monkeypatch):
    monkeypatch.setenv("CUTE_DSL_LINEINFO", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    environment = compiler._environment("sm_90a")
    assert environment["CUTE_DSL_ARCH"] == "sm_90a"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUTE_DSL_LINEINFO" not in environment
    first, *rest = environment["PYTHONPATH"].split(os.pathsep)
    assert os.path.exists(os.path.join(first, "emitters", "__main__.py"))
    assert rest == ["/mine"]


@needs_dsl
def test_build_images_compiles_what_the_cache_lacks(tmp_path):
    cache = Cache([tmp_path])
    asked = [Request(GOOD, CONFIG), Request(GOOD, ILLEGAL), Request(GOOD, CONFIG)]
    good, bad = sorted(build_images(cache, asked), key=lambda result: result.image is None)
    assert (good.request, bad.request) == tuple(asked[:2])
    assert good.seconds is not None
    assert cache.load("sm_90a", asked[0].key, default_build()) == good.image
    (again,) = build_images(Cache([tmp_path]), asked[:1])
    assert again.image == good.image
    assert again.seconds is None


@needs_dsl
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the cache's own
def test_image_that_cannot_be_written_is_a_failure(tmp_path, fake_compiler):
    (tmp_path / "sm_90a").write_text("in the way")
    (result,) = build_images(Cache([tmp_path]), [Request(GOOD, CONFIG)])
    assert result.image is None
    assert "could not be written" in result.error


def test_build_images_serves_what_is_there_without_the_dsl(tmp_path, no_dsl):
    with pytest.raises(CompilerNotInstalled):
        list(build_images(Cache([tmp_path]), [Request(GOOD, CONFIG)]))
    assert list(build_images(Cache([tmp_path]), [])) == []


@needs_dsl
@pytest.mark.parametrize("toolchain", installed_toolchains())
def test_build_images_of_a_toolchain(tmp_path, toolchain):
    (result,) = build_images(Cache([tmp_path]), [Request(GOOD, CONFIG)], toolchain=toolchain)
    assert result.image.record.build == build_identity(toolchain)
    assert f" {toolchain} " in result.image.record.build
    abi = result.image.cubin[8]  # the ELF header's byte for the ABI's version
    assert abi == {"cu12": 7, "cu13": 8}[toolchain]


def test_toolchain_that_is_not_installed(tmp_path, monkeypatch):
    """It is an error even where images of another toolchain are there."""
    monkeypatch.setattr(
        "emitters.spec.identity._installed", lambda package: not package.endswith("cu13")
    )
    for requests in ([Request(GOOD, CONFIG)], []):
        with pytest.raises(CompilerNotInstalled, match=r"cu13 is not .*, cu12 is: .*\[jit-cu13\]"):
            list(build_images(Cache([tmp_path]), requests, toolchain="cu13"))


@needs_dsl
def test_builds_side_by_side_compile_an_image_once(tmp_path, fake_compiler):
    def build():
        return list(build_images(Cache([tmp_path]), [Request(GOOD, CONFIG)]))

    with ThreadPoolExecutor() as pool:
        builds = [pool.submit(build) for _ in range(3)]
    results = [result for done in builds for result in done.result()]
    assert [result.error for result in results] == [None] * 3
    assert sorted(result.seconds is None for result in results) == [False, True, True]


@needs_dsl
def test_manifest(tmp_path, fake_compiler):
    requests = [Request(GOOD, CONFIG), Request(GOOD, WIDER)]
    root, other = tmp_path / "built", tmp_path / "stored"
    results = {r.request.config: r for r in build_images(Cache([root]), requests)}
    for request in reversed(requests):
        image = results[request.config].image
        Cache([other]).store(request.arch, request.key, image)
    manifest = write_manifest(root)
    assert manifest.read_bytes() == write_manifest(other).read_bytes()
    listed = json.loads(manifest.read_text())["images"]
    assert {image["key"] for image in listed} == {request.key for request in requests}
    for image in listed:
        built = results[gemm_config_from_json(image["config"])]
        assert GemmProblem.from_json(image["problem"]) == GOOD
        assert image["bytes"] == len(built.image.cubin)
        assert (image["arch"], image["build"]) == ("sm_90a", default_build())


def test_build_command_says_it_all():
    words = shlex.split(build_command(GOOD, CONFIG))
    assert words[:2] == ["cutlass-moe", "build"]
    options = dict(zip(words[2::2], words[3::2], strict=True))
    assert GemmProblem.from_json(json.loads(options["--problem"])) == GOOD
    assert gemm_config_from_json(json.loads(options["--config"])) == CONFIG
    assert options["--arch"] == "sm_90a"


ASKED = {"problem": GOOD.to_json(), "config": CONFIG.to_json(), "arch": "sm_90a"}
ASKED |= {"toolchain": "cu11", "output": "."}
MALFORMED = [
    ("not_json", "nonsense", "JSONDecodeError"),
    ("empty", "{}", "KeyError"),
    ("list", "[]", "TypeError"),
    ("other_op", json.dumps({"problem": {"op": "sort"}}), "grouped_gemm"),
    ("no_config", json.dumps({"problem": GOOD.to_json()}), "config"),
    ("toolchain", json.dumps(ASKED), "nvidia-cutlass-dsl-libs-cu11, which is not installed"),
]


def test_worker_answers_every_line_and_ends_with_its_input():
    lines = "\n".join(line for _, line, _ in MALFORMED) + "\n"
    ended = subprocess.run(
        [sys.executable, "-m", "emitters"],
        input=lines,
        capture_output=True,
        text=True,
        env=compiler._environment("sm_90a"),
        check=True,
    )
    answers = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [answer["ok"] for answer in answers] == [False] * len(MALFORMED)
    for (name, _, reason), answer in zip(MALFORMED, answers, strict=True):
        assert reason in answer["error"], name
