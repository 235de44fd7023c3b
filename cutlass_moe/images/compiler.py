"""Compiles kernel images in worker processes: the DSL never enters this one."""

from __future__ import annotations

import functools
import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emitters
from cutlass_moe.images.cache import Cache
from cutlass_moe.images.toolchains import default_toolchain
from emitters.spec.arch import DEFAULT_ARCH
from emitters.spec.identity import build_identity, installed_toolchains
from emitters.spec.image import Image, LaunchRecord, image_key
from emitters.spec.registry import Config, Problem

TIMEOUT = 120.0  # seconds an image may take: a hundred times what the slowest does
STALE_SECONDS = 86_400.0  # a worker's directory that old was left by a build that was killed
_HOMES = "cutlass_moe_"  # how the names of workers' directories begin
STDERR_TAIL = 4000  # characters of a worker's stderr that an error shows


class CompileError(RuntimeError):
    """An image could not be compiled."""


class CompilerNotInstalled(CompileError):
    """The DSL is not installed here."""


@dataclass(frozen=True)
class Request:
    """An image to compile."""

    problem: Problem
    config: Config
    arch: str = DEFAULT_ARCH

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
    problem: Problem, config: Config, arch: str = DEFAULT_ARCH, timeout: float = TIMEOUT
) -> Image:
    """Compiles one image in a worker of its own, within `timeout` seconds.

    Raises CompilerNotInstalled without nvidia-cutlass-dsl, CompileError with the worker's last
    words else.
    """
    with _Worker(arch, _installed_toolchain()) as worker:
        image, _ = worker.compile(Request(problem, config, arch), timeout)
    return image


def compile_ptx(problem: Problem, config: Config, arch: str = DEFAULT_ARCH) -> str:
    """The PTX of a kernel, compiled anew, with `.loc` lines that name the emitters' source.

    Raises what `compile_image` raises.
    """
    with _Worker(arch, _installed_toolchain()) as worker:
        return worker.compile_ptx(Request(problem, config, arch), TIMEOUT)


def compile_images(
    requests: Iterable[Request], jobs: int | None = None, timeout: float = TIMEOUT
) -> Generator[Result, None, None]:
    """Compiles images in `jobs` long-lived workers (default: one a core), in order of completion.

    A request that fails, or whose worker dies or takes longer than `timeout` seconds, gives a
    Result with an error; the others go on. Raises CompilerNotInstalled without nvidia-cutlass-dsl.
    """

    def compile_one(request: Request, workers: _Workers) -> Result:
        return Result(request, *workers.compile(request, timeout))

    return _in_workers(compile_one, requests, jobs, _installed_toolchain())


def build_images(
    cache: Cache, requests: Iterable[Request], jobs: int | None = None, toolchain: str | None = None
) -> Generator[Result, None, None]:
    """Brings an image for each request into a cache: results of those it has, then of the others.

    toolchain: "cu12" or "cu13", default `default_toolchain()`. Of several processes that build into
    one root, one compiles an image. A failure is a Result with an error. Raises
    CompilerNotInstalled where the toolchain asked for is not installed, or none is and something
    is missing.
    """
    build = build_identity(_installed_toolchain(toolchain) if toolchain else default_toolchain())
    missing = []
    for request in dict.fromkeys(requests):
        image = cache.load(request.arch, request.key, build)
        if image is None:
            missing.append(request)
        else:
            yield Result(request, image, None)
    if missing:
        toolchain = _installed_toolchain(toolchain)
        assert build  # of an installed toolchain
        build_one = functools.partial(_build_one, cache, build)
        yield from _in_workers(build_one, missing, jobs, toolchain)


def write_manifest(root: Path) -> Path:
    """Writes ROOT/manifest.json and returns its path: what images a root holds, in plain text.

    Of each image its problem, config, arch, key, build identity and the bytes of its cubin. Equal
    images give equal files. Raises OSError.
    """
    images = [
        {
            "problem": entry.record.problem,
            "config": entry.record.config,
            "arch": entry.arch,
            "key": entry.key,
            "build": entry.record.build,
            "bytes": entry.cubin_bytes,
        }
        for entry in Cache([root]).entries()
    ]
    images.sort(key=json.dumps)
    manifest, fresh = root / "manifest.json", root / f".manifest-{os.getpid()}"
    fresh.write_text(json.dumps({"images": images}, indent=1) + "\n")
    return fresh.replace(manifest)


def _build_one(cache: Cache, build: str, request: Request, workers: _Workers) -> Result:
    seconds: float | None = None

    def compile_one() -> Image:
        nonlocal seconds
        image, seconds = workers.compile(request, TIMEOUT)
        return image

    image = cache.load_or_build(request.arch, request.key, compile_one, build)
    try:
        if Cache([cache.root]).load(request.arch, request.key, build) is None:
            cache.store(request.arch, request.key, image)  # it is in memory only: say why
    except OSError as error:
        return Result(request, None, None, f"could not be written: {error}")
    return Result(request, image, seconds)


def _in_workers(
    task: Callable[[Request, _Workers], Result],
    requests: Iterable[Request],
    jobs: int | None,
    toolchain: str,
) -> Generator[Result, None, None]:
    """Results of a task that compiles, in order of completion; errors of its own become Results."""

    def attempt(request: Request) -> Result:
        try:
            return task(request, workers)
        except (CompileError, ValueError) as error:  # ValueError: emitters changed since it began
            return Result(request, None, None, str(error))

    _remove_stale_homes()
    workers = _Workers(toolchain)
    pool = ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0)))
    futures = [pool.submit(attempt, request) for request in requests]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        workers.close()  # ends what is being compiled when the caller has lost interest
        pool.shutdown()
        workers.close()


def build_command(problem: Problem, config: Config, arch: str = DEFAULT_ARCH) -> str:
    """The shell command that builds exactly this image into the writable root of the cache."""
    compact = [json.dumps(part.to_json(), separators=(",", ":")) for part in (problem, config)]
    return shlex.join(
        ["cutlass-moe", "build", "--problem", compact[0], "--config", compact[1], "--arch", arch]
    )


def _installed_toolchain(name: str | None = None) -> str:
    """The toolchain of this name, or the default one. Raises CompilerNotInstalled."""
    installed = installed_toolchains()
    toolchain = name or default_toolchain()
    if not installed or not toolchain:
        raise CompilerNotInstalled(
            "nvidia-cutlass-dsl is not installed: `pip install 'cutlass-moe[jit]'`, or name a "
            "directory of images built elsewhere in CUTLASS_MOE_CACHE_DIR"
        )
    if toolchain not in installed:
        extra = "jit-cu13" if toolchain == "cu13" else "jit"
        raise CompilerNotInstalled(
            f"toolchain {toolchain} is not installed here, {' and '.join(installed)} is: "
            f"`pip install 'cutlass-moe[{extra}]'`"
        )
    return toolchain


def _remove_stale_homes() -> None:
    """Removes what this user's builds left behind that were killed, a day later."""
    for home in Path(tempfile.gettempdir()).glob(f"{_HOMES}*"):
        with suppress(FileNotFoundError):  # another build was faster
            status = home.lstat()
            stale = time.time() - status.st_mtime > STALE_SECONDS
            if stale and status.st_uid == os.geteuid() and home.is_dir():
                shutil.rmtree(home, ignore_errors=True)


class _Worker:
    """A running `python -m emitters` in an empty directory, with no GPU in sight."""

    def __init__(self, arch: str, toolchain: str) -> None:
        self.arch = arch
        self._toolchain = toolchain
        self._heard = 0
        try:
            self._home = tempfile.TemporaryDirectory(prefix=_HOMES)
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
        with self._compiled(request, timeout, ptx=False) as (output, seconds):
            cubin = Path(output, "kernel.cubin").read_bytes()
            record = LaunchRecord.from_json(Path(output, "launch.json").read_text())
            return Image(cubin, record), seconds

    def compile_ptx(self, request: Request, timeout: float) -> str:
        """The PTX. Raises as `compile` does."""
        with self._compiled(request, timeout, ptx=True) as (output, _):
            return Path(output, "kernel.ptx").read_text()

    @contextmanager
    def _compiled(self, request: Request, timeout: float, ptx: bool) -> Iterator[tuple[str, float]]:
        """The directory of what was compiled, and the seconds it took."""
        plain = {
            "problem": request.problem.to_json(),
            "config": request.config.to_json(),
            "arch": request.arch,
            "toolchain": self._toolchain,
            "ptx": ptx,
        }
        try:
            self._heard = self._stderr.stat().st_size
            with tempfile.TemporaryDirectory(dir=self._home.name) as output:
                answer = self._ask({**plain, "output": output}, timeout)
                if not answer["ok"]:
                    raise CompileError(f"{answer['error']}\n{self._last_words()}")
                yield output, answer["seconds"]
        except (OSError, ValueError) as error:  # no space, or emitters of another image ABI
            raise CompileError(f"{type(error).__name__}: {error}") from error

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

    def __init__(self, toolchain: str) -> None:
        self._toolchain = toolchain
        self._all: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def compile(self, request: Request, timeout: float) -> tuple[Image, float]:
        """What `_Worker.compile` gives and raises."""
        worker = self._take(request.arch)
        try:
            return worker.compile(request, timeout)
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
            worker = _Worker(arch, self._toolchain)
            self._all.append(worker)
        return worker


def _environment(arch: str) -> dict[str, str]:
    """The parent's environment, less what would change the code that is generated."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CUTE_DSL_")}
    parent = str(Path(emitters.__file__).parents[1])
    path = os.pathsep.join(filter(None, [parent, os.environ.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "CUTE_DSL_ARCH": arch, "CUDA_VISIBLE_DEVICES": ""}
