"""The machine a run was made on: its versions, and the ceilings it was seen to reach."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cutlass_moe.images.cache import default_cache
from cutlass_moe.operands import PACKINGS
from perf.peers import unpacked
from perf.timing import interleaved

STREAM_BYTES = 4 << 30
DENSE = 8192  # rows, columns and depth of the dense products
SECONDS = 1.5


@dataclass(frozen=True)
class Ceilings:
    """What the GPU was seen to reach: GB/s, TFLOP/s, and microseconds read for an empty kernel."""

    read_gbs: float
    copy_gbs: float
    fp8_tflops: float
    int8_tflops: float
    bf16_tflops: float
    empty_us: float

    def tflops(self, dtype: str) -> float:
        """Dense rate of a dtype.

        The tensor cores run INT8 as fast as FP8, the library that measures it does not, so that
        INT8 kernels are held to the faster of the two.
        """
        if dtype == "bf16" or dtype in PACKINGS:  # 4-bit weights are multiplied as bf16
            return self.bf16_tflops
        return max(self.fp8_tflops, self.int8_tflops) if dtype == "int8" else self.fp8_tflops


def versions() -> dict[str, str | list[str]]:
    """What a figure depends on besides the code. images: build identities of the cache's images."""
    peers = {name: installed(name) for name in ("triton", "vllm", "humming-kernels", "deep_gemm")}
    return {
        "driver": said_by(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"
        ),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda-bindings": installed("cuda-bindings"),
        **peers,
        **unpacked.versions(),
        "images": sorted({entry.record.build for entry in default_cache().entries()}),
    }


def checkout() -> str:
    """The commit that is checked out, with a + where files were changed since."""
    here = str(Path(__file__).parent)
    name = said_by("git", "-C", here, "rev-parse", "--short=12", "HEAD")
    changed = said_by("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return name + "+" * (name != "unknown" and bool(changed))


def installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def said_by(*command: str) -> str:
    """First line a program prints; "unknown" where it can't be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.partition("\n")[0].strip()


def ceilings() -> Ceilings:
    """Measures what this GPU reaches on streams of STREAM_BYTES and DENSE^3 products."""
    source = torch.randn(STREAM_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {
        "read": source.sum,
        "copy": lambda: target.copy_(source),
        "empty": lambda: torch.cuda._sleep(0),
        **dense_products(),
    }
    us = {name: timing.us for name, timing in interleaved(calls, SECONDS, None).items()}
    return Ceilings(
        read_gbs=round(STREAM_BYTES / us["read"] / 1e3, 1),
        copy_gbs=round(2 * STREAM_BYTES / us["copy"] / 1e3, 1),
        fp8_tflops=round(2 * DENSE**3 / us["fp8"] / 1e6, 1),
        int8_tflops=round(2 * DENSE**3 / us["int8"] / 1e6, 1),
        bf16_tflops=round(2 * DENSE**3 / us["bf16"] / 1e6, 1),
        empty_us=us["empty"],
    )


def dense_products() -> dict[str, Callable[[], object]]:
    """The vendor library's product of two random matrices for each dtype."""
    a, b = torch.randn(2, DENSE, DENSE, device="cuda")
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    ai, bi = (a * 40).to(torch.int8), (b * 40).to(torch.int8).t()
    ah, bh = a.bfloat16(), b.bfloat16().t()
    one = torch.ones((), device="cuda")
    bf16 = torch.bfloat16
    return {
        "fp8": lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=bf16, use_fast_accum=True),
        "int8": lambda: torch._int_mm(ai, bi),
        "bf16": lambda: ah @ bh,
    }
