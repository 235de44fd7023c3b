"""A layer's kernels, chosen once for each signature of its arguments, and their launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cutlass_moe.choose.heuristics_sm90 import FEW_PAIRS, step_config
from cutlass_moe.layer.checks import check_addresses, check_layer, problems_of
from cutlass_moe.layer.reference import fused_moe_reference
from cutlass_moe.operands import QUANTS, Layer, LayerOptions, Options
from cutlass_moe.ops import dispatch
from cutlass_moe.ops.combine import combine_values
from cutlass_moe.ops.quantize import quantize_values
from cutlass_moe.ops.route import RoutePlaces, launch_route, route_scratch, row_capacity
from cutlass_moe.runtime import library
from cutlass_moe.runtime.fallback import announce_fallback
from cutlass_moe.runtime.signatures import signature
from cutlass_moe.runtime.tensor_map import WeightView
from cutlass_moe.runtime.workspace import WorkspacePlan
from emitters.spec.gemm import GemmProblem
from emitters.spec.layer_steps import CombineProblem, QuantizeProblem
from emitters.spec.weight_map import gate_strides

_MAX_CHAINS = 8192
# Above so many rows an expert GEMMs are limited by arithmetic, and take up to a third longer when
# they are launched before their predecessors end; below, a layer takes 2 to 30% less time with it
# (perf/README.md).
_PDL_ROWS = 32


class Parts:
    """What lies where in a layer's workspace."""

    def __init__(self, layer: Layer, quant: str | None) -> None:
        tokens, hidden = layer.hidden.shape
        experts, inter = layer.w2.shape[0], layer.w2.shape[2]
        rows = layer.topk_ids.numel()
        plan = WorkspacePlan(layer.hidden.device)
        self.plan = plan
        self.index = plan.place((rows,), torch.int32)
        self.offsets = plan.place((experts,), torch.int32)
        self.inverse = plan.place((rows,), torch.int32)
        self.scratch = plan.place((route_scratch(rows, experts),), torch.int32)
        self.active = plan.place((rows, inter), torch.float16 if quant else layer.hidden.dtype)
        self.rows = plan.place((rows, hidden), layer.hidden.dtype)
        if quant:
            self.x = plan.place((tokens, hidden), QUANTS[quant])
            self.x_scale = plan.place((tokens,), torch.float32)
            self.quantized = plan.place((rows, inter), QUANTS[quant])
            self.quantized_scale = plan.place((rows,), torch.float32)


class Chain:
    """The launches of one layer on one device.

    With programmatic dependent launch a kernel may start before its predecessor ends, and waits
    for it before it reads what that wrote; every kernel waits, so that all before a predecessor
    have ended too. A kernel lets its successor start once it has waited itself, so that no more
    than two are on their way, but quantisation lets it start at once: that of the tokens works
    while route does, and waits at its end. GEMMs are so ready when it ends; down has by then
    loaded its first weights, for which it needs `offsets` alone, complete since up waited.
    """

    def __init__(self, layer: Layer, options: LayerOptions) -> None:
        self.parts = Parts(layer, options.quant)
        self.options = options
        self.tokens, self.rows = len(layer.hidden), layer.topk_ids.numel()
        self.why_not: str | None = None
        self.has_kernels = layer.hidden.is_cuda and self.rows > 0
        if self.has_kernels:
            self.problems = problems_of(layer, options)
            arch = library.device_arch(layer.hidden.get_device())
            self.why_not = self.problems.why_illegal(arch)
            self.has_kernels = self.why_not is None
        if self.has_kernels:
            self._load(layer)

    def _load(self, layer: Layer) -> None:
        device, problems = layer.hidden.get_device(), self.problems
        experts = problems.up.num_experts
        if layer.expert_map is not None:
            experts = max(1, layer.expert_map.numel())
        per_expert = self.rows / experts
        self.pdl = self.options.pdl and per_expert <= _PDL_ROWS
        ids = layer.topk_ids
        route = step_config(problems.route, few=self.rows <= FEW_PAIRS)
        self.route = library.load(problems.route, route, device)
        self.capacity = row_capacity(ids, experts, self.options.capacity_factor)
        self.up = Gemm(
            problems.up, device, self.tokens, self.rows, per_expert, self.options.interleaved
        )
        self.down = Gemm(problems.down, device, self.rows, self.rows, per_expert)
        self.combine = Rowwise(problems.combine, device, self.tokens)
        if problems.quantize_hidden and problems.quantize_active:
            self.quantize_hidden = Rowwise(problems.quantize_hidden, device, self.tokens)
            self.quantize_active = Rowwise(problems.quantize_active, device, self.rows)

    def launch(self, layer: Layer, out: Tensor, base: int) -> None:
        """Enqueues the layer on torch's current stream. base: address of an aligned workspace."""
        device = out.get_device()
        if not self.rows:
            out.zero_() if layer.residual is None else out.copy_(layer.residual)
        elif not self.has_kernels:
            if self.why_not:
                announce_fallback(self.why_not)
            fused_moe_reference(**layer._asdict(), **self.options._asdict(), out=out)
        elif torch._C._cuda_getDevice() == device:
            self._launch(layer, out, base, torch._C._cuda_getCurrentRawStream(device))
        else:
            with torch.cuda.device(device):
                self._launch(layer, out, base, torch._C._cuda_getCurrentRawStream(device))

    def _launch(self, layer: Layer, out: Tensor, base: int, stream: int) -> None:
        check_addresses(layer, out)
        parts, pdl = self.parts, self.pdl
        routing = (parts.index, parts.offsets, parts.inverse, parts.scratch)
        places = RoutePlaces(*(base + part.offset for part in routing))
        active, rows = base + parts.active.offset, base + parts.rows.offset
        x = layer.hidden.data_ptr()
        table = {"index": places.index, "ends": places.offsets}
        launch_route(
            self.route, layer.topk_ids, layer.expert_map, self.problems.up.num_experts,
            self.capacity, places, stream, pdl,
        )  # fmt: skip
        up = {"x": x, "out": active, **table, **scales(layer.w13_scale, layer.w13_bias)}
        down = {"x": active, "out": rows, **table, **scales(layer.w2_scale, layer.w2_bias)}
        if self.options.quant:
            up["x"], up["per_token_scale"] = base + parts.x.offset, base + parts.x_scale.offset
            down["x"] = base + parts.quantized.offset
            down["per_token_scale"] = base + parts.quantized_scale.offset
            values = quantize_values(x, up["x"], up["per_token_scale"], self.tokens, early=pdl)
            self.quantize_hidden.launch(values, stream, pdl)
        self.up.launch(up, layer.w13, stream, pdl)
        if self.options.quant:
            last_end = places.offsets + 4 * (self.problems.up.num_experts - 1)
            values = quantize_values(
                active, down["x"], down["per_token_scale"], self.rows, last_end=last_end
            )
            self.quantize_active.launch(values, stream, pdl)
        self.down.launch(down, layer.w2, stream, pdl, early=pdl)
        values = combine_values(
            (rows, self.rows),
            layer.topk_weights.data_ptr(),
            places.inverse,
            address(layer.residual),
            (out.data_ptr(), self.tokens),
        )
        self.combine.launch(values, stream, pdl)


class Rowwise:
    """A kernel whose CTAs share out rows."""

    def __init__(self, problem: QuantizeProblem | CombineProblem, device: int, rows: int) -> None:
        self.kernel = library.load(problem, step_config(problem), device)
        self.grid = problem.ctas(rows, self.kernel.record.threads)

    def launch(self, values: list[int], stream: int, overlap: bool) -> None:
        self.kernel.launch(values, self.grid, stream, overlap)


class Gemm:
    """One of a layer's grouped GEMMs, chosen and loaded."""

    def __init__(
        self,
        problem: GemmProblem,
        device: int,
        tokens: int,
        rows: int,
        per_expert: float,
        interleaved: bool = False,
    ) -> None:
        options = Options(expected_rows=per_expert)
        self.kernel, self.grid = dispatch.choose_launch(problem, device, tokens, rows, options)
        self.names = [param.name for param in self.kernel.record.params]
        self.rows = rows
        column, gate = gate_strides(problem.n, interleaved)
        self.constants = {
            "num_tokens": tokens,
            "num_rows": rows,
            "starts": 0,
            "column_stride": column,
            "gate_stride": gate,
        }
        self.interleaved = interleaved

    def launch(
        self,
        values: dict[str, int],
        weight: Tensor,
        stream: int,
        overlap: bool,
        early: bool = False,
    ) -> None:
        given = {**self.constants, **values, "weight": 0, "out_map": 0, "early": int(early)}
        self.kernel.launch_gemm(
            [given[name] for name in self.names],
            WeightView(weight.data_ptr(), weight.stride(), self.interleaved),
            (values["out"], self.rows),
            self.grid,
            stream,
            overlap,
        )


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def scales(scale: Tensor | None, bias: Tensor | None) -> dict[str, int]:
    """By the names of the nodes that read them."""
    values = address(scale)
    return {"channel_scale": values, "expert_scale": values, "bias": address(bias)}


_chains: dict[tuple[Any, ...], Chain] = {}


def find_chain(layer: Layer, options: LayerOptions, out: Tensor) -> Chain:
    """Checks arguments and chooses kernels, once a signature: dtypes, shapes, strides, devices.

    Raises what `check_layer` and `library.load` raise.
    """
    key = signature((*options, dispatch.forced), (*layer, out))
    chain = _chains.get(key)
    if chain is None:
        check_layer(layer, options, out)
        if len(_chains) >= _MAX_CHAINS:
            _chains.clear()
        chain = _chains[key] = Chain(layer, options)
    return chain
