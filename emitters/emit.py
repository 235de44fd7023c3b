"""The only place that compiles: (problem, config, arch) -> kernel image.

Needs the CUTLASS DSL, but neither a GPU nor a CUDA toolkit. One compile at a time in a process:
two threads in the DSL's compiler abort the interpreter.
"""

from __future__ import annotations

import hashlib
import os
import tempfile

from emitters.config import (
    K_TILE_BYTES,
    SLICE_BYTES,
    SLICE_ROWS,
    Config,
    GemmSwapSm90Config,
    Schedule,
    why_illegal,
)
from emitters.cubin import CubinFacts, read_cubin
from emitters.image import (
    IMAGE_ABI,
    TENSOR_MAP_BYTES,
    Image,
    LaunchRecord,
    Param,
    ParamKind,
    TensorMapBox,
    build_identity,
)
from emitters.problem import GemmProblem, WeightStorage
from emitters.toolchain import load_toolchain, loaded_toolchain

_SIZES = {ParamKind.TENSOR_MAP: TENSOR_MAP_BYTES, ParamKind.POINTER: 8, ParamKind.INT32: 4}


def emit(
    problem: GemmProblem, config: Config, arch: str = "sm_90a", toolchain: str | None = None
) -> Image:
    """Compiles one kernel. Raises ValueError, with the reason, where that is illegal.

    toolchain: "cu12" or "cu13", one a process. Default: the one loaded, or what the DSL takes.
    """
    return _emit(problem, config, arch, toolchain=toolchain)[0]


def emit_ptx(
    problem: GemmProblem, config: Config, arch: str = "sm_90a"
) -> tuple[LaunchRecord, str]:
    """The kernel that `emit` writes as PTX, with `.loc` lines that name the Python source."""
    image, ptx = _emit(problem, config, arch, "--generate-line-info")
    return image.record, ptx


def _emit(
    problem: GemmProblem,
    config: Config,
    arch: str,
    more_options: str = "",
    toolchain: str | None = None,
) -> tuple[Image, str]:
    reason = why_illegal(problem, config, arch)
    if reason:
        raise ValueError(reason)
    os.environ["CUTE_DSL_ARCH"] = arch  # read when cutlass is imported
    if toolchain:
        load_toolchain(toolchain)
    cubin, ptx = _compile(problem, config, arch, more_options)
    facts = read_cubin(cubin)
    weight = TensorMapBox(
        "weight",
        columns=config.k_tile(problem),
        rows=config.tile_n // config.cluster_m,
        swizzle=K_TILE_BYTES,
        l2_promotion=config.l2_promotion,
    )
    out = TensorMapBox(
        "out_map",
        columns=SLICE_BYTES // problem.out.bytes,
        rows=SLICE_ROWS,
        swizzle=SLICE_BYTES,
        l2_promotion=128,
    )
    record = LaunchRecord(
        symbol=facts.symbol,
        params=_params(problem, config, facts),
        tensor_maps=(weight, out),
        smem_bytes=config.smem_bytes(problem),
        threads=config.threads,
        cluster=(config.cluster, 1, 1),
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


def param_kinds(problem: GemmProblem, config: Config) -> list[tuple[str, ParamKind]]:
    """The parameters of a grouped GEMM in the kernel's order."""
    table = problem.weights is WeightStorage.TABLE
    pointers = ["x", *(["index"] if problem.gather else []), "starts", "ends", "out"]
    return [
        ("weight", ParamKind.POINTER if table else ParamKind.TENSOR_MAP),
        *((name, ParamKind.POINTER) for name in pointers),
        ("out_map", ParamKind.TENSOR_MAP),
        ("num_tokens", ParamKind.INT32),
        ("num_rows", ParamKind.INT32),
        *((node.kind, ParamKind.POINTER) for node in problem.epilogue),
        *([("counters", ParamKind.POINTER)] if config.schedule is Schedule.DYNAMIC else []),
    ]


def _params(problem: GemmProblem, config: Config, facts: CubinFacts) -> tuple[Param, ...]:
    named = param_kinds(problem, config)
    sizes = [_SIZES[kind] for _, kind in named]
    if sizes != [size for _, size in facts.params]:
        raise AssertionError(f"parameters of sizes {sizes} expected, the cubin has {facts.params}")
    return tuple(
        Param(name, kind, offset, size)
        for (name, kind), (offset, size) in zip(named, facts.params, strict=True)
    )


def _compile(
    problem: GemmProblem, config: Config, arch: str, more_options: str
) -> tuple[bytes, str]:
    """-> cubin, PTX"""
    import cutlass.cute as cute
    from cutlass import Int32, Uint8
    from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_ptr

    from emitters.epilogue import ELEMENT, node_element
    from emitters.gemm_sm90 import GemmSm90
    from emitters.gemm_swap_sm90 import GemmSwapSm90

    def pointer(element: type, align: int) -> cute.Pointer:
        return make_ptr(element, align, cute.AddressSpace.gmem, assumed_align=align)

    shape = (problem.n, problem.k, problem.num_experts)
    stacked = problem.weights is WeightStorage.STACKED
    kind = GemmSwapSm90 if isinstance(config, GemmSwapSm90Config) else GemmSm90
    template = kind(problem, config)
    kind.kernel.set_name_prefix(f"cutlass_moe_{config.template}", keep_mangled_name=False)
    # dump file names do not tell one compile from another
    with tempfile.TemporaryDirectory() as dump:
        compiled = cute.compile(
            template,
            make_fake_compact_tensor(
                ELEMENT[problem.operand], shape, stride_order=(1, 0, 2), assumed_align=16
            )
            if stacked
            else pointer(Uint8, 64),
            pointer(Uint8, 16),
            pointer(Int32, 4) if problem.gather else None,
            pointer(Int32, 4),
            pointer(Int32, 4),
            pointer(ELEMENT[problem.out], 16),
            make_fake_compact_tensor(
                ELEMENT[problem.out], (SLICE_ROWS, problem.n), stride_order=(1, 0), assumed_align=16
            ),
            Int32(1),
            Int32(1),
            tuple(pointer(node_element(node), 4) for node in problem.epilogue) or None,
            pointer(Int32, 8) if config.schedule is Schedule.DYNAMIC else None,
            Int32(1),
            make_fake_stream(),
            options=f"--keep-cubin --keep-ptx --dump-dir {dump} {more_options}",
        )
        cubin, ptx = compiled.artifacts.CUBIN, compiled.artifacts.PTX
        return bytes(cubin), ptx.decode() if isinstance(ptx, bytes) else ptx
