"""Shapes of layers from files: a model's config.json, or a list of shapes."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from cutlass_moe.models.shapes import MODELS, MoeShape

_OPTIONAL = {"bias", "activation", "scoring", "num_groups"}
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
# Model types whose experts, or whose routers' scoring, no field of config.json need describe.
_GPT_OSS = ("gpt_oss",)
_SIGMOID = ("deepseek_v3", "glm4_moe", "llama4_text")


def find_shape(name: str) -> MoeShape:
    """The shape of a model that MODELS names, or of a path that `read_config` takes.

    Raises ValueError where there is neither.
    """
    if name in MODELS:
        return MODELS[name]
    if not Path(name).exists():
        raise ValueError(
            f"{name!r} is no config.json, no directory that holds one, "
            f"and none of {', '.join(MODELS)}"
        )
    return read_config(Path(name))


def read_config(path: Path) -> MoeShape:
    """The layer that a Hugging Face config.json, or the one in a directory, describes.

    Reads the fields of Mixtral, Qwen-MoE, DeepSeek, GLM-4.5, gpt-oss, Llama-4 and Kimi-K2, and of
    models that name them alike, in `text_config` where there is one. The name is the directory's,
    or that of a file not called config.json. Raises ValueError where a field is missing.
    """
    file = path / "config.json" if path.is_dir() else path
    plain = _parse(file)
    model = plain.get("text_config", plain) if isinstance(plain, dict) else plain
    if not isinstance(model, dict):
        raise ValueError(f"{file}: expected a JSON object, got {model!r}")
    # Where experts are "local", intermediate_size is theirs; elsewhere it is the dense layers'.
    local = ("intermediate_size",) if "num_local_experts" in model else ()
    names = {
        "num_experts": _EXPERTS,
        "top_k": ("num_experts_per_tok",),
        "hidden": ("hidden_size",),
        "inter": ("moe_intermediate_size", *local),
    }
    missing = [" or ".join(n) for n in names.values() if _first(model, n) is None]
    if missing:
        raise ValueError(f"{file}: not a mixture of experts, it lacks {', '.join(missing)}")
    absolute = file.absolute()
    default_scoring = "sigmoid" if model.get("model_type") in _SIGMOID else "softmax"
    return MoeShape(
        name=absolute.parent.name if file.name == "config.json" else file.stem,
        bias=model.get("model_type") in _GPT_OSS,
        activation="swiglu_oai" if model.get("model_type") in _GPT_OSS else "swiglu",
        scoring=model.get("scoring_func") or default_scoring,
        num_groups=model.get("n_group") or 1,
        **{field: _first(model, n) for field, n in names.items()},
    )


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


def _parse(path: Path) -> Any:
    try:
        text = path.read_text()
        if path.suffix != ".toml":
            return json.loads(text)
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib  # the CLI's: serving needs none
        return tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _first(plain: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the first of these names that has one."""
    return next((plain[name] for name in names if plain.get(name) is not None), None)
