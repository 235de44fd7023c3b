"""A layer as a list of launches, made once per signature of its arguments."""

from __future__ import annotations

from functools import partial
from operator import itemgetter
from threading import Lock

import torch
from torch import Tensor

from cutlass_moe.choose.heuristics_sm90 import FEW_PAIRS, step_config
from cutlass_moe.layer.accept import aligned, convert, refuse_unreadable, weigh_input
from cutlass_moe.layer.checks import Accepted, accept_layer, layer_addresses
from cutlass_moe.layer.reference import fused_moe_reference
from cutlass_moe.layer.steps import LayerProblems, Quantize
from cutlass_moe.layer.why_not import why_no_layer
from cutlass_moe.layer.workspace import LayerWorkspace, scale_strides, up_projection
from cutlass_moe.operands import LayerOperands, LayerOptions, Options
from cutlass_moe.ops import dispatch
from cutlass_moe.ops._copies import writable
from cutlass_moe.ops._types import check_types
from cutlass_moe.ops.dispatch import Choice, choose_launch
from cutlass_moe.ops.route import route_phases, row_capacity
from cutlass_moe.runtime import library
from cutlass_moe.runtime.device import on_device
from cutlass_moe.runtime.fallback import announce_fallback
from cutlass_moe.runtime.launch import Launch
from cutlass_moe.runtime.parameters import (
    DENSE,
    Strides,
    combine_values,
    quantize_groups_values,
    quantize_values,
    route_values,
)
from cutlass_moe.runtime.signatures import Signatures, signature
from emitters.spec.gemm import GemmProblem
from emitters.spec.layer_steps import CombineProblem, QuantizeGroupsProblem

# Up to this many rows per expert, programmatic dependent launch saves 2 to 30% of a layer's time.
# Above it arithmetic limits the GEMMs, and they take up to a third longer with it (perf/README.md).
_PDL_ROWS = 32
INVARIANT_ROWS = 64  # per expert: what a batch-invariant layer's configs are chosen for


class Link:
    """One launch of a chain, with the names of the tensors that it reads and writes.

    reads, writes: map each parameter that is an address to the name of a tensor: a field of
    LayerOperands, "out", or a region of the layer's workspace. Not thread-safe.
    """

    def __init__(self, choice: Choice, reads: dict[str, str], writes: dict[str, str]) -> None:
        self.choice, self.reads, self.writes = choice, reads, writes
        known = {param.name for param in choice.kernel.record.params}
        named = {param: name for param, name in {**reads, **writes}.items() if param in known}
        self._params, self._find = tuple(named), itemgetter(*named.values())
        self._launch: Launch | None = None
        self._found: tuple[int, ...] = ()  # the addresses that `_launch` has

    def launch(self, addresses: dict[str, int], stream: int) -> None:
        """Enqueues the launch on a stream. addresses: by the name of the tensor."""
        found = self._find(addresses)
        launch, self._launch = self._launch, None  # after an error it is made anew
        if launch is None:
            launch = self.choice.prepare(dict(zip(self._params, found, strict=True)))
        elif found != self._found:
            kernel, views = self.choice.kernel, self.choice.views
            for param, address, before in zip(self._params, found, self._found, strict=True):
                if address != before and param != "out_map":  # which moves with out
                    kernel.move(launch, param, address, views)
        launch(stream)
        self._launch, self._found = launch, found


class Chain:
    """The launches of one layer on one device.

    With programmatic dependent launch a kernel may start before its predecessor ends. It then waits
    for the end of its predecessor before it reads what that wrote:

      kernel            starts at the earliest     before the wait it             waits before
      route             as its predecessor allows  does nothing                   reading ids
      quantize hidden   after route's wait         does all its work on hidden    it ends
      up                with quantize hidden       does nothing                   reading offsets
      quantize active   after up's wait            reads the number of rows       reading rows
      down              with quantize active       reads offsets, loads weights   reading rows
      combine           after down's wait          reads topk_weights, inverse    reading rows

    Without quantisation, up starts after route's wait and down after up's; the latter holds where
    up quantises its output, too. Only the swap template loads weights before its wait. Every kernel
    waits, even where it needs nothing of its predecessor: so its successor knows that all earlier
    kernels have ended. A kernel lets its successor start only after its own wait, so at most two
    run at a time; quantisations let it start at once, so that the GEMM is ready when they end.
    """

    def __init__(
        self, accepted: Accepted, options: LayerOptions, workspace: LayerWorkspace
    ) -> None:
        """Each launch makes the conversions that the accepted arguments needed."""
        layer, self.conversions, problems = accepted
        self.workspace, self.options = workspace, options
        self.rows = layer.topk_ids.numel()
        self.why_not: str | None = None
        self.links: list[Link] = []
        self._lock = Lock()
        if layer.hidden.is_cuda and self.rows:
            arch = library.device_arch(layer.hidden.get_device())
            self.why_not = why_no_layer(problems, arch)
            if self.why_not is None:
                self.links = layer_links(layer, options, problems)

    def launch(self, layer: LayerOperands, out: Tensor, base: int) -> None:
        """Enqueues the layer on torch's current stream. base: the address of its workspace."""
        layer = convert(layer, self.conversions) if self.conversions else layer
        if not self.rows:
            out.zero_() if layer.residual is None else out.copy_(layer.residual)
            if layer.overflow is not None:
                layer.overflow.zero_()
        elif not self.links:
            layer = aligned(layer)
            refuse_unreadable(layer)
            if self.why_not:
                announce_fallback(self.why_not)
            fused_moe_reference(**layer._asdict(), **self.options._asdict(), out=out)
        else:
            self._launch_links(
                weigh_input(layer) if self.options.weight_on_input else layer, out, base
            )

    def _launch_links(self, layer: LayerOperands, out: Tensor, base: int) -> None:
        try:
            addresses = layer_addresses(layer, out)
        except ValueError:  # a kernel can't read or write something where it is
            layer = aligned(layer)
            with writable(out) as room:
                addresses = layer_addresses(layer, room)
                self._enqueue_all(addresses, base, out.get_device())
        else:
            self._enqueue_all(addresses, base, out.get_device())

    def _enqueue_all(self, addresses: dict[str, int], base: int, device: int) -> None:
        addresses |= self.workspace.addresses(base)
        if self.options.weight_on_input or self.options.reduce == "none":
            addresses["topk_weights"] = 0  # all are 1
        on_device(device, partial(self._enqueue, addresses))

    def _enqueue(self, addresses: dict[str, int], stream: int) -> None:
        with self._lock:
            for link in self.links:
                link.launch(addresses, stream)


def plan_workspace(
    layer: LayerOperands, options: LayerOptions, problems: LayerProblems
) -> LayerWorkspace:
    """The workspace that a layer needs."""
    tokens, pairs = len(layer.hidden), layer.topk_ids.numel()
    return LayerWorkspace(problems, tokens, pairs, options.rows(pairs), layer.hidden.device)


def layer_links(layer: LayerOperands, options: LayerOptions, problems: LayerProblems) -> list[Link]:
    """The launches of a layer, in order; loads their kernels.

    Raises what `library.load` raises.
    """
    tokens, pairs = len(layer.hidden), layer.topk_ids.numel()
    rows = options.rows(pairs)
    ids = problems.up.num_experts if layer.expert_map is None else layer.expert_map.numel()
    make = _LinkMaker(layer, options, pairs / max(ids, 1))
    routing = {"index": "index", "offsets": "offsets"}
    up_x, down_x = {"x": "hidden"}, {"x": "active"}
    links = make.route(problems, row_capacity(layer.topk_ids, ids, options.capacity_factor))
    if problems.quantize_hidden:
        stride = layer.hidden.stride(0) * layer.hidden.element_size()
        read = {"source": "hidden", "static_scale": "hidden_scale"}
        links.append(
            make.quantize(problems.quantize_hidden, problems.up, tokens, stride, read, early=True)
        )
        up_x = {"x": "hidden_q", "per_token_scale": "hidden_q_scale"}
    elif options.quant:
        up_x["per_token_scale"] = "hidden_scale"
    if options.quant:
        down_x = {"x": "active_q", "per_token_scale": "active_q_scale"}
    up = up_projection(problems, make.expected_rows, rows)
    if up.quantized_out:
        written = {"out": "active_q", "out_scale": "active_q_scale"}
        strides = scale_strides(rows, problems.down)
        links.append(make.gemm(up, tokens, "w13", {**up_x, **routing}, written, strides))
    else:
        links.append(make.gemm(up, tokens, "w13", {**up_x, **routing}, {"out": "active"}))
        if problems.quantize_active:
            stride = up.out.bytes * problems.down.k
            read = {"source": "active", "end": "last_end", "static_scale": "active_scale"}
            links.append(make.quantize(problems.quantize_active, problems.down, rows, stride, read))
    links.append(make.gemm(problems.down, rows, "w2", {**down_x, **routing}, {"out": "rows"}))
    outputs, weight_stride = tokens, layer.topk_weights.stride(0)
    if options.reduce != "sum":
        outputs, weight_stride = pairs, 1
    values = combine_values({}, rows, outputs, weight_stride)
    read = {
        "rows": "rows",
        "weights": "topk_weights",
        "inverse": "inverse",
        "residual": "residual",
    }
    links.append(make.rowwise(problems.combine, outputs, values, read, {"out": "out"}))
    return links


class _LinkMaker:
    """Makes the links of a layer; it holds what they have in common."""

    def __init__(self, layer: LayerOperands, options: LayerOptions, per_expert: float) -> None:
        self.layer, self.options = layer, options
        self.device = layer.hidden.get_device()
        self.overlap = options.pdl and per_expert <= _PDL_ROWS
        self.expected_rows = INVARIANT_ROWS if options.batch_invariant else per_expert

    def route(self, problems: LayerProblems, capacity: int) -> list[Link]:
        ids, expert_map = self.layer.topk_ids, self.layer.expert_map
        pairs, num_experts = ids.numel(), problems.route.num_experts
        config = step_config(problems.route, few=pairs <= FEW_PAIRS)
        kernel = library.load(problems.route, config, self.device)
        values = route_values(
            {},
            num_ids=num_experts if expert_map is None else expert_map.numel(),
            pairs=pairs,
            choices=ids.shape[1],
            capacity=capacity,
            max_rows=self.options.rows(pairs),
        )
        read = {"ids": "topk_ids", "expert_map": "expert_map", "overflow": "overflow"}
        written = {name: name for name in ("index", "offsets", "inverse", "histograms")}
        return [
            Link(Choice(kernel, grid, {**values, "phase": phase}, {}, self.overlap), read, written)
            for grid, phase in route_phases(pairs, num_experts)
        ]

    def quantize(
        self,
        problem: Quantize,
        product: GemmProblem,
        rows: int,
        stride: int,
        reads: dict[str, str],
        early: bool = False,
    ) -> Link:
        """A link for a quantisation of the rows named "source". stride: bytes between rows.

        product: reads the result. early: in a dependent launch the rows are final when it starts.
        """
        early = early and self.overlap
        if isinstance(problem, QuantizeGroupsProblem):
            strides = scale_strides(rows, product)
            values = quantize_groups_values({}, rows, stride, strides, early=early)
        else:
            values = quantize_values({}, rows, stride, early=early)
        name = reads["source"]
        return self.rowwise(
            problem, rows, values, reads, {"q": f"{name}_q", "scale": f"{name}_q_scale"}
        )

    def rowwise(
        self,
        problem: Quantize | CombineProblem,
        rows: int,
        values: dict[str, int],
        reads: dict[str, str],
        writes: dict[str, str],
    ) -> Link:
        """A link for a kernel whose CTAs share out rows: quantize and combine."""
        kernel = library.load(problem, step_config(problem), self.device)
        grid = problem.ctas(rows, kernel.record.threads)
        return Link(Choice(kernel, grid, values, {}, self.overlap), reads, writes)

    def gemm(
        self,
        problem: GemmProblem,
        num_tokens: int,
        weight: str,
        reads: dict[str, str],
        writes: dict[str, str],
        out_scale: tuple[int, int] | None = None,
    ) -> Link:
        """A link for a GEMM. weight: "w13" or "w2", also the prefix of its scale and bias.
        out_scale: as in `Strides`."""
        interleaved, numbers = self.options.interleaved and problem.gated, self.options.numbers
        choice = choose_launch(
            problem,
            self.device,
            num_tokens,
            self.options.rows(self.layer.topk_ids.numel()),
            getattr(self.layer, weight).stride(),
            Options(
                expected_rows=self.expected_rows,
                interleaved=interleaved,
                activation=str(self.options.function) if problem.activation else None,
                **(numbers._asdict() if numbers and problem.activation else {}),
            ),
            self.strides(problem, num_tokens, reads["x"])._replace(out_scale=out_scale),
        )
        # down may read offsets before its wait: up has waited for route, which wrote them
        early = self.overlap and not problem.gather
        reads = {**reads, "weight": weight, "scale": f"{weight}_scale", "bias": f"{weight}_bias"}
        return Link(
            choice._replace(values={**choice.values, "early": int(early)}, overlap=self.overlap),
            reads,
            {**writes, "out_map": writes["out"]},
        )

    def strides(self, problem: GemmProblem, num_tokens: int, x: str) -> Strides:
        """The strides of x and its scale; x is dense where the layer's kernels write it."""
        hidden, scale = self.layer.hidden, self.layer.hidden_scale
        if x != "hidden":
            blocks = problem.block_rows
            return Strides(x_scale=scale_strides(num_tokens, problem)) if blocks else DENSE
        return Strides(
            hidden.stride(0), scale.stride() if scale is not None and problem.block_rows else None
        )


_chains: Signatures[Chain] = Signatures(limit=2048)  # a chain takes tens of kB


def launch_layer(
    layer: LayerOperands, options: LayerOptions, out: Tensor, workspace: Tensor | None = None
) -> None:
    """Computes a layer whose arguments are `widened`. Raises what `find_chain` raises."""
    chain = find_chain(layer, options, out, workspace)
    if workspace is None:
        workspace = out.new_empty(chain.workspace.layout.size, dtype=torch.uint8)
    chain.launch(layer, out, chain.workspace.base(workspace))


def find_chain(
    layer: LayerOperands, options: LayerOptions, out: Tensor, workspace: Tensor | None = None
) -> Chain:
    """Checks arguments, workspace included, and chooses kernels, once per signature.

    A signature is the options and the dtypes, shapes, strides and devices of tensors; it fails on
    what is no tensor. Raises what `check_layer` and `library.load` raise.
    """
    key = signature((*options, dispatch.forced), (*layer, out))
    chain = _chains.get(key)
    if chain is None:
        check_types(LayerOptions, options._asdict())
        accepted = accept_layer(layer, options, out)
        needed = plan_workspace(accepted.layer, options, accepted.problems)
        if workspace is not None:
            needed.layout.aligned(workspace)
        chain = _chains.keep(key, Chain(accepted, options, needed))
    return chain
