"""Conversion of frozen dataclasses to plain JSON values, and back."""

from __future__ import annotations

import functools
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from emitters.spec.dtypes import Name

_T = TypeVar("_T")


def to_plain(value: Any) -> dict[str, Any]:
    """The fields of a dataclass as a dict; enums (which are strings) and numbers stay as is."""
    return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}


def _plain(value: Any) -> Any:
    return to_plain(value) if is_dataclass(value) else value


def from_plain(cls: type[_T], plain: dict[str, Any], what: str) -> _T:
    """The inverse of `to_plain`; strings become enums, and dicts dataclasses, as fields say.

    what: the name of the class in errors. Raises ValueError for an unknown or missing field and
    for an unknown enum value.
    """
    types = _types(typing.cast(typing.Hashable, cls))
    try:
        return cls(**{name: _value(types[name], v, what) for name, v in plain.items()})
    except (KeyError, TypeError) as error:
        names = ", ".join(f.name for f in fields(typing.cast(Any, cls)))
        raise ValueError(
            f"a {what} must have the fields {names}, got {', '.join(plain)} ({error})"
        ) from error


def _value(kind: Any, value: Any, what: str) -> Any:
    if value is not None and is_dataclass(kind):
        return from_plain(typing.cast(type, kind), value, what)
    if value is not None and isinstance(kind, type) and issubclass(kind, Name):
        return kind(value)
    if isinstance(kind, types.UnionType):  # of enums
        arms: tuple[type[Name], ...] = typing.get_args(kind)
        return next((arm for arm in arms if value in list(arm)), arms[0])(value)
    return value


@functools.cache
def _types(cls: typing.Hashable) -> dict[str, Any]:
    """The types of a dataclass's fields, by name, without the None that a field may also be."""
    return {name: _without_none(hint) for name, hint in typing.get_type_hints(cls).items()}


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        others = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        return others[0] if len(others) == 1 else hint
    return hint
