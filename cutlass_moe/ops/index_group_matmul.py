"""index_group_matmul: the grouped product of operands that come whole or one tensor per expert.

Weights are never copied: slices at equal distances become a view, others a table of tensor maps.
Other operands become a view where they lie end to end, else they are copied to the workspace.
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
from cutlass_moe.ops._checks import check, check_out
from cutlass_moe.ops._lists import (
    ListArguments,
    Tensors,
    check_groups,
    check_tensors,
    entries_of,
    find_lengths,
    find_scales,
    find_weights,
)
from cutlass_moe.ops.dispatch import Choice, choose_launch, enqueue, pose
from cutlass_moe.ops.grouped_matmul_reference import grouped_matmul_reference_out
from cutlass_moe.runtime import library
from cutlass_moe.runtime.fallback import announce_fallback
from cutlass_moe.runtime.kernel import Kernel
from cutlass_moe.runtime.parameters import ALIGNMENTS, gemm_views, misaligned
from cutlass_moe.runtime.workspace import (
    WorkspaceLayout,
    WorkspaceRegion,
    resolve,
    stand_in,
)
from emitters.spec.gemm import GemmProblem, WeightStorage
from emitters.spec.image import TENSOR_MAP_BYTES
from emitters.spec.registry import why_illegal

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
    """`grouped_matmul_out` whose operands are tensors or lists: of one, or of one per expert.

    x [T, K], or [M_e, K] for each expert e, of the dtypes of `grouped_matmul`.
    weight [E, N, K], or [N, K] for each expert, of x's dtype, K dense.
    scale float32 [E, N], [E, N, 1] or [E], or [N], [N, 1], [1] or [] for each expert.
    per_token_scale float32 [T] or [T, 1], or [M_e] or [M_e, 1] for each expert. 8-bit operands need
      both scales, others take None as well.
    group_list int32 or int64 [E] on x's device, never read by the host: cumulative ends of the
      experts' rows (group_list_type "cumsum") or their numbers of rows ("count").
    out [rows, N], or [M_e, N] for each expert: bfloat16, float16 or float32.
    index int32 [rows]: the row of x that each row of the product reads, rows sorted by expert; x
      and per_token_scale are then single tensors. Without it row r reads row r of x.
    bias, accumulation, expected_rows, num_sms: as in `grouped_matmul`.

    Experts' rows follow each other from row 0 on. But where x, per_token_scale or out come one per
    expert, an expert's rows are the first of its tensor's, as many as group_list counts, at most
    all. Other rows of out are left untouched. Single tensors, and lists whose tensors are parts of
    one, cost nothing; other lists, but weights, are copied by every call. CPU tensors take the
    reference. Raises ValueError or TypeError, with what was expected and what came, for malformed
    arguments; RuntimeError where a gradient would be lost, and where a list needs a table from the
    host while a CUDA graph is captured: prepare that call before with
    `index_group_matmul_workspace_size`.
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
    def decorate(mirror: Callable[..., R]) -> Callable[P, R]:
        mirror.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        return mirror

    return decorate


@_takes_arguments_of(index_group_matmul)
def index_group_matmul_workspace_size(*tensors: Any, **others: Any) -> tuple[int, Executor]:
    """The first half of `index_group_matmul`: checks its arguments, loads the kernel.

    Returns the bytes of workspace that a run needs, and the executor whose `run` is the second
    half. Raises what `index_group_matmul` raises.
    """
    executor = Executor(ListArguments(*tensors, **others))
    return executor.workspace_size, executor


class Executor:
    """A checked call of `index_group_matmul`, to be run any number of times.

    It keeps the call's tensors, which every run reads anew. It must outlive the runs it enqueued
    and the CUDA graphs that captured one: they read tables in its pinned host memory.
    workspace_size: bytes of workspace that a run needs. device: of all tensors.
    """

    def __init__(self, arguments: ListArguments) -> None:
        self._arguments = arguments
        self.device = check_tensors(arguments)
        self._weights = weights = find_weights(arguments.weight)
        experts = len(weights)
        n, k = weights.shape[1:] if isinstance(weights, Tensor) else weights[0].shape
        check_groups(arguments, experts)
        x = entries_of("x", arguments.x, experts)
        out = entries_of("out", arguments.out, experts)
        token_scale = entries_of("per_token_scale", arguments.per_token_scale, experts)
        scale = find_scales(arguments.scale, experts, n)

        self._layout = layout = WorkspaceLayout(self.device)
        lengths = find_lengths(
            {"x": x, "per_token_scale": token_scale, "out": out}, arguments.index
        )
        self._limits = layout.from_host(_limits(lengths)) if lengths else None
        self._groups = self._ends = None
        group_list, kind = arguments.group_list, arguments.group_list_type
        if lengths or kind == "count" or group_list.dtype != torch.int32:
            self._groups = layout.region((2 * experts,), torch.int32)
            self._ends = layout.region((experts,), torch.int32)
        self._out = layout.join(out)
        self._operands: dict[str, Tensor | WorkspaceRegion | None] = {
            "x": layout.join(x),
            "weight": weights if isinstance(weights, Tensor) else weights[0].expand(experts, n, k),
            "index": arguments.index,
            "offsets": self._ends or group_list,
            "per_token_scale": layout.join(token_scale) if token_scale else None,
            "scale": layout.join(scale) if scale else None,
            "bias": arguments.bias,
        }
        self._prepare()

    def _prepare(self) -> None:
        """Checks what the operands will be once they are joined; finds the problem, its kernel."""
        weights, out = self._weights, stand_in(self._out)
        operands = Operands(**{name: stand_in(t) for name, t in self._operands.items()})
        options = self._arguments.options._replace(out_dtype=out.dtype)
        strides = {operands.weight.stride()}
        if isinstance(weights, list):
            strides = {(0, *weight.stride()) for weight in weights}
        for stride in strides:
            weight = operands.weight.new_empty_strided(operands.weight.shape, stride)
            operands = operands._replace(weight=weight)
            check(operands, options)
        check_out(out, operands, options, out.dtype)

        problem = pose(operands, out.dtype, options)
        if isinstance(weights, list):
            in_table = replace(problem.weight, storage=WeightStorage.TABLE)
            problem = replace(problem, weight=in_table)
        self._choice: Choice | None = None
        self._maps: WorkspaceRegion | None = None
        self._why_illegal: str | None = None
        if self.device.type == "cuda" and len(out):
            device = self.device.index
            self._why_illegal = why_illegal(problem, arch=library.device_arch(device))
            if self._why_illegal is None:
                self._choice = choose_launch(
                    problem, device, len(operands.x), len(out), operands.weight.stride(), options
                )
                if isinstance(weights, list):
                    maps = _tensor_maps(problem, self._choice.kernel, weights)
                    self._maps = self._layout.from_host(maps)
        self.workspace_size = self._layout.size

    def run(
        self, workspace: Tensor | None = None, stream: torch.cuda.Stream | int | None = None
    ) -> None:
        """Enqueues the product and returns at once: allocates nothing and waits for nothing.

        workspace: contiguous uint8 [workspace_size or more] on the call's device, which no other
        run uses until this one is done; None where workspace_size is 0. stream: default torch's
        current one; a handle's stream must outlive the executor. May be captured in a CUDA graph.
        Raises ValueError for another workspace or a stream of another device. (CPU tensors, and
        problems without a kernel, take the reference, which allocates and waits.)
        """
        workspace = self._layout.aligned(workspace)
        with self._on(stream), torch.no_grad():
            self._layout.fill(workspace)
            self._find_ends(workspace)
            self._compute(workspace)
            self._layout.write_back(self._out, workspace)

    def _on(self, stream: torch.cuda.Stream | int | None) -> AbstractContextManager[Any]:
        if stream is None:
            return nullcontext()
        if self.device.type != "cuda":
            raise ValueError(f"stream must be None for tensors on {self.device}, got {stream}")
        if not isinstance(stream, torch.cuda.Stream):
            # 0 and 1 both mean the default stream, and ExternalStream takes neither
            handle, default = int(stream), torch.cuda.default_stream(self.device)
            external = torch.cuda.ExternalStream
            stream = external(handle, device=self.device) if handle > 1 else default
        if stream.device != self.device:
            raise ValueError(f"stream must be one of {self.device}, got one of {stream.device}")
        return torch.cuda.stream(stream)

    def _find_ends(self, workspace: Tensor) -> None:
        """int32 ends of the experts' rows from group_list. Not by cumsum, which allocates."""
        if self._ends is None or self._groups is None:
            return
        ends, groups = self._ends.of(workspace), self._groups.of(workspace)
        experts, given = len(ends), self._arguments.group_list
        counted = self._arguments.group_list_type == "count"
        if self._limits is None and not counted:
            ends.copy_(given)
            return
        groups[:experts].zero_()
        groups[experts:].copy_(given)
        if self._limits is not None:
            starts, limits = self._limits.of(workspace)
            torch.add(starts, groups[experts:], out=ends)
            if not counted:
                ends.sub_(groups[experts - 1 : -1])
            torch.minimum(ends, limits, out=ends)
        else:  # windows over zeros and counts, each of which reaches one count further
            torch.sum(groups[1:].unfold(0, experts, 1), 1, dtype=torch.int32, out=ends)

    def _compute(self, workspace: Tensor) -> None:
        tensors = {name: resolve(t, workspace) for name, t in self._operands.items()}
        starts = None if self._limits is None else self._limits.of(workspace)[0]
        operands = Operands(**tensors, starts=starts)
        out: Tensor = resolve(self._out, workspace)
        if self._choice is not None:
            maps = None if self._maps is None else self._maps.of(workspace)
            enqueue(self._choice, out, operands, maps)
        elif len(out):
            if self._why_illegal is not None:
                announce_fallback(self._why_illegal)
            _reference(out, operands, self._weights)


# What run reads, and what it does without a kernel.


def _limits(lengths: list[int]) -> Tensor:
    """int32 [2, E]: where each expert's rows start, and where its tensor ends."""
    ends = list(itertools.accumulate(lengths))
    return torch.tensor([[0, *ends[:-1]], ends], dtype=torch.int32)


def _tensor_maps(problem: GemmProblem, kernel: Kernel, weights: list[Tensor]) -> Tensor:
    """uint8 [E, TENSOR_MAP_BYTES]: what a kernel reads the weights of each expert through."""
    maps = torch.empty((len(weights), TENSOR_MAP_BYTES), dtype=torch.uint8)
    for e, weight in enumerate(weights):
        address = weight.data_ptr()
        if address % ALIGNMENTS["weight"]:
            raise misaligned(f"weight[{e}]", ALIGNMENTS["weight"], address)
        view = gemm_views(problem, (0, *weight.stride()), 0)["weight"]
        encoded = kernel.maps.encode("weight", address, view)
        ctypes.memmove(maps[e].data_ptr(), int(encoded.getPtr()), TENSOR_MAP_BYTES)
    return maps


def _reference(out: Tensor, operands: Operands, weights: Tensor | list[Tensor]) -> None:
    """Expert by expert, so that weights stay where they are."""
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
