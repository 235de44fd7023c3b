"""The reader of checkpoints: the experts of one layer after the other, of a directory as it is
published (config.json and safetensors files), stacked as `fused_moe` takes them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cutlass_moe.models.expert_weights import (
    BLOCK,
    ExpertWeights,
    allocate,
    check_requantized,
)
from cutlass_moe.models.families import FAMILIES, OTHER
from cutlass_moe.models.files import read_model
from cutlass_moe.models.layouts import Layout, Matrix, check_tensors, find_layout
from cutlass_moe.models.packed_experts import fill_packed
from cutlass_moe.models.problems import block_rows
from cutlass_moe.models.shards import Shards
from cutlass_moe.models.tensor_names import TensorNames
from cutlass_moe.operands import FP8_BLOCK
from cutlass_moe.ops.activations import in_halves

_NUMBERED = re.compile(r"(?P<root>.*?)\.?(?P<layer>\d+)\.(?P<name>.+)")  # layer: the first number
_PREDICTORS = re.compile(r"(^|\.)mtp(\.|$)")  # of several tokens at once: not the model's layers
Track = Callable[[Iterable[int]], Iterable[int]]


class Share(NamedTuple):
    """What one of tp x ep ranks holds of a layer: of the intermediate size the tp_rank-th of tp
    equal parts, of the experts the ep_rank-th of ep equal ranges."""

    tp: int = 1
    tp_rank: int = 0
    ep: int = 1
    ep_rank: int = 0

    def experts(self, count: int) -> range:
        """Which of so many experts. Raises ValueError where ep does not divide them."""
        start, stop = _part("ep", self.ep, self.ep_rank, count, "experts")
        return range(start, stop)

    def inter(self, size: int) -> tuple[int, int]:
        """Start and stop within the intermediate size. Raises ValueError where tp does not divide
        it."""
        return _part("tp", self.tp, self.tp_rank, size, "of the intermediate size")


class RouterWeights(NamedTuple):
    """weight [experts, hidden]; bias of the logits and correction_bias of `topk_router` [experts],
    or None. In the dtypes of the checkpoint."""

    weight: Tensor
    bias: Tensor | None = None
    correction_bias: Tensor | None = None


class Checkpoint:
    """The layers of experts in a directory with config.json and safetensors files.

    Which tensors are looked for says the model's entry in `cutlass_moe.models.families`. Files are
    mapped into memory and read where a layer needs them; besides the layer that is made there is
    never more in memory than one expert.

        with Checkpoint("Qwen3-30B-A3B-FP8") as checkpoint:
            weights = checkpoint.read(0, device="cuda")
        out = fused_moe(hidden, topk_weights=..., topk_ids=..., **weights.arguments)

    model: what config.json says. layers: the numbers of the layers that have experts.

    Raises ValueError where the directory lacks a file or holds no experts that are understood, and
    ModuleNotFoundError without the package safetensors.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.model = read_model(self.directory)
        self._shards = Shards(self.directory)
        self._root, self._tensors, self._names = self._find_layers()
        self.layers = tuple(sorted(self._names))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmaps the files. What was read stays, and a later read maps them again."""
        self._shards.close()

    def stored(self, layer: int) -> str:
        """How the experts of a layer are stored: an `ExpertWeights.quant`. Raises what `read` does,
        for the first expert."""
        return self._layout(layer, range(1)).quant

    def read(
        self,
        layer: int,
        *,
        device: torch.device | str = "cpu",
        share: Share | None = None,
        quant: str | None = None,
        track: Track = iter,
    ) -> ExpertWeights:
        """The experts of a layer, or one rank's share of them.

        quant: "bf16", or "fp8" or "int8" to quantise the weights again with a scale per channel,
        or "fp8_block" with one per block, or "int4_g128", "int4_g32" or "mxfp4" to round them to
        packed 4-bit weights; default as they are stored. One scale for a whole weight
        is repeated for its channels. Where a share begins inside a block of w2's columns, its own
        blocks of 128 columns get the larger of the scales that meet in them, and the values that
        had the smaller one are rounded once more; w13 stays as it is stored.
        track: wraps the numbers of the experts while they are read, for a progress bar: `tqdm.tqdm`
        or `rich.progress.track`.

        Raises ValueError, which names the tensors, where some are missing, not understood, or of
        another shape or dtype than the model's; where the layer has no experts; where the share
        does not divide them; and for weights of a format that no ExpertWeights.quant has.
        """
        share = share or Share()
        experts = share.experts(self.model.shape.num_experts)
        start, stop = share.inter(self.model.shape.inter)
        layout = self._layout(layer, experts)
        block_inter = _block_inter(stop - start, share.tp) if layout.quant == FP8_BLOCK else None
        as_stored = quant in (None, layout.quant)
        if not as_stored:
            check_requantized(str(quant))
        reader = _ExpertReader(self._shards, layout, start, stop)
        stored = reader.allocate(experts if as_stored else experts[:1], device, block_inter)
        weights = stored if as_stored else stored.empty_like(len(experts), str(quant))
        for slot, expert in enumerate(track(experts)):
            reader.fill(stored, slot if as_stored else 0, expert)
            if not as_stored:
                weights.store(slot, stored, 0)
        if share.tp_rank and weights.w2_bias is not None:
            weights.w2_bias.zero_()
        return replace(weights, expert_map=self._expert_map(share, experts, weights.w13.device))

    def read_router(self, layer: int, device: torch.device | str = "cpu") -> RouterWeights:
        """The router of a layer. Raises ValueError where it is missing or has other shapes."""
        experts = self.model.shape.routed.num_experts
        router, names = self._tensors.router, self._names_of(layer)
        weight = self._read_whole(layer, f"{router}.weight", device)
        if weight.dim() != 2 or len(weight) != experts:
            raise self._error(
                layer, f"{router}.weight must be [{experts}, hidden], got {list(weight.shape)}"
            )
        found: list[Tensor | None] = []
        for name in (f"{router}.bias", self._tensors.correction_bias):
            tensor = self._read_whole(layer, name, device).flatten() if name in names else None
            if tensor is not None and len(tensor) % experts:
                raise self._error(layer, f"{name} must be [{experts}], got [{len(tensor)}]")
            found.append(None if tensor is None else tensor[:experts])
        return RouterWeights(weight, *found)

    def read_shared(self, layer: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """What every token of a layer sees, as it is stored, by the names that follow the layer's:
        "mlp.shared_experts.gate_proj.weight" for example. Empty where there is nothing."""
        start = self._tensors.shared
        names = (name for name in self._names_of(layer) if name.startswith(start))
        return {name: self._read_whole(layer, name, device) for name in sorted(names)}

    def _find_layers(self) -> tuple[str, TensorNames, dict[int, set[str]]]:
        """What precedes the numbers of the layers, how their tensors are named, and the names of
        those that have experts."""
        family = self.model.family
        if family.tensors is None:
            raise ValueError(
                f"{self.directory}: the layout of checkpoints of {family.types[0]} is not known"
            )
        known = (one.tensors for one in FAMILIES if one.tensors is not None)
        tried = list(dict.fromkeys(known)) if family is OTHER else [family.tensors]
        roots: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for name in self._shards.files:
            match = _NUMBERED.fullmatch(name)
            if match and not _PREDICTORS.search(match["root"]):
                roots[match["root"]][int(match["layer"])].add(match["name"])
        found = [
            (root, tensors, {i: names for i, names in layers.items() if _has(names, tensors)})
            for tensors in tried
            for root, layers in roots.items()
        ]
        best = max(found, key=lambda one: len(one[2]), default=None)
        if best is None or not best[2]:
            raise ValueError(
                f"{self.directory} must have tensors of experts, named like model.layers.0."
                f"{tried[0].experts}.0.{tried[0].projections[2]}.weight, it has none"
            )
        return best

    def _layout(self, layer: int, experts: range) -> Layout:
        names = self._names_of(layer)
        shape = self.model.shape
        gated = shape.gemms["up"].n > shape.inter
        try:
            layout = find_layout(self._prefix(layer), names, self._tensors, shape, gated)
            return check_tensors(layout, self._shards, experts)
        except ValueError as error:
            raise self._error(layer, str(error)) from error

    def _names_of(self, layer: int) -> set[str]:
        if layer not in self._names:
            raise ValueError(
                f"{self.directory}: layer must be one of those with experts, {self.layers[0]} to "
                f"{self.layers[-1]}, got {layer}"
            )
        return self._names[layer]

    def _prefix(self, layer: int) -> str:
        return f"{self._root}.{layer}." if self._root else f"{layer}."

    def _read_whole(self, layer: int, name: str, device: torch.device | str) -> Tensor:
        return self._shards.read(self._prefix(layer) + name).to(device, copy=True)

    def _error(self, layer: int, words: str) -> ValueError:
        asked = self.model.why_not
        why = f"; its quantization_config asks for {asked}" if asked else ""
        return ValueError(f"{self.directory}, layer {layer}: {words}{why}")

    def _expert_map(self, share: Share, experts: range, device: torch.device) -> Tensor | None:
        if share.ep == 1:
            return None
        table = torch.full((self.model.shape.routed.num_experts,), -1, dtype=torch.int32)
        table[experts.start : experts.stop] = torch.arange(len(experts), dtype=torch.int32)
        return table.to(device)


class _ExpertReader:
    """Copies experts of a layer into stacked tensors: [start, stop) of the intermediate size."""

    def __init__(self, shards: Shards, layout: Layout, start: int, stop: int) -> None:
        self.shards, self.layout = shards, layout
        self.start, self.stop = start, stop

    def allocate(
        self, experts: range, device: torch.device | str, block_inter: int | None
    ) -> ExpertWeights:
        """Tensors for these experts, as they are stored."""
        layout, down = self.layout, self.layout.down
        inter = self.stop - self.start
        bias = self.shards.header(down.bias(experts[0]))[1] if layout.bias else None
        assert not isinstance(bias, str)  # the layout is checked
        return allocate(
            len(experts),
            (layout.rows * inter // down.columns, down.rows, inter),
            layout.quant,
            torch.device(device),
            block_inter,
            layout.interleaved,
            bias,
        )

    def fill(self, weights: ExpertWeights, slot: int, expert: int) -> None:
        """Reads an expert to index `slot` of the weights."""
        layout, block_inter, row = self.layout, weights.block_inter, 0
        scales, biases = [], []
        if layout.values:
            part = slice(self.start, self.stop)
            fill_packed(weights, slot, self.shards, layout, expert, part)
        for matrix in layout.up:
            columns = slice(0, matrix.columns)
            for rows in layout.row_ranges(matrix, self.start, self.stop):
                count = rows.stop - rows.start
                if layout.values:
                    biases.append(self._bias(matrix, expert, rows))
                    continue
                self._read(matrix, expert, rows, columns, weights.w13[slot, row : row + count])
                scales.append(self._scale(matrix, expert, rows, block_inter, columns, BLOCK))
                biases.append(self._bias(matrix, expert, rows))
                row += count
        down, rows, columns = layout.down, slice(0, layout.down.rows), slice(self.start, self.stop)
        down_scale = None
        if not layout.values:
            self._read(down, expert, rows, columns, weights.w2[slot])
            down_scale = self._down_scale(expert, rows, columns, weights.w2[slot])
        elif layout.interleaved:
            biases = [None if one is None else in_halves(one) for one in biases]
        for tensor, parts in (
            (weights.w13_scale, scales),
            (weights.w2_scale, [down_scale]),
            (weights.w13_bias, biases),
            (weights.w2_bias, [self._bias(down, expert, rows)]),
        ):
            if tensor is not None:
                tensor[slot] = torch.cat([part for part in parts if part is not None])

    def _read(self, matrix: Matrix, expert: int, rows: slice, columns: slice, out: Tensor) -> None:
        index = (columns, rows) if matrix.transposed else (rows, columns)
        part = self.shards.read(matrix.weight(expert), *self._lead(matrix, expert), *index)
        part = part.to(out.device)  # a transposition is faster there
        out.copy_(part.t() if matrix.transposed else part)

    def _down_scale(
        self, expert: int, rows: slice, columns: slice, weight: Tensor
    ) -> Tensor | None:
        """The scale of w2; adapts the weight where the share begins inside a block."""
        down = self.layout.down
        if self.layout.quant != FP8_BLOCK:
            return self._scale(down, expert, rows, None, columns, None)
        if columns.start % BLOCK == 0:
            return self._scale(down, expert, rows, BLOCK, columns, BLOCK)
        scale = self._scale(down, expert, rows, BLOCK, columns, 1)
        assert scale is not None
        return _share_scales(weight, scale.to(weight.device))

    def _scale(
        self,
        matrix: Matrix,
        expert: int,
        rows: slice,
        block_rows: int | None,
        columns: slice,
        block_columns: int | None,
    ) -> Tensor | None:
        """float32 [rows], or of blocks of a size [rows / block_rows, columns / block_columns]."""
        if not self.layout.ending:
            return None
        name = matrix.weight(expert) + self.layout.ending
        scale = self.shards.read(name, *self._lead(matrix, expert)).float()
        if block_rows is None or block_columns is None:
            return scale.flatten().expand(matrix.rows)[rows]
        scale = scale.t() if matrix.transposed else scale
        return scale[_blocks(rows, block_rows)][:, _blocks(columns, block_columns)]

    def _bias(self, matrix: Matrix, expert: int, rows: slice) -> Tensor | None:
        if not self.layout.bias:
            return None
        return self.shards.read(matrix.bias(expert), *self._lead(matrix, expert), rows)

    @staticmethod
    def _lead(matrix: Matrix, expert: int) -> tuple[int, ...]:
        return (expert,) if matrix.stacked else ()


def _has(names: set[str], tensors: TensorNames) -> bool:
    return any(name.startswith(f"{tensors.experts}.") for name in names)


def _part(name: str, count: int, rank: int, size: int, what: str) -> tuple[int, int]:
    if count < 1 or not 0 <= rank < count or size % count:
        raise ValueError(
            f"{name} must divide {size} {what} and {name}_rank be in [0, {name}), got {name} "
            f"{count} and {name}_rank {rank}"
        )
    return rank * size // count, (rank + 1) * size // count


def _block_inter(inter: int, tp: int) -> int:
    """How many rows of w13 share a scale in each of tp parts of the intermediate size."""
    if tp > 1 and inter % 32:
        raise ValueError(
            f"with a scale per block of {BLOCK} x {BLOCK}, tp must leave each rank a multiple of "
            f"32 of the intermediate size, got tp {tp}, which leaves {inter}"
        )
    return block_rows(inter)


def _share_scales(weight: Tensor, scale: Tensor) -> Tensor:
    """Gives each block of 128 x 128 of e4m3 weights [N, K] the largest of its scales.

    scale [ceil(N / 128), K]. Changes the weights accordingly, returns [ceil(N / 128), ceil(K /
    128)].
    """
    n, k = weight.shape
    shared = functional.pad(scale, (0, -k % BLOCK)).unflatten(1, (-1, BLOCK)).amax(2)
    factor = scale / shared.repeat_interleave(BLOCK, 1)[:, :k]  # at most 1
    weight.copy_(weight.float() * factor.repeat_interleave(BLOCK, 0)[:n])
    return shared


def _blocks(part: slice, size: int) -> Tensor:
    """For each `size` values of a part of a dimension the block that they lie in."""
    if part.start % size:
        raise ValueError(
            f"gate and up in one tensor must meet at the border of a block of {size}, "
            f"up begins at {part.start}"
        )
    return torch.arange(part.start, part.stop, size) // BLOCK
