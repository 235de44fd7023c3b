"""What `cutlass-moe demo` runs: a model's two projections, and its layer, on one routing.

Weights are random, or those of a layer of the directory that holds the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from cutlass_moe.layer.fused_moe import fused_moe
from cutlass_moe.layer.why_not import why_not
from cutlass_moe.models.checkpoints import Checkpoint
from cutlass_moe.models.expert_weights import BLOCK, ExpertWeights
from cutlass_moe.models.problems import block_rows
from cutlass_moe.models.shapes import MODELS, MoeShape
from cutlass_moe.models.shards import has_weights
from cutlass_moe.operands import FP8_BLOCK, NAMED_DTYPES, PACKINGS
from cutlass_moe.ops._packed import columns, packed_shape, packing_of
from cutlass_moe.ops.activations import activate
from cutlass_moe.ops.block_scales import BLOCKS
from cutlass_moe.ops.combine import combine_reference
from cutlass_moe.ops.grouped_matmul import grouped_matmul
from cutlass_moe.ops.grouped_matmul_reference import grouped_matmul_reference
from cutlass_moe.ops.pack import dequantize_packed, quantize_packed
from cutlass_moe.ops.quantize import quantize_per_channel, quantize_per_token
from cutlass_moe.ops.quantize_groups import quantize_per_block, quantize_per_token_group
from cutlass_moe.ops.route import RoutingTable, route
from emitters.spec.packing import Packing

GPU_TOKENS, CPU_TOKENS = 4096, 4
ERROR_LIMIT = 4e-3  # rounding to bf16 gives 1.7e-3, the fast sums of fp8 up to 2.5e-3
# Of a layer to its projections one by one, whose results are rounded to bf16 before they are
# activated and quantised: some 8-bit values turn over to the next, which costs up to 2e-2.
LAYER_ERROR_LIMIT = 3e-2
LAUNCHES = 30
CHECKED_ROWS = 16


@dataclass(frozen=True)
class Operand:
    """8-bit values and float32 scales of their rows, or bf16 values or packed weights alone.

    block_rows: of how many rows a scale is, if it is one for each 128 columns; else None.
    """

    values: Tensor
    scale: Tensor | None = None
    block_rows: int | None = None


@dataclass(frozen=True)
class Product:
    """The arguments of a grouped_matmul: x [T, K], weight [E, N, K], bias [E, N]; rows: its number
    of rows."""

    x: Operand
    weight: Operand
    bias: Tensor | None
    rows: int
    offsets: Tensor
    index: Tensor | None = None

    def run(self, multiply: Callable[..., Tensor] = grouped_matmul) -> Tensor:
        out = multiply(
            self.x.values,
            self.weight.values,
            index=self.index,
            offsets=self.offsets,
            per_token_scale=self.x.scale,
            scale=self.weight.scale,
            bias=self.bias,
        )
        return out[: self.rows]

    def flops(self) -> float:
        return 2.0 * self.rows * columns(self.weight.values) * self.x.values.shape[1]

    def moved_weights(self) -> float:
        """Bytes of the experts that have rows."""
        experts = len(self.offsets[self.offsets > 0].unique())
        return float(experts * self.weight.values[0].nbytes)


def run(
    shape: MoeShape,
    dtype: str,
    console: Console,
    *,
    tokens: int | None = None,
    topk_ids: Path | None = None,
    seed: int = 0,
    model: str | None = None,
    layer: int | None = None,
) -> bool:
    """Runs up, activation, down on random tokens, each by itself and as one layer: kernels on an
    SM90 GPU, else the reference on the CPU.

    model: what shape is of. If it is a directory with safetensors files, the weights are those of
    one of its layers, default the first with experts; else they are random.

    Prints a table, returns whether the results are right. Raises ValueError where the file of
    topk_ids holds no routing, and what `Checkpoint` raises.
    """
    activation = _activation(shape, dtype)
    shape = shape.padded(dtype)  # as pad_experts makes a layer's weights
    gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    if not gpu:
        console.print("No SM90 GPU here: all runs through the reference, on the CPU.")
    torch.manual_seed(seed)
    count = tokens or (GPU_TOKENS if gpu else CPU_TOKENS)
    ids, routing, rows = route_tokens(shape, count, topk_ids, "cuda" if gpu else "cpu")
    hidden = torch.randn(len(ids), shape.hidden, device=ids.device, dtype=torch.bfloat16)
    topk_weights = torch.rand(ids.shape, device=ids.device)
    topk_weights /= topk_weights.sum(1, keepdim=True)
    stored = model if model and model not in MODELS and has_weights(Path(model)) else None
    if stored:
        weights = read_weights(Path(stored), layer, dtype, ids.device, console)
    elif layer is not None:
        raise ValueError(f"--layer needs a directory with weights, got {model}")
    else:
        weights = random_weights(shape, dtype, routing.offsets)

    table = Table("", "tokens", "rows", "time", "TFLOP/s", "GB/s", "relative error")
    x = _operand(hidden, dtype)
    of_w2 = None if weights.block_inter is None else BLOCK
    w13 = Operand(weights.w13, weights.w13_scale, weights.block_inter)
    w2 = Operand(weights.w2, weights.w2_scale, of_w2)
    up = Product(x, w13, weights.w13_bias, rows, routing.offsets, routing.index)
    gates, up_error = _measure_product("up", up, table)
    active = activate(gates.float(), activation, weights.interleaved).bfloat16()
    x = _operand(active, dtype)
    down = Product(x, w2, weights.w2_bias, rows, routing.offsets)
    results, down_error = _measure_product("down", down, table)

    call = {**weights.arguments, "activation": activation}
    call |= {"hidden": hidden, "topk_weights": topk_weights, "topk_ids": ids}
    if reason := why_not(**call):
        console.print(f"No kernel for the layer: {reason}", markup=False)
    expected = combine_reference(results, topk_weights, routing.inverse)
    layer_error = _measure_layer(call, (up, down), expected, table)
    console.print(table)
    right = max(up_error, down_error) <= ERROR_LIMIT
    return right and layer_error <= LAYER_ERROR_LIMIT


def _activation(shape: MoeShape, dtype: str) -> str:
    """The activation of a layer that can be run; raises ValueError for another layer."""
    if shape.activation is None:
        raise ValueError(f"{shape.name}: no kernel has its experts' activation")
    if dtype == FP8_BLOCK and shape.inter % block_rows(shape.inter):
        least = min(BLOCKS)  # else a block of the up projection has gates and ups
        raise ValueError(
            f"{shape.name}: inter must be a multiple of {least} for {dtype}, got {shape.inter}"
        )
    return shape.activation


def route_tokens(
    shape: MoeShape, tokens: int, saved: Path | None, device: str
) -> tuple[Tensor, RoutingTable, int]:
    """topk_ids, saved ones or so many skewed ones, their routing and its number of rows. Raises
    ValueError where there are none."""
    ids = (saved_routing(saved) if saved else skewed_routing(shape, tokens)).to(device)
    routing = route(ids, shape.num_experts)
    rows = int(routing.offsets[-1])
    if not rows:
        raise ValueError(f"expected ids in [0, {shape.num_experts}), got none")
    return ids, routing, rows


def skewed_routing(shape: MoeShape, tokens: int) -> Tensor:
    """topk_ids int64 [tokens, top_k]: the r-th favourite expert has 1 / r of the first one's
    weight."""
    weight = 1.0 / torch.randperm(shape.num_experts).add(1)
    return torch.multinomial(weight.expand(tokens, -1), shape.top_k)


def saved_routing(path: Path) -> Tensor:
    """topk_ids [tokens, top_k] as `numpy.save` wrote them. Raises ValueError on other arrays."""
    import numpy as np  # not needed by anything else here

    ids = np.load(path)
    if ids.ndim != 2 or ids.dtype not in (np.int32, np.int64) or not len(ids):
        raise ValueError(
            f"{path}: expected topk_ids [tokens, top_k] of int32 or int64, "
            f"got {list(ids.shape)} of {ids.dtype}"
        )
    return torch.from_numpy(ids)


def read_weights(
    directory: Path, layer: int | None, dtype: str, device: torch.device, console: Console
) -> ExpertWeights:
    """Those of a layer of a checkpoint, quantised again if they are stored in another way."""
    with Checkpoint(directory) as checkpoint:
        layer = checkpoint.layers[0] if layer is None else layer
        stored, words = checkpoint.stored(layer), f"Reading layer {layer}"
        weights = checkpoint.read(
            layer,
            device=device,
            quant=dtype,
            track=lambda experts: track(experts, words, console=console, transient=True),
        )
    again = "" if stored == dtype else f", stored as {stored} and converted to {dtype}"
    console.print(f"Weights: layer {layer} of {directory}{again}", markup=False)
    return weights.padded()


def random_weights(shape: MoeShape, dtype: str, offsets: Tensor) -> ExpertWeights:
    up = _random_weight(shape, "up", dtype, offsets)
    up_bias = _random_bias(shape, "up", offsets.device)
    down = _random_weight(shape, "down", dtype, offsets)
    down_bias = _random_bias(shape, "down", offsets.device)
    return ExpertWeights(
        up.values,
        down.values,
        up.scale,
        down.scale,
        dtype,
        up.block_rows,
        w13_bias=up_bias,
        w2_bias=down_bias,
    )


def _operand(x: Tensor, dtype: str) -> Operand:
    if dtype == "bf16" or dtype in PACKINGS:
        return Operand(x)
    if dtype == FP8_BLOCK:
        return Operand(*quantize_per_token_group(x), block_rows=1)
    return Operand(*quantize_per_token(x, NAMED_DTYPES[dtype]))


def _quantize_weight(weight: Tensor, dtype: str, rows: int | None) -> tuple[Tensor, Tensor]:
    """Quantises weights [E, N, K]. rows: of a block, where scales are those of blocks."""
    if rows is not None:
        return quantize_per_block(weight, rows=rows)
    return quantize_per_channel(weight, NAMED_DTYPES[dtype])


def _random_weight(shape: MoeShape, name: str, dtype: str, offsets: Tensor) -> Operand:
    """Normal weights of unit gain, for the experts that have rows.

    The others are never read, nor is their memory touched: a large model fits in a small host.
    """
    n, k = shape.gemms[name]
    counts = offsets.diff(prepend=offsets.new_zeros(1))
    packing = Packing(dtype) if dtype in PACKINGS else None
    one = packed_shape(packing, n, k) if packing else (n, k)
    values_dtype = torch.uint8 if packing else NAMED_DTYPES[dtype]
    values = torch.empty(shape.num_experts, *one, dtype=values_dtype, device=offsets.device)
    rows = None
    if dtype == FP8_BLOCK:
        rows = block_rows(shape.inter) if name == "up" else BLOCK
    scales: list[Tensor | None] = [None] * shape.num_experts
    for expert in counts.nonzero().flatten().tolist():
        dense = torch.randn(1, n, k, device=offsets.device).div_(k**0.5)
        if dtype == "bf16":
            values[expert] = dense[0]
        elif packing:
            values[expert] = quantize_packed(dense, dtype)[0]
        else:
            q, scale_of_one = _quantize_weight(dense, dtype, rows)
            values[expert], scales[expert] = q[0], scale_of_one[0]
    if dtype == "bf16" or packing:
        return Operand(values)
    ones = torch.ones_like(next(scale for scale in scales if scale is not None))
    scale = torch.stack([ones if scale is None else scale for scale in scales])
    return Operand(values, scale, rows)


def _random_bias(shape: MoeShape, name: str, device: torch.device) -> Tensor | None:
    if not shape.bias:
        return None
    n = shape.gemms[name].n
    return torch.randn(shape.num_experts, n, device=device, dtype=torch.bfloat16)


def _measure_product(name: str, product: Product, table: Table) -> tuple[Tensor, float]:
    """Runs a product and adds its row to the table. Returns its result and relative error."""
    gpu = product.offsets.is_cuda
    out, seconds = _run_timed(product.run, gpu)
    if gpu:
        error = _relative_error(out, product.run(grouped_matmul_reference))
    else:
        error = _relative_error(*_some_rows(product, out))
    tokens, moved = len(product.x.values), product.moved_weights()
    moved += product.x.values.nbytes + out.nbytes
    table.add_row(name, *_cells(tokens, product.rows, seconds, product.flops(), moved, error, gpu))
    return out, error


def _measure_layer(
    call: dict[str, Any], products: tuple[Product, Product], expected: Tensor, table: Table
) -> float:
    """Runs the layer and adds its row to the table. Returns its relative error."""
    hidden: Tensor = call["hidden"]
    out, seconds = _run_timed(lambda: fused_moe(**call), hidden.is_cuda)
    error = _relative_error(out, expected)
    flops = sum(product.flops() for product in products)
    moved = sum(product.moved_weights() for product in products) + hidden.nbytes + out.nbytes
    sizes = (len(hidden), products[0].rows, seconds, flops, moved)
    table.add_row("layer", *_cells(*sizes, error, hidden.is_cuda))
    return error


def _cells(
    tokens: int, rows: int, seconds: float, flops: float, moved: float, error: float, gpu: bool
) -> tuple[str, ...]:
    return (
        str(tokens),
        str(rows),
        f"{seconds * 1e6:.1f} us" if gpu else f"{seconds:.2f} s",
        f"{flops / seconds / 1e12:.3g}",
        f"{moved / seconds / 1e9:.3g}",
        f"{error:.2e}",
    )


def _run_timed(call: Callable[[], Tensor], gpu: bool) -> tuple[Tensor, float]:
    """The result, and seconds of one call: on a GPU the median of many."""
    start = time.perf_counter()
    out = call()
    if not gpu:
        return out, time.perf_counter() - start
    times = []
    for _ in range(LAUNCHES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return out, median(times)


def _some_rows(product: Product, out: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows of out, and the same made one by one in float32: no code of the reference."""
    rows = torch.linspace(0, product.rows - 1, CHECKED_ROWS).long().unique()
    experts = torch.searchsorted(product.offsets, rows, right=True)
    tokens = rows if product.index is None else product.index[rows].long()
    pairs = zip(experts, tokens, strict=True)
    k = product.x.values.shape[1]
    expected = torch.stack(
        [_dense(product.weight, e)[:, :k] @ _dense(product.x, t) for e, t in pairs]
    )
    if product.bias is not None:
        expected += product.bias[experts]
    return out[rows], expected


def _dense(operand: Operand, i: Tensor) -> Tensor:
    """A row [K] of x, or the weights [N, K] of an expert."""
    if packing_of(operand.values) is not None:
        return dequantize_packed(operand.values[i, None])[0]
    values = operand.values[i].float()
    if operand.scale is None:
        return values
    scale = operand.scale[i]
    if operand.block_rows is None:
        return values * scale[..., None]
    scale = scale.repeat_interleave(BLOCK, -1)[..., : values.shape[-1]]
    if values.dim() == 2:
        scale = scale.repeat_interleave(operand.block_rows, 0)[: len(values)]
    return values * scale


def _relative_error(got: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm())
