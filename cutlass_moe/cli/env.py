"""`cutlass-moe env`: what is installed here, what is missing, and the command that mends it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from typing import Any

import click
import torch
from rich.table import Table

import cutlass_moe
from cutlass_moe import environment
from cutlass_moe.cli.common import console
from cutlass_moe.images.cache import default_cache, open_root
from cutlass_moe.images.roots import DamagedImage, UntrustedRoot, read_image
from cutlass_moe.images.toolchains import default_toolchain, driver_cuda
from emitters.spec.arch import ARCHS, arch_of
from emitters.spec.identity import TOOLCHAINS, installed_toolchains
from emitters.spec.image import IMAGE_ABI

PACKAGES = (
    *("torch", "nvidia-cutlass-dsl", "cuda-python", "triton"),
    *("transformers", "vllm", "sglang"),
)


def show(as_json: bool) -> None:
    report = gather()
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    table = Table("what", "found here", show_header=False)
    for name, value in _rows(report):
        table.add_row(name, value)
    console.print(table)
    for missing in report["missing"]:
        console.print(f"{missing['what']}\n  {missing['mend']}", markup=False)
    if not report["missing"]:
        console.print("Nothing is missing.")


def gather() -> dict[str, Any]:
    """All that `env` shows, as JSON types."""
    cuda = driver_cuda()
    report: dict[str, Any] = {
        "cutlass_moe": cutlass_moe.__version__,
        "image_abi": IMAGE_ABI,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "torch_cuda": torch.version.cuda,
        "driver_cuda": None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
        "gpus": [_gpu(device) for device in range(torch.cuda.device_count())],
        "toolchains": list(installed_toolchains()),
        "toolchain": default_toolchain(),
        "variables": {
            v.name: os.environ[v.name] for v in environment.VARIABLES if v.name in os.environ
        },
        "roots": [_root(path) for path in default_cache().roots],
    }
    report["missing"] = [{"what": what, "mend": mend} for what, mend in _missing(report, cuda)]
    return report


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu(device: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    arch = arch_of((properties.major, properties.minor))
    return {
        "name": properties.name,
        "arch": arch,
        "has_kernels": arch in ARCHS,
        "sms": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _root(path: Any) -> dict[str, Any]:
    """images: how many it holds. fault: why none of them can be used."""
    root, names, fault = open_root(path), [], None
    try:
        names = root.names()
        if names:
            with suppress(DamagedImage):  # of this one: `verify` checks each
                read_image(root, *names[0])
    except (DamagedImage, UntrustedRoot) as error:
        fault = str(error)
    writable = root.path == default_cache().root and default_cache().writable
    return {
        "path": str(path),
        "exists": os.path.exists(path),
        "writable": writable,
        "images": len(names),
        "fault": fault,
    }


def _missing(report: dict[str, Any], cuda: int | None) -> Iterator[tuple[str, str]]:
    """(what is missing, the command that mends it)"""
    install = "pip install 'cutlass-moe[{}]'"
    has_images = any(root["images"] for root in report["roots"])
    if report["torch_cuda"] is None and cuda is not None:
        yield "torch is a build without CUDA, but there is a CUDA driver.", "pip install torch"
    if cuda is None:
        yield (
            "There is no CUDA driver: images can be built, but only the PyTorch reference runs.",
            "run on a machine with an NVIDIA H100 or H200",
        )
    for gpu in report["gpus"]:
        if not gpu["has_kernels"]:
            yield (
                f"There are no kernels for {gpu['name']} ({gpu['arch']}), only for "
                f"{', '.join(ARCHS)}: PyTorch's slow path runs.",
                "run on a GPU of that architecture",
            )
    if not report["toolchains"] and environment.JIT.on():
        then = "" if has_images else ", and the roots hold no images"
        yield (
            f"The compiler is not installed{then}.",
            install.format("jit") + ", or name a root of images in CUTLASS_MOE_CACHE_DIR",
        )
    toolchain = report["toolchain"]
    if cuda is not None and toolchain and TOOLCHAINS[toolchain] > cuda // 1000:
        yield (
            f"The driver (CUDA {report['driver_cuda']}) loads no images of toolchain {toolchain}.",
            install.format("jit") if toolchain == "cu13" else "update the driver to R525 or newer",
        )
    if not environment.JIT.on() and not has_images:
        yield (
            "CUTLASS_MOE_JIT=0 forbids compiling, and the roots hold no images.",
            "cutlass-moe build --model MODEL --output DIR, and CUTLASS_MOE_CACHE_DIR=DIR",
        )
    for root in report["roots"]:
        if root["fault"]:
            yield (
                f"The root {root['path']} can't be used: {root['fault']}",
                f"chmod -R go-w {root['path']}, or build it anew",
            )
    if not report["roots"][-1]["writable"] and report["toolchains"] and environment.JIT.on():
        yield (
            f"Images that are compiled can't be kept: {report['roots'][-1]['path']} can't be "
            "written to.",
            "name a directory of yours last in CUTLASS_MOE_CACHE_DIR",
        )


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "cutlass_moe", f"{report['cutlass_moe']}, image ABI {report['image_abi']}"
    yield "python", f"{report['python']}, {report['platform']}"
    for name, version in report["packages"].items():
        yield name, version or "not installed"
    yield "torch's CUDA", report["torch_cuda"] or "none"
    yield "driver's CUDA", report["driver_cuda"] or "no driver"
    for gpu in report["gpus"]:
        kernels = "" if gpu["has_kernels"] else ", no kernels"
        size = f"{gpu['sms']} SMs, {gpu['memory_gib']} GiB"
        yield "GPU", f"{gpu['name']}, {gpu['arch']}, {size}{kernels}"
    if not report["gpus"]:
        yield "GPU", "none"
    toolchains = [f"{t}{' (used)' * (t == report['toolchain'])}" for t in report["toolchains"]]
    yield "compiler", ", ".join(toolchains) or "not installed"
    for root in report["roots"]:
        words = [f"{root['images']} images"]
        words += ["does not exist yet"] * (not root["exists"])
        words += ["written to"] * root["writable"] + ["not usable"] * bool(root["fault"])
        yield "root", f"{root['path']}: {', '.join(words)}"
    for name, value in report["variables"].items():
        yield name, value
