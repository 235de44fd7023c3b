"""index_group_matmul: the grouped product of operands that may be lists of one tensor per expert.

Weights are never copied. A list of weights at equal distances in memory becomes one view; another
list becomes a table of tensor maps. A list of other operands becomes one view if the tensors lie
end to end in memory, else each run copies it to the workspace; so are single tensors copied whose
strides, dtype or address a kernel cannot read.
"""

from __future__ import annotations

import ctypes
import inspect
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from cutlass_moe.operands import Operands
from cutlass_moe.ops._checks import check, reads_rows
from cutlass_moe.ops._copies import LARGEST_INT32, refuse_misaligned
from cutlass_moe.ops._lists import (
    ListArguments,
    Tensors,
    check_groups,
    check_tensors,
    entries_of,
    find_lengths,
    find_scales,
    find_token_scales,
    find_weights,
    scale_dtype,
)
from cutlass_moe.ops._packed import columns
from cutlass_moe.ops._types import check_types
from cutlass_moe.ops.dispatch import Choice, choose_launch, enqueue, pose, strides_of
from cutlass_moe.ops.grouped_matmul_reference import grouped_matmul_reference_out
from cutlass_moe.ops.reasons import why_no_product
from cutlass_moe.runtime import library
from cutlass_moe.runtime.fallback import announce_fallback
from cutlass_moe.runtime.kernel import Kernel
from cutlass_moe.runtime.parameters import gemm_views
from cutlass_moe.runtime.workspace import (
    WorkspaceLayout,
    WorkspaceRegion,
    resolve,
    stand_in,
)
from emitters.spec.gemm import GemmProblem, WeightStorage
from emitters.spec.image import TENSOR_MAP_BYTES

P = ParamSpec("P")
R = TypeVar("R")


def index_group_matmul(
    x: Tensors,
    weight: Tensors,
    scale: Tensors | None,
    per_token_scale: Tensors | None,
    group_list: Tensor,
    out: Tensors,
    *,
    index: Tensor | None = None,
    group_list_type: str = "cumsum",
    bias: Tensor | None = None,
    accumulation: str | None = None,
    expected_rows: int | None = None,
    num_sms: int | None = None,
) -> None:
    """`grouped_matmul_out` for operands that are tensors, or lists of one tensor per expert.

                       tensor (or list of one)     list of one tensor per expert e
      x                [T, K]                      [M_e, K]
      weight           [E, N, K]                   [N, K]
      scale            [E, N], [E, N, 1] or [E],   [N], [N, 1], [1] or []
                       [E, 1] or one value
      per_token_scale  [T], [T, 1] or one value    [M_e] or [M_e, 1]
      out              [rows, N]                   [M_e, N]

    Packed 4-bit weights (`pack_weights`) are one tensor, or a list of its slices.

    x, weight: the dtypes of `grouped_matmul`; weights have K dense, or N if they are 16-bit, and
      all experts' the same one.
    scale, per_token_scale: float32, bfloat16 or float16; 8-bit operands need both, others may have
      None.
    out: bfloat16, float16 or float32; it is written.
    group_list int32 or int64 [E]: with group_list_type "cumsum" the cumulative ends of the experts'
      rows, with "count" the number of rows per expert. The host never reads it.
    index int32 or int64 [rows]: the row of x that each row of the product reads, sorted by expert;
      x and per_token_scale must then be single tensors. None: row r reads row r of x.
    bias [E, N], accumulation, expected_rows, num_sms: as in `grouped_matmul`.

    Experts' rows follow each other from row 0 on. If x, per_token_scale or out is a list of one
    tensor per expert, expert e has the first rows of its tensor: as many as group_list counts, but
    at most M_e. Other rows of out are left untouched.

    Tensors, and lists of slices that lie end to end in one tensor, cost nothing. Every call copies
    other lists, and what `grouped_matmul` copies, but never weights. CPU tensors take the
    reference; tensors on the meta device are only checked.

    Raises ValueError or TypeError that says what must be and what came. Raises RuntimeError where a
    gradient would be lost, and during CUDA graph capture if a list needs a table from the host:
    prepare that call before the capture, with `index_group_matmul_workspace_size`.
    """
    size, executor = index_group_matmul_workspace_size(
        x, weight, scale, per_token_scale, group_list, out,
        index=index, group_list_type=group_list_type, bias=bias, accumulation=accumulation,
        expected_rows=expected_rows, num_sms=num_sms,
    )  # fmt: skip
    executor.run(torch.empty(size, dtype=torch.uint8, device=executor.device))


def _takes_arguments_of(
    original: Callable[P, object],
) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """A decorator that shows the signature of `original` for a function that passes all on."""

    def decorate(mirror: Callable[..., R]) -> Callable[P, R]:
        returned = inspect.signature(mirror).return_annotation
        shown = inspect.signature(original).replace(return_annotation=returned)
        mirror.__signature__ = shown  # type: ignore[attr-defined]
        return mirror

    return decorate


@_takes_arguments_of(index_group_matmul)
def index_group_matmul_workspace_size(*tensors: Any, **others: Any) -> tuple[int, Executor]:
    """Prepares a call of `index_group_matmul`: checks its arguments and loads the kernel.

    Takes the arguments of `index_group_matmul`. Returns (bytes of workspace, executor): the call
    itself is `executor.run(workspace)`. Raises what `index_group_matmul` raises.
    """
    arguments = ListArguments(*tensors, **others)
    check_types(ListArguments, arguments._asdict())
    executor = Executor(arguments)
    return executor.workspace_size, executor


class Executor:
    """A checked call of `index_group_matmul` that can be run any number of times.

    It keeps the call's tensors, and every run reads what they hold then. It must outlive the runs
    it enqueued and the CUDA graphs that captured one, because they read tables in its pinned host
    memory.

    workspace_size: bytes of workspace that a run needs. device: the device of all tensors.
    """

    def __init__(self, arguments: ListArguments) -> None:
        self._arguments = arguments
        self.device = check_tensors(arguments)
        self._weights = weights = find_weights(arguments.weight)
        experts = len(weights)
        n = columns(weights) if isinstance(weights, Tensor) else len(weights[0])
        check_groups(arguments, experts)
        x = entries_of("x", arguments.x, experts)
        out = entries_of("out", arguments.out, experts)
        token_scale = find_token_scales(arguments.per_token_scale, x, experts)
        scale = find_scales(arguments.scale, experts, n)

        self._layout = layout = WorkspaceLayout(self.device)
        lengths = find_lengths(
            {"x": x, "per_token_scale": token_scale, "out": out}, arguments.index
        )
        self._limits = layout.from_host(_limits(lengths)) if lengths else None
        self._groups = self._ends = None
        group_list, kind = arguments.group_list, arguments.group_list_type
        in_place = group_list.dtype == torch.int32 and group_list.is_contiguous()
        if lengths or kind == "count" or not in_place:
            self._groups = layout.region((2 * experts,), torch.int32)
            self._ends = layout.region((experts,), torch.int32)
        self._out = layout.join(out, "out")
        self._wide_index: WorkspaceRegion | None = None
        self._index = None if arguments.index is None else self._find_index(arguments.index)
        self._operands: dict[str, Tensor | WorkspaceRegion | None] = {
            "x": layout.join(x, "x", reads=reads_rows),
            "weight": weights
            if isinstance(weights, Tensor)
            else weights[0].expand(experts, -1, -1),
            "index": self._index,
            "offsets": self._ends or group_list,
            "per_token_scale": self._join("per_token_scale", token_scale),
            "scale": self._join("scale", scale),
            "bias": None if arguments.bias is None else layout.join([arguments.bias], "bias"),
        }
        self._prepare()

    def _join(self, name: str, scales: list[Tensor]) -> Tensor | WorkspaceRegion | None:
        return self._layout.join(scales, name, scale_dtype(scales)) if scales else None

    def _find_index(self, index: Tensor) -> Tensor | WorkspaceRegion:
        """The int32 index; int64 values pass through a region where they are clamped."""
        if index.dtype != torch.int64:
            return self._layout.join([index], "index")
        self._wide_index = self._layout.region(tuple(index.shape), torch.int64)
        return self._layout.region(tuple(index.shape), torch.int32)

    def _prepare(self) -> None:
        """Checks the operands as they will be once lists are joined, and loads the kernel."""
        weights, out = self._weights, stand_in(self._out)
        operands = Operands(**{name: stand_in(t) for name, t in self._operands.items()})
        options = self._arguments.options
        strides = {operands.weight.stride()}
        if isinstance(weights, list):
            strides = {(0, *weight.stride()) for weight in weights}
        for stride in strides:
            weight = operands.weight.new_empty_strided(operands.weight.shape, stride)
            operands = operands._replace(weight=weight)
            check(operands, options, out)
        if isinstance(weights, Tensor):
            refuse_misaligned("weight", weights)
        else:
            for e, weight in enumerate(weights):
                refuse_misaligned(f"weight[{e}]", weight)

        problem = pose(operands, out.dtype, options)
        if isinstance(weights, list):
            in_table = replace(problem.weight, storage=WeightStorage.TABLE)
            problem = replace(problem, weight=in_table)
        self._choice: Choice | None = None
        self._maps: WorkspaceRegion | None = None
        self._why_illegal: str | None = None
        if self.device.type == "cuda" and len(out):
            device = self.device.index
            self._why_illegal = why_no_product(problem, library.device_arch(device))
            if self._why_illegal is None:
                self._choice = choose_launch(
                    problem,
                    device,
                    len(operands.x),
                    len(out),
                    operands.weight.stride(),
                    options,
                    strides_of(operands, problem),
                )
                if isinstance(weights, list):
                    maps = _tensor_maps(problem, self._choice.kernel, weights)
                    self._maps = self._layout.from_host(maps)
        self.workspace_size = self._layout.size

    def run(
        self, workspace: Tensor | None = None, stream: torch.cuda.Stream | int | None = None
    ) -> None:
        """Enqueues the product and returns at once; allocates nothing and waits for nothing.

        workspace: contiguous uint8 [workspace_size or more] on the call's device; no other run may
          use it until this one is done. None if workspace_size is 0.
        stream: a stream or its handle, default torch's current one. The stream of a handle must
          outlive the executor.

        CUDA graphs can capture a run. CPU tensors, and problems without a kernel, take the
        reference, which allocates and waits. Raises ValueError for an unfit workspace or a stream
        of another device.
        """
        try:
            workspace = self._layout.aligned(workspace)
            with self._on(stream), torch.no_grad():
                if self.device.type == "meta":
                    return
                self._layout.fill(workspace)
                self._find_ends(workspace)
                self._narrow_index(workspace)
                self._compute(workspace)
                self._layout.write_back(self._out, workspace)
        except Exception:
            check_types(Executor.run, locals())
            raise

    def _on(self, stream: torch.cuda.Stream | int | None) -> AbstractContextManager[Any]:
        if stream is None:
            return nullcontext()
        if self.device.type != "cuda":
            raise ValueError(f"stream must be None for tensors on {self.device}, got {stream}")
        if not isinstance(stream, torch.cuda.Stream):
            # handles 0 and 1 both mean the default stream, and ExternalStream takes neither
            handle, default = int(stream), torch.cuda.default_stream(self.device)
            external = torch.cuda.ExternalStream
            stream = external(handle, device=self.device) if handle > 1 else default
        if stream.device != self.device:
            raise ValueError(f"stream must be one of {self.device}, got one of {stream.device}")
        return torch.cuda.stream(stream)

    def _find_ends(self, workspace: Tensor) -> None:
        """Computes the int32 ends of the experts' rows from group_list.

        Without cumsum, which allocates memory.
        """
        if self._ends is None or self._groups is None:
            return
        ends, groups = self._ends.of(workspace), self._groups.of(workspace)
        experts, group_list = len(ends), self._arguments.group_list
        counted = self._arguments.group_list_type == "count"
        if self._limits is None and not counted:
            ends.copy_(group_list)
            return
        groups[:experts].zero_()
        groups[experts:].copy_(group_list)
        if self._limits is not None:
            starts, limits = self._limits.of(workspace)
            torch.add(starts, groups[experts:], out=ends)
            if not counted:
                ends.sub_(groups[experts - 1 : -1])
            torch.minimum(ends, limits, out=ends)
        else:  # sums over windows of [0, ..., 0, counts...]; each window has one count more
            torch.sum(groups[1:].unfold(0, experts, 1), 1, dtype=torch.int32, out=ends)

    def _narrow_index(self, workspace: Tensor) -> None:
        """Converts an int64 index to int32; values that int32 cannot hold stay outside [0, T)."""
        index = self._arguments.index
        if self._wide_index is not None and index is not None:
            wide = self._wide_index.of(workspace)
            torch.clamp(index, -1, LARGEST_INT32, out=wide)
            resolve(self._index, workspace).copy_(wide)

    def _compute(self, workspace: Tensor) -> None:
        tensors = {name: resolve(t, workspace) for name, t in self._operands.items()}
        starts = None if self._limits is None else self._limits.of(workspace)[0]
        operands = Operands(**tensors, starts=starts)
        out: Tensor = resolve(self._out, workspace)
        if self._choice is not None:
            maps = {}
            if self._maps is not None:
                maps = {"weight": self._maps.of(workspace).data_ptr()}
            enqueue(self._choice, out, operands, maps)
        elif len(out):
            if self._why_illegal is not None:
                announce_fallback(self._why_illegal)
            _reference(out, operands, self._weights)


# Tables that a run reads, and the path without a kernel.


def _limits(lengths: list[int]) -> Tensor:
    """The first row of each expert and the end of its tensor: int32 [2, E]."""
    ends = list(itertools.accumulate(lengths))
    return torch.tensor([[0, *ends[:-1]], ends], dtype=torch.int32)


def _tensor_maps(problem: GemmProblem, kernel: Kernel, weights: list[Tensor]) -> Tensor:
    """The tensor maps through which a kernel reads each expert's weights: uint8 [E, 128]."""
    maps = torch.empty((len(weights), TENSOR_MAP_BYTES), dtype=torch.uint8)
    for e, weight in enumerate(weights):
        address = weight.data_ptr()
        view = gemm_views(problem, (0, *weight.stride()), 0, 0)["weight"]
        encoded = kernel.maps.encode("weight", address, view)
        ctypes.memmove(maps[e].data_ptr(), int(encoded.getPtr()), TENSOR_MAP_BYTES)
    return maps


def _reference(out: Tensor, operands: Operands, weights: Tensor | list[Tensor]) -> None:
    """Runs the reference expert by expert, so that weights are not stacked."""
    ends = operands.offsets.tolist()
    starts = operands.starts
    first_rows = [0, *ends[:-1]] if starts is None else starts.tolist()
    index = operands.index
    if index is None:
        index = torch.arange(len(out), device=out.device)
    for e, (start, end) in enumerate(zip(first_rows, ends, strict=True)):
        rows = slice(max(start, 0), max(start, end, 0))
        grouped_matmul_reference_out(
            out[rows],
            operands.x,
            weights[e][None],
            index=index[rows],
            offsets=torch.tensor([len(out[rows])]),
            per_token_scale=operands.per_token_scale,
            scale=None if operands.scale is None else operands.scale[e : e + 1],
            bias=None if operands.bias is None else operands.bias[e : e + 1],
        )
