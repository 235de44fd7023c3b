"""The way from arguments to a launch.

Arguments are checked, and the kernel is chosen, once per signature (dtypes, shapes, strides,
devices, options). Later calls of that signature only fill in addresses and enqueue.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from cutlass_moe.choose import heuristics_sm90 as heuristics
from cutlass_moe.images.cache import MissingImage
from cutlass_moe.operands import DTYPES, Operands, Options, ProductArguments
from cutlass_moe.ops._checks import TensorMeta, accept, is_n_major, readable
from cutlass_moe.ops._copies import aligned, refuse_other_devices, writable
from cutlass_moe.ops._packed import columns, packing_of
from cutlass_moe.ops._types import check_types
from cutlass_moe.ops.activations import is_gated
from cutlass_moe.ops.block_scales import block_granularity
from cutlass_moe.ops.grouped_matmul_reference import fill_product
from cutlass_moe.ops.reasons import why_no_product
from cutlass_moe.runtime import library
from cutlass_moe.runtime.device import on_device
from cutlass_moe.runtime.fallback import announce_fallback
from cutlass_moe.runtime.kernel import Kernel, Views
from cutlass_moe.runtime.launch import Launch
from cutlass_moe.runtime.log import logger
from cutlass_moe.runtime.parameters import (
    ALIGNMENTS,
    DENSE,
    Addresses,
    MisalignedAddress,
    Strides,
    alignment,
    gemm_values,
    gemm_views,
    in_columns,
    in_rows,
    misaligned,
)
from cutlass_moe.runtime.signatures import Signatures, signature
from emitters.spec.dtypes import ACCUMULATIONS, Accumulation
from emitters.spec.epilogue import make_epilogue
from emitters.spec.gemm import GemmProblem, Granularity, Major, WeightFormat, weight_granularity
from emitters.spec.layer_steps import Step
from emitters.spec.registry import GemmConfig, why_illegal

_OPERANDS = Operands._fields


class Choice(NamedTuple):
    """The part of a launch that a signature decides: all but the addresses of tensors."""

    kernel: Kernel
    grid: int  # CTAs
    values: Mapping[str, int]  # of all parameters that are not addresses
    views: Views
    overlap: bool = False  # programmatic dependent launch

    def launch(self, addresses: Addresses, stream: int) -> None:
        """Enqueues the kernel on a stream. addresses: of all tensors, by parameter."""
        kernel, grid, values, views, overlap = self
        kernel.launch({**values, **addresses}, grid, stream, overlap, views)

    def prepare(self, addresses: Addresses) -> Launch:
        """Makes a launch that can be enqueued again and again. addresses: as in `launch`."""
        kernel, grid, values, views, overlap = self
        return kernel.prepare({**values, **addresses}, grid, overlap, views)


class CheckedCall(NamedTuple):
    """The part of a call that its signature decides: the result's shape and dtype, the kernel.

    copied: there is no kernel for these tensors, because some must be copied first.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    choice: Choice | None  # None: the reference serves it, unless `copied`
    copied: bool = False


_calls: Signatures[CheckedCall] = Signatures()


def multiply(operands: Operands, options: Options, out: Tensor | None = None) -> Tensor:
    """Computes a product: into `out`, or into a new tensor. Returns it.

    CPU tensors take the reference, CUDA tensors a kernel. Raises what `find_call` raises.
    """
    shape, dtype, choice, copied = find_call(operands, out, options)
    if copied:
        operands = readable(operands)
        if out is None:
            return multiply(operands, options)
        with writable(out) as room:
            multiply(operands, options, room)
        return out
    product = operands.x.new_empty(shape, dtype=dtype) if out is None else out
    if choice is None:
        _without_kernel(product.zero_() if out is None else product, operands, options)
        return product
    try:
        enqueue(choice, product, operands)
    except MisalignedAddress:
        with writable(product) as room:
            enqueue(choice, room, aligned(operands))
    return product


def _without_kernel(out: Tensor, operands: Operands, options: Options) -> None:
    """Computes the product with the reference; on the meta device there is nothing to compute."""
    refuse_other_devices({**operands._asdict(), "out": out}, operands.x.device)
    if not out.is_meta:
        with writable(out) as room:
            fill_product(room, aligned(operands), options)


def find_call(operands: Operands, out: Tensor | None, options: Options) -> CheckedCall:
    """Checks arguments and chooses a kernel, once per signature.

    Operands must be tensors: `signature` fails on others. Raises what `accept` and `library.load`
    raise.
    """
    key = signature((*options, forced), (out, *operands))
    call = _calls.get(key)
    if call is None:
        check_types(ProductArguments, options._asdict())
        product = accept(operands, options, out)
        if product is None:
            return _calls.keep(key, CheckedCall((0, 0), operands.x.dtype, None, copied=True))
        call = CheckedCall(*product, _choose(operands, product, options))
        if call.choice is not None or not operands.x.is_cuda:  # else the fallback is told each time
            _calls.keep(key, call)
    return call


def _choose(operands: Operands, product: TensorMeta, options: Options) -> Choice | None:
    device, (rows, _) = operands.x.get_device(), product.shape
    if device < 0 or rows == 0:
        return None
    problem = pose(operands, product.dtype, options)
    reason = why_no_product(problem, library.device_arch(device))
    if reason is not None:
        announce_fallback(reason)
        return None
    strides, weight_strides = strides_of(operands, problem), operands.weight.stride()
    return choose_launch(problem, device, len(operands.x), rows, weight_strides, options, strides)


def enqueue(
    choice: Choice, out: Tensor, operands: Operands, others: Mapping[str, int] | None = None
) -> None:
    """Launches a kernel on checked operands, on torch's current stream; returns at once.

    others: values of more parameters, and of "weight" where the kernel reads tensor maps uint8
    [E, 128] on the device, one per expert, instead of `operands.weight`.
    """
    addresses = operand_addresses(operands, out)
    if others is not None:
        addresses |= others
    on_device(out.get_device(), lambda stream: choice.launch(addresses, stream))


def operand_addresses(operands: Operands, out: Tensor) -> dict[str, int]:
    """The addresses of a GEMM's tensors; raises ValueError for one that is not aligned."""
    addresses = {
        name: tensor.data_ptr()
        for name, tensor in zip(_OPERANDS, operands, strict=True)
        if tensor is not None
    }
    addresses["out"] = addresses["out_map"] = out.data_ptr()
    for name, multiple in ALIGNMENTS.items():
        if addresses.get(name, 0) % multiple:
            raise misaligned(name, multiple, addresses[name])
    scale = operands.per_token_scale
    if scale is not None and addresses["per_token_scale"] % 16:
        multiple = alignment("per_token_scale", scale)
        if addresses["per_token_scale"] % multiple:
            raise misaligned("per_token_scale", multiple, addresses["per_token_scale"])
    return addresses


def step_kernel(problem: Step, device: int, few: bool = False) -> Kernel | None:
    """The kernel of a layer's step, or None after a warning if the torch path must serve the call.

    few: as in `step_config`. Raises what `library.load` raises, except MissingImage.
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
    kernel: Kernel, values: Mapping[str, int], grid: int, device: int, overlap: bool = False
) -> None:
    """Launches a step's kernel on torch's current stream of the device. grid: CTAs."""
    on_device(device, lambda stream: kernel.launch(values, grid, stream, overlap))


def pose(operands: Operands, out_dtype: torch.dtype, options: Options) -> GemmProblem:
    """The problem that checked arguments of `grouped_matmul` pose."""
    scale, bias = operands.scale, operands.bias
    dtype, n_major = DTYPES[operands.x.dtype], is_n_major(operands.weight)
    experts, n, k = operands.weight.shape[0], columns(operands.weight), operands.x.shape[1]
    x_scale = None if operands.per_token_scale is None else Granularity.TOKEN
    weight_scale = weight_granularity(0 if scale is None else scale.dim())
    accumulation = options.accumulation or ACCUMULATIONS[dtype][0]
    if scale is not None:
        gated = is_gated(options.activation)
        blocks = block_granularity(scale, operands.weight, gated)
        if blocks is not None:
            x_scale, weight_scale = Granularity.TOKEN_BLOCK, blocks
            accumulation = Accumulation.TWO_LEVEL
    return GemmProblem(
        x=dtype,
        weight=WeightFormat(packing_of(operands.weight) or dtype, Major.N if n_major else Major.K),
        accumulation=Accumulation(accumulation),
        out=DTYPES[out_dtype],
        n=n,
        k=k,
        num_experts=experts,
        gather=operands.index is not None,
        x_scale=x_scale,
        weight_scale=weight_scale,
        epilogue=make_epilogue(
            None if bias is None else DTYPES[bias.dtype], options.activation_node(n_major)
        ),
    )


def strides_of(operands: Operands, problem: GemmProblem) -> Strides:
    """The strides of x and, if it varies along K, of per_token_scale."""
    x, scale = operands.x, operands.per_token_scale
    return Strides(
        None if x.is_contiguous() else x.stride(0),
        scale.stride() if scale is not None and problem.block_rows else None,
    )


forced: GemmConfig | None = None  # the config that `forced_config` sets


@contextmanager
def forced_config(config: GemmConfig) -> Iterator[None]:
    """Makes the calls of all threads use this config while the context lasts: for tuning, tests."""
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
    weight_strides: tuple[int, ...],
    options: Options,
    strides: Strides = DENSE,
) -> Choice:
    """Chooses a config and the number of CTAs, and loads the kernel.

    num_tokens: rows of x; num_rows: rows of the product; weight_strides: as in `gemm_views`.
    Raises what `library.load` raises.
    """
    experts = problem.num_experts
    per_expert = options.expected_rows or num_rows / experts
    gpu = library.device_name(device)
    of_scale = strides.x_scale or ()
    wide = in_rows(of_scale) if problem.gather else in_columns(num_tokens, of_scale)
    config = forced or heuristics.choose(
        problem, num_tokens, per_expert, options.schedule, gpu, wide
    )
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    ctas = min(options.num_sms or sms, sms) * config.ctas_per_sm
    most_tiles = (num_rows // config.tile_m + min(experts, num_rows)) * config.n_tiles(problem)
    clusters = max(1, min(ctas // config.cluster, most_tiles // config.cluster_tiles))
    logger.info(
        "%s: %d tokens, %d rows, %g per expert -> %s from %s, %d CTAs",
        *(problem.words, num_tokens, num_rows, per_expert, config.words),
        "forced_config" if forced else heuristics.origin(problem, per_expert, gpu),
        clusters * config.cluster,
    )
    return Choice(
        library.load(problem, config, device),
        clusters * config.cluster,
        gemm_values(
            problem,
            {},
            num_tokens,
            num_rows,
            strides=strides,
            interleaved=options.interleaved,
            numbers=options.numbers or (),
        ),
        gemm_views(
            problem,
            weight_strides,
            num_tokens,
            num_rows,
            strides=strides,
            interleaved=options.interleaved,
        ),
    )
