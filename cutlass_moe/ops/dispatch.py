"""From a call's arguments to a launch: checked and chosen once a signature, enqueued every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cutlass_moe.choose import heuristics_sm90 as heuristics
from cutlass_moe.images.cache import MissingImage
from cutlass_moe.operands import DTYPES, Operands, Options
from cutlass_moe.ops._checks import check, check_out, is_n_major, product_shape
from cutlass_moe.runtime import library
from cutlass_moe.runtime.fallback import announce_fallback
from cutlass_moe.runtime.kernel import GemmKernel, Kernel
from cutlass_moe.runtime.parameters import parameters
from cutlass_moe.runtime.signatures import signature
from emitters.spec.dtypes import ACCUMULATIONS, Accumulation
from emitters.spec.gemm import Activation, GemmProblem, Major, make_epilogue
from emitters.spec.layer_steps import Step
from emitters.spec.registry import Config, why_illegal


class Call(NamedTuple):
    """What is known of a call before its addresses are: all that its signature decides."""

    shape: tuple[int, int]
    dtype: torch.dtype
    kernel: GemmKernel | None  # None: the reference
    grid: int


_calls: dict[tuple[Any, ...], Call] = {}
_MAX_CALLS = 8192


def find_call(operands: Operands, out: Tensor | None, options: Options) -> Call:
    """Checks arguments and chooses a kernel, once a signature: dtypes, shapes, strides, devices."""
    key = signature((*options, forced), (out, *operands))
    call = _calls.get(key)
    if call is None:
        if out is not None and options.out_dtype is None:
            options = options._replace(out_dtype=out.dtype)
        dtype = check(operands, options)
        if out is not None:
            check_out(out, operands, options, dtype)
        call = _choose(operands, dtype, options)
        if call.kernel is not None or not operands.x.is_cuda:  # else the fallback is told each time
            if len(_calls) >= _MAX_CALLS:
                _calls.clear()
            _calls[key] = call
    return call


def _choose(operands: Operands, dtype: torch.dtype, options: Options) -> Call:
    shape = product_shape(operands, options)
    device = operands.x.get_device()
    if device < 0 or operands.rows == 0:
        return Call(shape, dtype, None, 0)
    problem = pose(operands, dtype, options.accumulation, options.activation_node)
    reason = why_illegal(problem, arch=library.device_arch(device))
    if reason is not None:
        announce_fallback(reason)
        return Call(shape, dtype, None, 0)
    launch = choose_launch(problem, device, operands.x.shape[0], operands.rows, options)
    return Call(shape, dtype, *launch)


def enqueue(
    kernel: GemmKernel,
    grid: int,
    out: Tensor,
    operands: Operands,
    *,
    table: int = 0,
    interleaved: bool = False,
) -> None:
    """Launches the kernel of checked arguments on torch's current stream; returns at once.

    table: address of E tensor maps on the device, which a kernel of unstacked weights reads instead
    of `operands.weight`. interleaved: as in `grouped_matmul`.
    """
    device = out.get_device()
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            enqueue(kernel, grid, out, operands, table=table, interleaved=interleaved)
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    values = parameters(kernel.problem, out, operands, table=table, interleaved=interleaved)
    kernel.launch_gemm(*values, grid, stream)


def step_kernel(problem: Step, device: int, few: bool = False) -> Kernel | None:
    """None, and a warning, where there is no kernel and the op's torch path must do.

    few: as of `step_config`. Raises what `library.load` raises but MissingImage.
    """
    reason = why_illegal(problem, arch=library.device_arch(device))
    if reason is None:
        try:
            return library.load(problem, heuristics.step_config(problem, few), device)
        except MissingImage as error:
            reason = str(error)
    announce_fallback(reason, capturable=True)
    return None


def launch_step(
    kernel: Kernel, values: list[int], grid: int, device: int, overlap: bool = False
) -> None:
    """On torch's current stream of the device."""
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            launch_step(kernel, values, grid, device, overlap)
        return
    kernel.launch(values, grid, torch._C._cuda_getCurrentRawStream(device), overlap)


def pose(
    operands: Operands,
    out_dtype: torch.dtype,
    accumulation: str | None,
    activation: Activation | None = None,
) -> GemmProblem:
    """The problem of checked arguments."""
    scale, bias = operands.scale, operands.bias
    experts, n, k = operands.weight.shape
    return _problem(
        operands.x.dtype, out_dtype, accumulation, n, k, experts, operands.index is not None,
        operands.per_token_scale is not None, 0 if scale is None else scale.dim(),
        None if bias is None else bias.dtype, activation,
        Major.N if is_n_major(operands.weight) else Major.K,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _problem(
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    accumulation: str | None,
    n: int,
    k: int,
    experts: int,
    gather: bool,
    has_per_token_scale: bool,
    scale_dims: int,
    bias_dtype: torch.dtype | None,
    activation: Activation | None,
    weight_major: Major,
) -> GemmProblem:
    operand = DTYPES[dtype]
    bias = None if bias_dtype is None else DTYPES[bias_dtype]
    return GemmProblem(
        operand=operand,
        accumulation=Accumulation(accumulation or ACCUMULATIONS[operand][0]),
        out=DTYPES[out_dtype],
        n=n,
        k=k,
        num_experts=experts,
        gather=gather,
        epilogue=make_epilogue(has_per_token_scale, scale_dims, bias, activation),
        weight_major=weight_major,
    )


forced: Config | None = None  # by `forced_config`


@contextmanager
def forced_config(config: Config) -> Iterator[None]:
    """Within it, all threads' calls use this config: for tuning and tests."""
    global forced
    before, forced = forced, config
    try:
        yield
    finally:
        forced = before


def choose_launch(
    problem: GemmProblem,
    device: int,
    num_tokens: int,
    num_rows: int,
    options: Options,
) -> tuple[GemmKernel, int]:
    """The kernel of a call and the CTAs to launch. Raises what `load` raises."""
    experts = problem.num_experts
    per_expert = options.expected_rows or num_rows / experts
    config = forced or heuristics.choose(
        problem, num_tokens, per_expert, options.schedule, library.device_name(device)
    )
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    ctas = min(options.num_sms or sms, sms) * config.ctas_per_sm
    most_tiles = (num_rows // config.tile_m + min(experts, num_rows)) * config.n_tiles(problem)
    clusters = max(1, min(ctas // config.cluster, most_tiles // config.cluster_m))
    kernel = library.load(problem, config, device)
    assert isinstance(kernel, GemmKernel)
    return kernel, clusters * config.cluster
