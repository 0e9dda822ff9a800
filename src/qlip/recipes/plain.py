"""Recipes as plain JSON values and back, by the types of their fields."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from qlip.errors import InputError


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and paths → dicts, lists and strings."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_plain(kind: Any, value: Any) -> Any:
    """The inverse of `to_plain` for a type; fields that are absent keep their defaults.

    Raises:
        InputError: a field that the type does not have.
    """
    if dataclasses.is_dataclass(kind):
        kind = typing.cast(type, kind)
        if not isinstance(value, dict):
            raise InputError(f"{kind.__name__} is {value!r}, not an object with its fields")
        hints = typing.get_type_hints(kind)
        if unknown := value.keys() - hints.keys():
            raise InputError(f"{kind.__name__} has no field {min(unknown)!r}")
        return kind(**{name: from_plain(hints[name], item) for name, item in value.items()})
    if typing.get_origin(kind) is tuple:
        item_kind = typing.get_args(kind)[0]
        if not isinstance(value, list | tuple):
            raise InputError(f"{value!r} is not a list")
        return tuple(from_plain(item_kind, item) for item in value)
    if typing.get_origin(kind) is typing.Literal:
        if value not in typing.get_args(kind):
            raise InputError(f"{value!r} is not one of {', '.join(map(repr, typing.get_args(kind)))}")
        return value
    if isinstance(kind, types.UnionType):
        return None if value is None else from_plain(typing.get_args(kind)[0], value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{value!r} is not {kind.__name__}")
    return value
