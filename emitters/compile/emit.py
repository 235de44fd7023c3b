"""Compiles kernels, in this file only: (problem, config, arch) -> kernel image.

It needs the CUTLASS DSL, but neither a GPU nor a CUDA toolkit. A process must compile one kernel at
a time: two threads in the DSL's compiler abort the interpreter.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from emitters.compile.cubin import CubinFacts, read_cubin
from emitters.compile.toolchain import load_toolchain, loaded_toolchain
from emitters.spec.arch import DEFAULT_ARCH
from emitters.spec.identity import build_identity
from emitters.spec.image import IMAGE_ABI, TENSOR_MAP_BYTES, Image, LaunchRecord, Param, ParamKind
from emitters.spec.registry import Config, Problem, find_template, why_illegal

if TYPE_CHECKING:
    from emitters.templates.parameters import Argument

_SIZES = {ParamKind.TENSOR_MAP: TENSOR_MAP_BYTES, ParamKind.POINTER: 8, ParamKind.INT32: 4}


def emit(
    problem: Problem, config: Config, arch: str = DEFAULT_ARCH, toolchain: str | None = None
) -> Image:
    """Compiles one kernel; raises ValueError, with the reason, if problem and config are illegal.

    toolchain: "cu12" or "cu13", one per process; default: the loaded one, or the DSL's choice.
    """
    return _emit(problem, config, arch, toolchain=toolchain)[0]


def emit_ptx(
    problem: Problem,
    config: Config,
    arch: str = DEFAULT_ARCH,
    line_info: bool = True,
    toolchain: str | None = None,
) -> tuple[LaunchRecord, str]:
    """The kernel that `emit` writes as PTX.

    line_info: with `.loc` lines that name the Python source, which take as long as all the rest.
    """
    more_options = "--generate-line-info" if line_info else ""
    image, ptx = _emit(problem, config, arch, more_options, toolchain)
    return image.record, ptx


def _emit(
    problem: Problem,
    config: Config,
    arch: str,
    more_options: str = "",
    toolchain: str | None = None,
) -> tuple[Image, str]:
    reason = why_illegal(problem, config, arch)
    if reason:
        raise ValueError(reason)
    template = _template(problem, config, arch, toolchain)
    arguments = template.arguments()
    cubin, ptx = _compile(template, arguments, more_options)
    facts = read_cubin(cubin)
    record = LaunchRecord(
        symbol=facts.symbol,
        params=_params(arguments, facts),
        tensor_maps=template.tensor_maps(),
        smem_bytes=template.smem_bytes,
        threads=config.threads,
        cluster=(template.cluster, 1, 1),
        arch=arch,
        abi=IMAGE_ABI,
        registers=facts.registers,
        spill_bytes=facts.local_bytes,
        build=build_identity(loaded_toolchain()) or "",
        problem=problem.to_json(),
        config=config.to_json(),
        cubin_sha256=hashlib.sha256(cubin).hexdigest(),
    )
    return Image(cubin, record), ptx


def param_kinds(
    problem: Problem, config: Config, arch: str = DEFAULT_ARCH
) -> list[tuple[str, ParamKind]]:
    """The names and kinds of a kernel's parameters, in order. Loads the DSL."""
    return _named(_template(problem, config, arch).arguments())


def _named(arguments: Sequence[Argument]) -> list[tuple[str, ParamKind]]:
    return [param for argument in arguments for param in argument.params]


def _params(arguments: Sequence[Argument], facts: CubinFacts) -> tuple[Param, ...]:
    named = _named(arguments)
    sizes = [_SIZES[kind] for _, kind in named]
    if sizes != [size for _, size in facts.params]:
        raise AssertionError(
            f"the cubin's parameters must have the sizes {sizes}, got (offset, size) {facts.params}"
        )
    return tuple(
        Param(name, kind, offset, size)
        for (name, kind), (offset, size) in zip(named, facts.params, strict=True)
    )


def _template(problem: Problem, config: Config, arch: str, toolchain: str | None = None) -> Any:
    """The instance of the template that writes this kernel; imports the DSL.

    It has `__call__` and `kernel`, `arguments()` for `__call__` (grid and stream follow them),
    `tensor_maps()`, `smem_bytes` and `cluster`.
    """
    os.environ["CUTE_DSL_ARCH"] = arch  # which the DSL reads when it is imported
    if toolchain:
        load_toolchain(toolchain)
    template = find_template(problem, config)
    assert template is not None
    module, _, name = template.source.partition(":")
    cls: Any = getattr(importlib.import_module(f"emitters.templates.{module}"), name)
    cls.kernel.set_name_prefix(f"cutlass_moe_{template.name}", keep_mangled_name=False)
    return cls(problem, config)


def _compile(template: Any, arguments: Sequence[Argument], more_options: str) -> tuple[bytes, str]:
    """Compiles a template's instance; returns (cubin, PTX)."""
    import cutlass.cute as cute
    from cutlass import Int32
    from cutlass.cute.runtime import make_fake_stream

    # a folder per compile, because dump files of all compiles have the same names
    with tempfile.TemporaryDirectory() as dump:
        compiled = cute.compile(
            template,
            *(argument.stand_in for argument in arguments),
            Int32(1),
            make_fake_stream(),
            no_jit_engine=True,  # this process does not run the kernel
            options=f"--keep-cubin --keep-ptx --dump-dir {dump} {more_options}",
        )
        cubin, ptx = compiled.artifacts.CUBIN, compiled.artifacts.PTX
        return bytes(cubin), ptx.decode() if isinstance(ptx, bytes) else ptx
