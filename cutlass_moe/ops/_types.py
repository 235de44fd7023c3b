"""Checks of the Python types of public arguments, read from the functions' own annotations.

Two doors use one check. `typed` checks every call: it is for functions that no warm call passes.
Functions that must cost nothing when warm ask `check_types` where a call has failed, as it does on
what should be a tensor and is none; and, about all else, where a signature is new: what a kernel
was once chosen for has the right types.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")

_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {  # by annotation: in words, and the types
    "Tensor": ("a tensor", (Tensor,)),
    "Tensors": ("a tensor or a list of tensors", (Tensor, Sequence)),
    "bool": ("a bool", (bool, torch.SymBool)),
    "int": ("an int", (Integral, torch.SymInt)),
    "float": ("a number", (Real, torch.SymInt, torch.SymFloat)),
    "str": ("a string", (str,)),
    "torch.dtype": ("a torch.dtype", (torch.dtype,)),
    "torch.device": ("a torch.device", (torch.device,)),
    "torch.cuda.Stream": ("a torch.cuda.Stream", (torch.cuda.Stream,)),
    "nn.Module": ("a torch module", (nn.Module,)),
    "None": ("None", (type(None),)),
}
_NOT = {"Tensors": (str, bytes)}  # of the types above


def check_types(owner: Any, arguments: Mapping[str, Any]) -> None:
    """Raises TypeError for the first argument whose type is not that of its annotation.

    owner: a function, or a NamedTuple or TypedDict that has its arguments as fields. arguments: by
    name; others than the owner's are ignored, so `locals()` of a function will do.
    """
    for name, annotation, value in _annotated(owner, arguments):
        kinds = annotation.split(" | ")
        if not all(kind in _KINDS for kind in kinds):
            continue  # checked by the function itself
        if not any(
            isinstance(value, _KINDS[kind][1]) and not isinstance(value, _NOT.get(kind, ()))
            for kind in kinds
        ):
            words = " or ".join(_KINDS[kind][0] for kind in kinds)
            raise TypeError(f"{name} must be {words}, got {in_words(value)}") from None


def typed(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator that checks the types of every call that torch.compile does not trace."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            try:
                arguments = signature.bind(*args, **kwargs).arguments
            except TypeError:
                return function(*args, **kwargs)  # Python's own words for what is missing
            check_types(function, arguments)
        return function(*args, **kwargs)

    return checked


def expect_tensors(arguments: Mapping[str, Any], optional: bool = False) -> None:
    """Raises TypeError for the first of these that is not a tensor. optional: nor None."""
    for name, value in arguments.items():
        if not (isinstance(value, Tensor) or (optional and value is None)):
            words = "a tensor or None" if optional else "a tensor"
            raise TypeError(f"{name} must be {words}, got {in_words(value)}") from None


def in_words(value: object) -> str:
    """A value of a wrong type, as errors name it: "'many'", "1.5", "a list"."""
    if value is None or isinstance(value, str | bool | int | float):
        return repr(value)
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _annotated(owner: Any, arguments: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yields (name, annotation, value) of the arguments that are there.

    Those that a function takes as **arguments: Unpack[X] follow as fields of X.
    """
    for name, annotation in _annotations(owner).items():
        if name not in arguments:
            continue
        value = arguments[name]
        if annotation.startswith("Unpack["):
            fields = owner.__globals__[annotation[len("Unpack[") : -1]]
            yield from _annotated(fields, value)
        else:
            yield name, annotation, value


@functools.cache
def _annotations(owner: Any) -> dict[str, str]:
    found = {}
    for name, annotation in owner.__annotations__.items():
        text = getattr(annotation, "__forward_arg__", annotation)  # of a NamedTuple or TypedDict
        if isinstance(text, str):
            required = text.startswith("Required[")
            found[name] = text[len("Required[") : -1] if required else text
    return found
