"""Shapes of layers from files: a model's config.json, or a list of shapes."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from cutlass_moe.models import moe_layers
from cutlass_moe.models.families import ACTIVATIONS, OTHER, Family, find_family
from cutlass_moe.models.fields import Fields
from cutlass_moe.models.quantization import read_quantization
from cutlass_moe.models.shapes import (
    CLAMPED,
    CLAMPED_NUMBERS,
    DEFAULT_DTYPE,
    FUNCTIONS,
    MODELS,
    MoeShape,
    Routed,
)
from emitters.spec.layer_steps import SCORINGS

_OPTIONAL = {"bias", "activation", "gated", "scoring", "num_groups"}
_INSIDE = ("text_config", "llm_config", "language_config")


class Model(NamedTuple):
    """What is known of a model's layer.

    dtype: "fp8", "fp8_block", "int8" or "bf16", as its quantization_config asks, else "fp8". notes:
    sentences about what the model does and the kernels do not. words: which layers it is, and what
    is beside. family: the entry by which its file was read. why_not: what its quantization_config
    asks for and no kernel has.
    """

    shape: MoeShape
    dtype: str = DEFAULT_DTYPE
    notes: tuple[str, ...] = ()
    words: str = ""
    family: Family = OTHER
    why_not: str | None = None


def find_model(name: str) -> Model:
    """The model that MODELS names, or of a path that `read_model` takes.

    Raises ValueError where there is neither.
    """
    if name in MODELS:
        return Model(MODELS[name])
    if not Path(name).exists():
        raise ValueError(
            f"{name!r} is no config.json, no directory that holds one, "
            f"and none of {', '.join(MODELS)}"
        )
    return read_model(Path(name))


def find_shape(name: str) -> MoeShape:
    """As `find_model`, of the shape alone; its notes are warnings."""
    model = find_model(name)
    warn_of(model)
    return model.shape


def read_config(path: Path) -> MoeShape:
    """As `read_model`, of the shape alone; its notes are warnings."""
    model = read_model(path)
    warn_of(model)
    return model.shape


def warn_of(model: Model) -> None:
    """Its notes, as RuntimeWarnings of the caller's caller."""
    for note in model.notes:
        warnings.warn(f"{model.shape.name}: {note}", RuntimeWarning, stacklevel=3)


def read_model(path: Path) -> Model:
    """The layer that a Hugging Face config.json, or the one in a directory, describes.

    Which fields are read is said by the entry of `cutlass_moe.models.families` for the file's
    architectures or model_type, or those of its text_config; a model that has no entry is read by
    names that models have in common, with a note. The name is the directory's, or that of a file
    not called config.json. Raises ValueError where a field is missing, or has a value that is not
    understood; what is known not to be supported, and fields that speak of experts and are unknown,
    are notes.
    """
    file = path / "config.json" if path.is_dir() else path
    plain = _parse(file)
    inside = plain
    if isinstance(plain, dict):
        inside = next((plain[name] for name in _INSIDE if name in plain), plain)
    if not isinstance(inside, dict):
        raise ValueError(f"{file}: expected a JSON object, got {inside!r}")
    absolute = file.absolute()
    name = absolute.parent.name if file.name == "config.json" else file.stem
    try:
        return _Reader(name, inside, plain).model()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_shapes(path: Path) -> list[MoeShape]:
    """The shapes in a .toml or .json file: tables `[[shapes]]` or a list of objects, whose keys are
    the fields of MoeShape but all_ranks, those after inter optional. Raises ValueError for other
    files."""
    plain = _parse(path)
    listed = plain.get("shapes") if isinstance(plain, dict) else plain
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{path}: expected a list of shapes, in TOML as tables [[shapes]]")
    known = {field.name for field in fields(MoeShape)} - {"all_ranks"}
    needed = known - _OPTIONAL
    shapes = []
    for i, shape in enumerate(listed, 1):
        if not isinstance(shape, dict) or not needed <= shape.keys() <= known:
            raise ValueError(
                f"{path}: expected shape {i} to have {', '.join(sorted(needed))} and, "
                f"where wanted, {', '.join(sorted(_OPTIONAL))}, got {shape!r}"
            )
        shapes.append(MoeShape(**shape))
    return shapes


class _Reader:
    """One config.json, or the part of it that describes the language model, by its family."""

    def __init__(self, name: str, inside: dict[str, Any], whole: dict[str, Any]) -> None:
        self.name, self.inside, self.whole = name, inside, whole
        types = [*_types(inside), *_types(whole)]
        found = find_family(types)
        self.family: Family = found or OTHER
        self.fields = Fields(inside)
        self.notes: list[str] = []
        self.why_not: str | None = None
        if found is None:
            self.notes.append(
                f"model type {types[-1] if types else None!r} is in no table: its layer is read by "
                "names that models have in common, with SwiGLU experts and a softmax router where "
                "no field says otherwise"
            )

    def model(self) -> Model:
        family, read = self.family, self.fields
        sizes = {"experts": family.experts, "top_k": family.top_k}
        sizes |= {"hidden": family.hidden, "inter": family.inter}
        missing = [" or ".join(names) for names in sizes.values() if read.first(names) is None]
        if missing:
            raise ValueError(f"not a mixture of experts, it lacks {', '.join(missing)}")
        self._check_needs()
        experts, top_k = read.first(family.experts), read.first(family.top_k)
        layers = family.layers(read)
        all_ranks = None
        identity = read.number(family.identity)
        if identity:
            all_ranks = Routed(experts + identity, top_k)
            top_k = max(1, top_k * experts // (experts + identity))
        gated, activation = self._activation(layers)
        shape = MoeShape(
            name=self.name,
            num_experts=experts,
            top_k=top_k,
            hidden=read.first(family.hidden),
            inter=read.first(family.inter),
            bias=family.bias,
            activation=activation,
            scoring=self._scoring(),
            num_groups=read.number(family.groups, 1) or 1,
            all_ranks=all_ranks,
            gated=gated,
        )
        words = self._words(layers)
        dtype = self._dtype()
        self._note_fields()
        return Model(shape, dtype, tuple(self.notes), words, family, self.why_not)

    def _check_needs(self) -> None:
        for name, allowed in self.family.needs.items():
            value = self.fields.get(name)
            if value not in allowed:
                shown = " or ".join("absent" if one is None else repr(one) for one in allowed)
                raise ValueError(f"{name} must be {shown}, got {value!r}")

    def _activation(self, layers: list[int] | None) -> tuple[bool, str | None]:
        """Whether the experts' is gated, and its name, or None where no kernel has it."""
        family, read = self.family, self.fields
        act = read.first(family.act) or family.default_act
        if family.activation is None and act not in ACTIVATIONS:
            raise ValueError(
                f"{' or '.join(family.act)} must be one of {', '.join(ACTIVATIONS)}, got {act!r}"
            )
        name = family.activation or ACTIVATIONS[act][0 if family.gated else 1]
        limit = read.first(family.limit)
        if self._limited_after(layers):
            return family.gated, None
        if limit is not None:
            name = CLAMPED
            alpha, beta = family.alpha_beta
            if (limit, alpha, beta) != CLAMPED_NUMBERS:
                self.notes.append(
                    f"its experts' activation is {name} with numbers of its own: call it with "
                    f"limit={limit:g}, alpha={alpha:g}, beta={beta:g}"
                )
        if name in FUNCTIONS:
            return family.gated, name
        self.notes.append(
            f"its experts' activation is {name} ({act}{', gated' if family.gated else ''}), "
            "which no kernel has: the products are built without it, fused_moe is not"
        )
        return family.gated, None

    def _limited_after(self, layers: list[int] | None) -> bool:
        """Whether a limit that no kernel has is that of all layers; notes those of some."""
        for name in self.family.limit_after:
            value = self.fields.get(name)
            if not isinstance(value, list):
                continue
            chosen = range(len(value)) if layers is None else layers
            some = [i for i in chosen if i < len(value) and value[i]]
            if not some:
                continue
            where = "all layers" if len(some) == len(chosen) else moe_layers.words(some, None)
            self.notes.append(
                f"in {where} silu(gate) and up are limited ({name} {value[some[0]]}), which no "
                "kernel has: take grouped_matmul there, not fused_moe"
            )
            return len(some) == len(chosen)
        return False

    def _scoring(self) -> str | None:
        """The router's, or None where `topk_router` has it not."""
        family = self.family
        given = {name: self.fields.get(name) for name in family.scoring}
        named = {family.scores.get(one, one) for one in given.values() if one is not None}
        if len(named) > 1:
            raise ValueError(f"{' and '.join(given)} must agree, got {given}")
        scoring = named.pop() if named else family.default_scoring
        if scoring in SCORINGS:
            return str(scoring)
        self.notes.append(
            f"its router is {scoring}, topk_router has {', '.join(SCORINGS)}: weights and ids "
            "are the caller's"
        )
        return None

    def _dtype(self) -> str:
        asked = next(
            (
                one
                for name in ("quantization_config", "compression_config")
                for one in (self.inside.get(name), self.whole.get(name))
                if one is not None
            ),
            None,
        )
        expert_dtype = self.inside.get("expert_dtype")
        if expert_dtype is not None:
            inner = asked if isinstance(asked, dict) else {}
            asked = {**inner, "expert_dtype": expert_dtype}
        found = read_quantization(asked)
        if found is None:
            return DEFAULT_DTYPE
        self.why_not = found.why_not
        if found.dtype is None:
            self.notes.append(
                f"its quantization_config asks for {found.why_not}, which no kernel takes: the "
                f"weights must be quantised again with a scale a channel, to {DEFAULT_DTYPE} where "
                "no dtype is given"
            )
        return found.dtype or DEFAULT_DTYPE

    def _words(self, layers: list[int] | None) -> str:
        read, family = self.fields, self.family
        parts = []
        if layers is not None:
            parts.append(f"experts in {moe_layers.words(layers, read.layers())}")
        count = read.number(family.shared) if family.shared else 1
        width = count * read.number(family.shared_inter)
        if width:
            parts.append(f"beside them one MLP of inter {width} for every token")
        return ", ".join(parts)

    def _note_fields(self) -> None:
        for key, words in self.family.notes.items():
            name, _, wanted = key.partition("=")
            value = self.fields.get(name)
            if value and wanted in ("", str(value)):
                self.notes.append(words.format(value))
        self.notes += self.family.always
        for name, value in self.fields.unread(self.family.names):
            self.notes.append(f"{name} {value!r} is not understood: it changes nothing here")


def _types(plain: dict[str, Any]) -> list[str]:
    architectures = plain.get("architectures")
    names = [*(architectures if isinstance(architectures, list) else ()), plain.get("model_type")]
    return [name for name in names if isinstance(name, str)]


def _parse(path: Path) -> Any:
    try:
        text = path.read_text("utf-8-sig")  # some editors put a mark before the first byte
        if path.suffix != ".toml":
            return json.loads(text)
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib  # the CLI's: serving needs none
        return tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
