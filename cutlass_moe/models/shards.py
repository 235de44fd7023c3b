"""The safetensors files of a checkpoint: which tensor is in which, and parts of tensors."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
}
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7
    _DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
_SHOWN = 3  # names in a message


def has_weights(path: Path) -> bool:
    """Whether a directory holds files that `Shards` reads."""
    return (path / SINGLE).exists() or (path / INDEX).exists()


def some(names: Collection[str]) -> str:
    """A few of the names in words, and how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


class Shards:
    """The tensors in a directory's model.safetensors or in the shards that its index names.

    The index is read once; a shard is mapped into memory when the first tensor in it is asked for,
    and what is read of it are the pages of the parts that are asked for. All errors are ValueError.

    files: the file of each tensor, by the tensor's name.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._opened: dict[str, Any] = {}
        index, single = directory / INDEX, directory / SINGLE
        if index.exists():
            self.files = _read_index(index)
        elif single.exists():
            self.files = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise ValueError(f"{directory} must hold {SINGLE} or {INDEX}, it holds neither")

    def close(self) -> None:
        """Unmaps all shards. A later read maps its shard again."""
        self._opened.clear()

    def header(self, name: str) -> tuple[tuple[int, ...], torch.dtype | str]:
        """The shape and the dtype of a tensor; a dtype that no experts have by its name."""
        part = self._slice(name)
        dtype = part.get_dtype()
        return tuple(part.get_shape()), _DTYPES.get(dtype, dtype)

    def read(self, name: str, *index: int | slice) -> Tensor:
        """tensor[index], a view of the mapped file."""
        return self._slice(name)[index]

    def _slice(self, name: str) -> Any:
        file = self.files.get(name)
        if file is None:
            raise ValueError(f"{self.directory} has no tensor {name}")
        try:
            return self._open(file).get_slice(name)
        except _safetensors().SafetensorError as error:
            raise ValueError(f"{self.directory / file} must have the tensor {name}: {error}") from (
                error
            )

    def _open(self, file: str) -> Any:
        if file not in self._opened:
            path = self.directory / file
            if not path.exists():
                raise ValueError(f"{path} is missing, {INDEX} names it")
            try:
                self._opened[file] = _safetensors().safe_open(str(path), "pt", device="cpu")
            except (OSError, _safetensors().SafetensorError) as error:
                raise ValueError(f"{path} must be a safetensors file: {error}") from error
        return self._opened[file]


def _safetensors() -> Any:
    try:
        import safetensors  # an extra: only what reads checkpoints needs it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading a checkpoint needs the package safetensors: "
            "pip install 'cutlass-moe[checkpoints]'",
            name="safetensors",
        ) from error
    return safetensors


def _read_index(path: Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_text("utf-8"))["weight_map"]
        plain = all(Path(file).name == file for file in set(files.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must be a JSON object whose weight_map names each tensor's file, got {error!r}"
        ) from error
    if not plain:
        raise ValueError(f"{path} must name files of its own directory, got {some(files.values())}")
    return dict(files)
