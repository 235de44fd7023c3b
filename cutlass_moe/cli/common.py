"""What the shell's commands share: the console, options, and words for problems and configs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.console import Console

from cutlass_moe.models.files import Model, find_model, read_shapes
from cutlass_moe.models.problems import model_problems
from cutlass_moe.models.shapes import DEFAULT_DTYPE, DTYPES, MODELS, MoeShape, padded_size
from cutlass_moe.operands import PACKINGS
from emitters.spec.image import LaunchRecord
from emitters.spec.registry import Problem, config_from_json, problem_from_json

console = Console(width=None if sys.stdout.isatty() else 120)

models_option = click.option(
    "--model",
    "models",
    metavar="MODEL",
    multiple=True,
    help=f"Repeatable: {', '.join(MODELS)}, a Hugging Face config.json or a directory with one.",
)
dtype_choice = click.Choice(list(DTYPES))
DTYPE_DEFAULT = f"[default: what a file's quantization_config asks for, else {DEFAULT_DTYPE}]"
dtypes_option = click.option(
    "--dtype", "dtypes", type=dtype_choice, multiple=True, help=f"Repeatable {DTYPE_DEFAULT}."
)

training_option = click.option(
    "--training", is_flag=True, help="Also what training launches, of bf16 weights."
)

IMAGE_COLUMNS = ("problem", "config", "registers", "spills", "smem")


class Layer(NamedTuple):
    """A model's layer, or what one rank holds of it; model: what the user calls the whole; dtype:
    that of its weights where no other is given; words: which layers of the model it is."""

    model: str
    shape: MoeShape
    dtype: str = DEFAULT_DTYPE
    words: str = ""


class Posed(NamedTuple):
    """One of the problems that a layer poses, by the name that `model_problems` has for it."""

    layer: Layer
    dtype: str
    name: str
    problem: Problem

    def __str__(self) -> str:
        return f"{self.layer.shape.name} {self.dtype} {self.name}"


def shard_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--tp and --ep of a command."""
    tp = click.option("--tp", type=click.IntRange(1), help="Ranks that share each expert's inter.")
    ep = click.option("--ep", type=click.IntRange(1), help="Ranks that share the experts.")
    return tp(ep(command))


def find_layers(
    models: Iterable[str],
    tp: int | None = None,
    ep: int | None = None,
    files: Iterable[Path] = (),
) -> list[Layer]:
    """The layers of models and of files of shapes, as one of tp x ep ranks holds them.

    What a model does and the kernels do not is told on stderr. Raises click.UsageError.
    """
    try:
        found = [(model, find_model(model)) for model in models]
        found += [(one.name, Model(one)) for file in files for one in read_shapes(file)]
        layers = [
            Layer(name, model.shape.shard(tp or 1, ep or 1), model.dtype, model.words)
            for name, model in found
        ]
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    for name, model in found:
        for note in model.notes:
            click.echo(f"warning: {name}: {note}", err=True)
    return layers


def posed(
    layers: Sequence[Layer], dtypes: Sequence[str] = (), training: bool = False
) -> list[Posed]:
    """dtypes: of all layers, or empty: of each its own. training: what training launches too.

    Raises click.UsageError for training with another dtype than bf16.
    """
    found = []
    for layer in layers:
        for dtype in dtypes or (layer.dtype,):
            if training and dtype != "bf16":
                raise click.UsageError(f"--training needs --dtype bf16, got {dtype}")
            problems = model_problems(layer.shape, dtype, training)
            found += [Posed(layer, dtype, name, problem) for name, problem in problems.items()]
    return found


def padding(shape: MoeShape, dtype: str) -> str:
    """What must be padded for a layer's kernels, in words; "" if nothing must be."""
    sizes = {name: getattr(shape, name) for name in ("inter", "hidden")}
    wide = {name: padded_size(size, dtype) for name, size in sizes.items()}
    said = [f"{name} {sizes[name]} is padded with zeros to {wide[name]}" for name in wide]
    said = [words for words, name in zip(said, wide, strict=True) if wide[name] != sizes[name]]
    if not said:
        return ""
    how = "cutlass_moe.pad_experts does it, once at load"
    if dtype in PACKINGS:
        how = "do it before cutlass_moe.pack_weights"
    return f"{shape.name}: {' and '.join(said)} for {dtype} weights; {how}"


def image_cells(record: LaunchRecord) -> list[str]:
    """What IMAGE_COLUMNS say of an image; of one that is not of this version, why it is not."""
    try:
        words = problem_from_json(record.problem).words, config_from_json(record.config).words
    except ValueError as error:
        words = f"{record.symbol}: {error}", ""
    return [*words, *map(str, (record.registers, record.spill_bytes, record.smem_bytes))]
