"""Frozen dataclasses as plain JSON values, and back."""

from __future__ import annotations

import functools
import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from emitters.spec.dtypes import Name

_T = TypeVar("_T")


def to_plain(value: Any) -> dict[str, Any]:
    """A dataclass's fields; enums, which are strings, and numbers stay as they are."""
    return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}


def _plain(value: Any) -> Any:
    return to_plain(value) if is_dataclass(value) else value


def from_plain(cls: type[_T], plain: dict[str, Any], what: str) -> _T:
    """Inverse of `to_plain`: names become the enums, and dicts the dataclasses, that fields hold.

    what: how errors call the class. Raises ValueError on an unknown or missing field and on an
    unknown name.
    """
    types = _types(typing.cast(typing.Hashable, cls))
    try:
        return cls(**{name: _value(types[name], v, what) for name, v in plain.items()})
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a {what}: {error}") from error


def _value(kind: Any, value: Any, what: str) -> Any:
    if value is not None and is_dataclass(kind):
        return from_plain(typing.cast(type, kind), value, what)
    if value is not None and isinstance(kind, type) and issubclass(kind, Name):
        return kind(value)
    return value


@functools.cache
def _types(cls: typing.Hashable) -> dict[str, Any]:
    """A field's type, without the None that it may also be."""
    return {name: _without_none(hint) for name, hint in typing.get_type_hints(cls).items()}


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        others = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        return others[0] if len(others) == 1 else hint
    return hint
