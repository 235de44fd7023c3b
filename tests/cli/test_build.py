"""`cutlass-moe build` as operators meet it: interrupted, killed, twice at once, as an archive."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from click.testing import CliRunner

from cutlass_moe.choose.heuristics_sm90 import every_config
from cutlass_moe.cli import main as cli
from cutlass_moe.images.cache import Cache
from cutlass_moe.images.toolchains import default_build
from cutlass_moe.models.problems import model_problems
from cutlass_moe.models.shapes import MoeShape
from tests.support import fake_worker
from tests.support.fake_images import ARCH, image_for

pytestmark = pytest.mark.skipif(default_build() is None, reason="needs nvidia-cutlass-dsl")
LISTED = {"name": "small", "num_experts": 8, "top_k": 2, "hidden": 256, "inter": 128}
SHAPE = MoeShape(**LISTED)
ASKED = [
    (problem, config)
    for problem in model_problems(SHAPE, "int8").values()
    for config in every_config(problem)
]
IMAGES = len(ASKED)
# What is tested is not the compiler: all but some small kernels are there, as mere bytes.
SMALL = [problem for problem, _ in ASKED if problem.op in ("route", "combine", "quantize")]
BUILT = [next(pair for pair in ASKED if pair[0] == problem) for problem in dict.fromkeys(SMALL)]
TO_BUILD = len(BUILT)
# The build's workers are those of tests/support/fake_worker.py.
PROGRAM = """
import sys
from cutlass_moe.cli.main import main
sys.executable = sys.argv.pop(1)
main()
"""


@pytest.fixture
def words(tmp_path) -> list[str]:
    """The command line of a small build into tmp_path / "root"."""
    (tmp_path / "shapes.json").write_text(json.dumps([LISTED]))
    store_others(tmp_path / "root")
    where = ["--shapes", str(tmp_path / "shapes.json"), "--output", str(tmp_path / "root")]
    return ["build", *where, "--dtype", "int8", "--jobs", "2"]


def store_others(root: Path, to_build: int = TO_BUILD) -> None:
    """All images but those that the first `to_build` of BUILT ask for."""
    for problem, config in ASKED:
        if (problem, config) not in BUILT[:to_build]:
            Cache([root]).store(ARCH, *image_for(problem, config, default_build()))


@pytest.fixture
def fake_program(tmp_path) -> str:
    return fake_worker.executable(tmp_path)


@pytest.fixture
def permits(tmp_path, monkeypatch) -> Iterable[Callable[[int], object]]:
    """Lets the workers of builds make so many images more."""
    fifo = tmp_path / "permits"
    os.mkfifo(fifo)
    monkeypatch.setenv(fake_worker.PERMITS, str(fifo))
    descriptor = os.open(fifo, os.O_RDWR)  # so that nobody meets its end
    yield lambda count: os.write(descriptor, bytes(count))
    os.close(descriptor)


def start(program: str, words: list[str]) -> subprocess.Popen[str]:
    """A build whose workers run this program. Ctrl-C reaches it even where this process was
    started to ignore it."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, program, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(program: str, words: list[str]) -> int:
    """Runs a build to its end, in this process. Returns how many images it compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", program)
        result = CliRunner().invoke(cli.main, [*words, "--jobs", "1"])
    assert result.exit_code == 0, result.output
    return compiled(result.output)


def compiled(output: str) -> int:
    return int(re.search(r"(\d+) compiled now", output)[1])


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until a running build has come that far; fails where it ended before."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def images(root: Path) -> int:
    return len(list(root.glob("sm_90a/*/launch.json")))


def children(pid: int) -> list[int]:
    """Processes that any thread of this one has started."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def wait_for_end(processes: Iterable[int]) -> None:
    """Of processes that are nobody's children here: a pidfd is readable once its process ends."""
    for process in processes:
        select.select([process], [], [])
        os.close(process)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Both workers of a build, once they are there."""
    wait_for(lambda: len(children(process.pid)) == 2, process)
    return children(process.pid)


@pytest.mark.filterwarnings("error")  # of a damaged image
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_build_that_was_ended_goes_on(tmp_path, words, fake_program, permits, blow):
    root = tmp_path / "root"
    process = start(fake_program, words)
    workers = [os.pidfd_open(pid) for pid in workers_of(process)]
    permits(1)
    wait_for(lambda: images(root) > IMAGES - TO_BUILD, process)
    process.send_signal(blow)
    output, _ = process.communicate()
    assert process.returncode == (130 if blow == signal.SIGINT else -blow)
    assert ("Interrupted: the same command goes on" in output) == (blow == signal.SIGINT)
    permits(2 * TO_BUILD)  # what was at work when its build was killed ends when that is done
    wait_for_end(workers)
    assert len(list(Cache([root]).entries())) == IMAGES - TO_BUILD + 1
    assert not (root / "manifest.json").exists()
    assert finish(fake_program, words) == TO_BUILD - 1
    assert len(list(Cache([root]).entries())) == IMAGES


def test_killed_worker_costs_one_image(tmp_path, words, fake_program, permits):
    process = start(fake_program, words)
    worker, _ = workers_of(process)
    permits(1)
    wait_for(lambda: images(tmp_path / "root") > IMAGES - TO_BUILD, process)
    os.kill(worker, signal.SIGSTOP)  # at work, or it will be given some
    permits(TO_BUILD)
    wait_for(lambda: images(tmp_path / "root") == IMAGES - 1, process)
    os.kill(worker, signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == 1
    assert output.count("Failed:") == 1
    assert "the compile worker ended with exit code -9" in output
    assert compiled(output) == TO_BUILD - 1
    permits(1)
    assert finish(fake_program, words) == 1


def test_two_builds_at_once_share_the_work(tmp_path, words, fake_program):
    processes = [start(fake_program, [*words, "--jobs", "1"]) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum(map(compiled, outputs)) == TO_BUILD
    assert len(list(Cache([tmp_path / "root"]).entries())) == IMAGES


def test_archive(tmp_path, words):
    """It is packed from a directory that is kept, so that a later build adds to it."""
    archive, root = tmp_path / "images.zip", tmp_path / "images.zip.build"
    store_others(root, 2)
    for count in (2, 0):
        result = CliRunner().invoke(cli.main, [*words, "--output", str(archive)])
        assert result.exit_code == 0, result.output
        assert compiled(result.output) == count
        assert f"{IMAGES} images packed into {archive}" in result.output.replace("\n", "")
    packed = [entry.key for entry in Cache([archive]).entries()]
    manifest = json.loads((root / "manifest.json").read_text())["images"]
    assert len(packed) == IMAGES
    assert sorted(packed) == sorted(image["key"] for image in manifest)


def test_what_a_killed_build_left_is_removed_a_day_later(tmp_path, words, monkeypatch):
    store_others(tmp_path / "root", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    old, new = tmp_path / "temporary/cutlass_moe_old", tmp_path / "temporary/cutlass_moe_new"
    for home in (old, new):
        (home / "work").mkdir(parents=True)
    os.utime(old, (time.time() - 90_000,) * 2)
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "temporary").iterdir()) == [new]


def test_nothing_is_packed_after_a_failure(tmp_path, words, monkeypatch):
    archive = tmp_path / "images.zip"
    monkeypatch.setattr(cli, "build_images", fail)
    result = CliRunner().invoke(cli.main, [*words, "--output", str(archive)])
    assert result.exit_code == 1
    assert result.output.count("no luck") == IMAGES
    assert not archive.exists()


def fail(cache, requests, jobs, toolchain):
    for request in requests:
        yield cli.Result(request, None, None, "no luck")
