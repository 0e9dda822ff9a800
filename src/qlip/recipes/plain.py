"""Recipes as plain JSON values and back, by the types of their fields."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from qlip.guarded import typed


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and paths → dicts, lists and strings; infinity, which JSON does not have, → "inf"."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


def from_plain(kind: Any, value: Any) -> Any:
    """The inverse of `to_plain` for a type; fields that are absent keep their defaults.

    Raises:
        InputError: a field that the type does not have, or a value of another type.
    """
    return typed(kind, value, infinity=True)
