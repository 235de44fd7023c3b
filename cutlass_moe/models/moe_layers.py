"""Which layers of a model have experts: one rule for each way in which config.json says so.

A rule takes the fields and returns the layers' indexes, or None where the file doesn't tell how
many layers there are.
"""

from __future__ import annotations

from collections.abc import Callable

from cutlass_moe.models.fields import Fields

Rule = Callable[[Fields], "list[int] | None"]


def every(fields: Fields) -> list[int] | None:
    count = fields.layers()
    return None if count is None else list(range(count))


def after_dense(*names: str) -> Rule:
    """All but the first, as many as a field says; of those every moe_layer_freq-th, or those
    with a 1 in that list, or those that mlp_layer_types calls sparse."""

    def rule(fields: Fields) -> list[int] | None:
        count, frequency = fields.layers(), fields.get("moe_layer_freq")
        kinds = fields.get("mlp_layer_types")
        first = fields.number(names)
        if isinstance(kinds, list):
            return [i for i, kind in enumerate(kinds) if kind in ("sparse", "moe")]
        if isinstance(frequency, list):
            return [i for i, one in enumerate(frequency) if one]
        if count is None:
            return None
        return [i for i in range(first, count) if i % (frequency or 1) == 0]

    return rule


def enumerated(name: str) -> Rule:
    """Those that a field lists: numbers, or a text of numbers and commas."""

    def rule(fields: Fields) -> list[int] | None:
        listed = fields.get(name)
        if listed is None:
            return every(fields)
        parts = listed.split(",") if isinstance(listed, str) else listed
        return [int(part) for part in parts]

    return rule


def periodic(period: str, offset: str) -> Rule:
    """Those whose index leaves `offset` when it is divided by `period`."""

    def rule(fields: Fields) -> list[int] | None:
        count, step = fields.layers(), fields.number((period,), 1)
        start = fields.number((offset,))
        return None if count is None else [i for i in range(count) if i % step == start]

    return rule


def ernie(fields: Fields) -> list[int] | None:
    count, step = fields.layers(), fields.number(("moe_layer_interval",), 1)
    start = fields.number(("moe_layer_start_index.0", "moe_layer_start_index"))
    end = fields.number(("moe_layer_end_index.0", "moe_layer_end_index"), -1)
    if count is None:
        return None
    last = count - 1 if end == -1 else end
    return [i for i in range(start, min(last + 1, count)) if (i + 1) % step == 0]


def qwen(fields: Fields) -> list[int] | None:
    count, step = fields.layers(), fields.number(("decoder_sparse_step",), 1)
    dense = fields.get("mlp_only_layers") or []
    if count is None:
        return None
    return [i for i in range(count) if i not in dense and (i + 1) % step == 0]


def llama4(fields: Fields) -> list[int] | None:
    count, step = fields.layers(), fields.number(("interleave_moe_layer_step",), 1)
    listed = fields.get("moe_layers")
    if listed is not None or count is None:
        return listed
    return [i for i in range(count) if (i + 1) % step == 0]


def nemotron(fields: Fields) -> list[int] | None:
    pattern = fields.get("hybrid_override_pattern")  # a letter a layer, E: experts
    kinds = fields.get("layers_block_type") or pattern or ""
    return [i for i, kind in enumerate(kinds) if kind in ("E", "moe")]


def words(layers: list[int], count: int | None) -> str:
    """For people: "layers 3 to 60 of 61"."""
    if not layers:
        return "no layer"
    first, last = layers[0], layers[-1]
    steps = {b - a for a, b in zip(layers, layers[1:], strict=False)}
    if len(layers) == count:
        return f"all {count} layers"
    if len(steps) > 1:
        shown = f"{len(layers)} layers from {first} to {last}"
    elif steps and steps != {1}:
        shown = f"layers {first}, {layers[1]}, ... {last}"
    else:
        shown = f"layers {first} to {last}"
    return f"{shown} of {count}" if count else shown
