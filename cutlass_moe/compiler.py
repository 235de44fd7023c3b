"""Compiles kernel images in worker processes: the DSL never enters this one."""

from __future__ import annotations

import json
import os
import queue
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emitters
from cutlass_moe.cache import Cache
from emitters.config import Config
from emitters.image import Image, LaunchRecord, build_identity, image_key
from emitters.problem import GemmProblem

TIMEOUT = 120.0  # seconds an image may take: a hundred times what the slowest does
STDERR_TAIL = 4000  # characters of a worker's stderr that an error shows


class CompileError(RuntimeError):
    """An image could not be compiled."""


class CompilerNotInstalled(CompileError):
    """The DSL is not installed here."""


@dataclass(frozen=True)
class Request:
    """An image to compile."""

    problem: GemmProblem
    config: Config
    arch: str = "sm_90a"

    @property
    def key(self) -> str:
        return image_key(self.problem, self.config, self.arch)


@dataclass(frozen=True)
class Result:
    """What became of a request: an image, or an error in words.

    seconds: of compiling, None where nothing was compiled.
    """

    request: Request
    image: Image | None
    seconds: float | None
    error: str | None = None


def compile_image(
    problem: GemmProblem, config: Config, arch: str = "sm_90a", timeout: float = TIMEOUT
) -> Image:
    """Compiles one image in a worker of its own, within `timeout` seconds.

    Raises CompilerNotInstalled without nvidia-cutlass-dsl, CompileError with the worker's last
    words else.
    """
    _require_dsl()
    with _Worker(arch) as worker:
        image, _ = worker.compile(Request(problem, config, arch), timeout)
    return image


def compile_images(
    requests: Iterable[Request], jobs: int | None = None, timeout: float = TIMEOUT
) -> Iterator[Result]:
    """Compiles images in `jobs` long-lived workers (default: one a core), in order of completion.

    A request that fails, or whose worker dies or takes longer than `timeout` seconds, gives a
    Result with an error; the others go on. Raises CompilerNotInstalled without nvidia-cutlass-dsl.
    """
    _require_dsl()
    workers = _Workers()
    pool = ThreadPoolExecutor(jobs or os.cpu_count())
    futures = [pool.submit(workers.compile, request, timeout) for request in requests]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        workers.close()  # ends what is being compiled when the caller has lost interest
        pool.shutdown()
        workers.close()


def build_images(
    cache: Cache, requests: Iterable[Request], jobs: int | None = None
) -> Iterator[Result]:
    """Brings an image for each request into a cache: results of those it has, then of the others.

    A failure is a Result with an error. Raises CompilerNotInstalled where something is missing and
    nvidia-cutlass-dsl is not installed.
    """
    build = build_identity()
    missing = []
    for request in dict.fromkeys(requests):
        image = cache.load(request.arch, request.key, build)
        if image is None:
            missing.append(request)
        else:
            yield Result(request, image, None)
    for result in compile_images(missing, jobs) if missing else ():
        yield _stored(cache, result)


def _stored(cache: Cache, result: Result) -> Result:
    if result.image is not None:
        try:
            cache.store(result.request.arch, result.request.key, result.image)
        except OSError as error:
            return Result(result.request, None, None, f"could not be written: {error}")
    return result


def build_command(problem: GemmProblem, config: Config, arch: str = "sm_90a") -> str:
    """The shell command that builds exactly this image into the writable root of the cache."""
    compact = [json.dumps(part.to_json(), separators=(",", ":")) for part in (problem, config)]
    return shlex.join(
        ["cutlass-moe", "build", "--problem", compact[0], "--config", compact[1], "--arch", arch]
    )


def _require_dsl() -> None:
    if build_identity() is None:
        raise CompilerNotInstalled(
            "nvidia-cutlass-dsl is not installed: `pip install 'cutlass-moe[jit]'`, or name a "
            "directory of images built elsewhere in CUTLASS_MOE_CACHE_DIR"
        )


class _Worker:
    """A running `python -m emitters` in an empty directory, with no GPU in sight."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self._heard = 0
        try:
            self._home = tempfile.TemporaryDirectory(prefix="cutlass_moe_")
            self._stderr = Path(self._home.name, "stderr")
            work = Path(self._home.name, "work")
            work.mkdir()
            with self._stderr.open("wb") as stderr:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "emitters"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    cwd=work,
                    env=_environment(arch),
                    text=True,
                    start_new_session=True,  # Ctrl-C is the parent's, which ends its workers
                )
        except OSError as error:
            raise CompileError(f"no compile worker could be started: {error}") from error

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def compile(self, request: Request, timeout: float) -> tuple[Image, float]:
        """The image and the seconds it took. Raises CompileError; a worker that hangs is killed."""
        plain = {
            "problem": request.problem.to_json(),
            "config": request.config.to_json(),
            "arch": request.arch,
        }
        try:
            self._heard = self._stderr.stat().st_size
            with tempfile.TemporaryDirectory(dir=self._home.name) as output:
                answer = self._ask({**plain, "output": output}, timeout)
                if not answer["ok"]:
                    raise CompileError(f"{answer['error']}\n{self._last_words()}")
                cubin = Path(output, "kernel.cubin").read_bytes()
                record = LaunchRecord.from_json(Path(output, "launch.json").read_text())
        except (OSError, ValueError) as error:  # no space, or emitters of another image ABI
            raise CompileError(f"{type(error).__name__}: {error}") from error
        return Image(cubin, record), answer["seconds"]

    def close(self) -> None:
        # Killed, not asked: an image is complete before its answer, and the DSL exits slowly.
        self._process.kill()
        with suppress(BrokenPipeError), self._process:
            pass
        self._home.cleanup()

    def _ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        start = time.monotonic()
        timer = threading.Timer(timeout, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:  # a broken pipe: it died before it read the request
            line = ""
        finally:
            timer.cancel()
        if not line.endswith("\n"):
            code = self._process.wait()
            late = time.monotonic() - start >= timeout
            end = f"was killed after {timeout} s" if late else f"ended with exit code {code}"
            raise CompileError(f"the compile worker {end}\n{self._last_words()}")
        return json.loads(line)

    def _last_words(self) -> str:
        """The end of what this request, not an earlier one, left on stderr."""
        text = self._stderr.read_bytes()[self._heard :].decode(errors="replace")
        return text[-STDERR_TAIL:]


class _Workers:
    """Idle workers for several threads; one that died is replaced at the next request."""

    def __init__(self) -> None:
        self._all: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def compile(self, request: Request, timeout: float) -> Result:
        try:
            worker = self._take(request.arch)
        except CompileError as error:
            return Result(request, None, None, str(error))
        try:
            image, seconds = worker.compile(request, timeout)
            return Result(request, image, seconds)
        except CompileError as error:
            return Result(request, None, None, str(error))
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        for worker in self._all:
            worker.close()

    def _take(self, arch: str) -> _Worker:
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = None
        if worker is None or not worker.alive or worker.arch != arch:
            if worker is not None:
                worker.close()
            worker = _Worker(arch)
            self._all.append(worker)
        return worker


def _environment(arch: str) -> dict[str, str]:
    """The parent's environment, less what would change the code that is generated."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CUTE_DSL_")}
    parent = str(Path(emitters.__file__).parents[1])
    path = os.pathsep.join(filter(None, [parent, os.environ.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "CUTE_DSL_ARCH": arch, "CUDA_VISIBLE_DEVICES": ""}
