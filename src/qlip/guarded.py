"""Files that somebody else wrote, read with limits: JSON, values of a stated type, headers of safetensors files.

Whatever the bytes are, a function here returns a value of the stated type or raises an InputError that names the
field. It allocates no more than the file is long, times a small factor.
"""

import dataclasses
import math
import os
import reprlib
import stat
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from json import loads
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from qlip.errors import InputError

T = TypeVar("T")

MAX_DEPTH = 64
"""Lists and objects of a JSON value that may lie within each other."""

MAX_JSON_BYTES = 100 << 20
"""Of a JSON file or of a safetensors header; the library safetensors has the same limit."""

MAX_INTEGER = 2**63 - 1

MAX_SIZE = 1 << 24
"""Of any width, length or number of things in a model's configuration."""

_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. A byte order mark is skipped.

    Raises:
        InputError: it is not JSON, not UTF-8, or nested deeper than `MAX_DEPTH`.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = loads(text.removeprefix("\ufeff"))
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # not UTF-8, or an integer of thousands of digits, too
        raise InputError(f"it is not valid JSON ({error})") from error
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    return value


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file.

    Args:
        path: a regular file.
        max_bytes: the most that is read.

    Raises:
        OSError: it is not there or cannot be read.
        InputError: it is not a regular file, too large, or `parse_json` refuses it; does not name the file.
    """
    with open(path, "rb", opener=_open_regular) as file:
        contents = file.read(max_bytes + 1)
    if len(contents) > max_bytes:
        raise InputError(f"it has more than {max_bytes:,} bytes")
    return parse_json(contents)


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON file that must hold an object; see `read_json`."""
    return typed(dict[str, Any], read_json(path), "the file")


class _Rules(NamedTuple):
    """What `typed` lets pass."""

    unknown_fields: bool
    infinity: bool


def typed(
    kind: type[T],
    value: Any,
    name: str = "",
    unknown: Literal["refuse", "ignore"] = "refuse",
    infinity: bool = False,
) -> T:
    """Bring a JSON value to a type.

    Args:
        kind: a dataclass, whose absent fields keep their defaults; int (below 2^63 in size), float (finite), bool,
            str (valid Unicode), None, Path, Any; tuples, lists, sequences, dicts, Literal and unions of these.
        value: of `parse_json`.
        name: of the value, for messages.
        unknown: what happens with fields that a dataclass does not have.
        infinity: whether a float may be infinite: "inf" or "-inf", as JSON has no number for it.

    Raises:
        InputError: the value has another type; names the field.
    """
    return _typed(kind, value, name, _Rules(unknown == "ignore", infinity))


def _typed(kind: Any, value: Any, name: str, rules: _Rules) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, name, rules)
    if origin in (typing.Union, types.UnionType):
        return _one_of(arguments, value, name, rules)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            raise _wrong(name, value, f"one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (tuple, list, Sequence):
        return _items(origin, arguments, value, name, rules)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise _wrong(name, value, "an object")
        return {
            _typed(str, key, f"a key of {name}", rules): _typed(arguments[1], item, _dotted(name, key), rules)
            for key, item in value.items()
        }
    if kind is float and rules.infinity and value in ("inf", "-inf"):
        return float(value)
    return _plain(kind, value, name)


def _dataclass(kind: Any, value: Any, name: str, rules: _Rules) -> Any:
    if not isinstance(value, dict):
        raise _wrong(name or kind.__name__, value, "an object with its fields")
    hints, fields = typing.get_type_hints(kind), {field.name: field for field in dataclasses.fields(kind)}
    known = {field: item for field, item in value.items() if field in fields}
    if not rules.unknown_fields and len(known) < len(value):
        raise InputError(f"{kind.__name__} has no field {min(value.keys() - known.keys())!r:.60}")
    for field in fields.values():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in known:
            raise InputError(f"it has no {_dotted(name, field.name)!r}")
    return kind(**{key: _typed(hints[key], item, _dotted(name, key), rules) for key, item in known.items()})


def _one_of(kinds: Sequence[Any], value: Any, name: str, rules: _Rules) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    kinds = [kind for kind in kinds if kind is not types.NoneType]
    for kind in kinds[:-1]:
        try:
            return _typed(kind, value, name, rules)
        except InputError:
            continue
    return _typed(kinds[-1], value, name, rules)


def _items(origin: Any, kinds: Sequence[Any], value: Any, name: str, rules: _Rules) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong(name, value, "a list")
    if origin is tuple and kinds[-1] is not Ellipsis:
        if len(value) != len(kinds):
            raise _wrong(name, value, f"a list of {len(kinds)}")
    else:
        kinds = [kinds[0]] * len(value)
    items = (
        _typed(kind, item, f"{name}[{i}]", rules) for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )
    return list(items) if origin is list else tuple(items)


def _plain(kind: Any, value: Any, name: str) -> Any:
    if kind is float and type(value) in (int, float):
        if abs(value) <= MAX_INTEGER or (type(value) is float and math.isfinite(value)):
            return float(value)
        raise _wrong(name, value, "a finite number")
    if kind is int and (type(value) is not int or abs(value) > MAX_INTEGER):
        raise _wrong(name, value, "an integer" if type(value) is not int else "an integer of 64 bits")
    if kind in (str, Path):
        if not isinstance(value, str):
            raise _wrong(name, value, "a string")
        if not _is_unicode(value) or "\0" in value:
            raise _wrong(name, value, "valid Unicode")
        return kind(value)
    if type(value) is not kind:
        named = {bool: "true or false", float: "a number", types.NoneType: "null"}
        raise _wrong(name, value, named.get(kind, f"of type {kind.__name__}"))
    return value


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor in the header of a safetensors file.

    Attributes:
        dtype: as the format spells it, such as "BF16".
        shape: its sides.
    """

    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        tensors: by name.
        metadata: strings by name.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


@dataclasses.dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read the header of a safetensors file, without its tensors.

    Raises:
        OSError: the file cannot be read.
        InputError: it is not a whole safetensors file. The message does not name the file.
    """
    with open(path, "rb", opener=_open_regular) as file:
        available, length = os.fstat(file.fileno()).st_size - 8, int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(available, MAX_JSON_BYTES):
            raise InputError(f"its header is said to have {length:,} bytes, after it come {max(available, 0):,}")
        values = typed(dict[str, Any], parse_json(file.read(length)), "its header")
    metadata = typed(dict[str, str], values.pop("__metadata__", None) or {}, "__metadata__")
    entries = {name: typed(_Entry, value, name) for name, value in values.items()}
    _check_extents(entries, available - length)
    return Header({name: TensorInfo(entry.dtype, entry.shape) for name, entry in entries.items()}, metadata)


def _check_extents(entries: Mapping[str, _Entry], available: int) -> None:
    for name, entry in entries.items():
        start, stop = entry.data_offsets
        size = _BYTES.get(entry.dtype, 1)
        if min(entry.shape, default=0) < 0 or not 0 <= start <= stop <= available:
            raise InputError(
                f"{name!r:.80} has bytes {start:,} to {stop:,} of {available:,}: the file is not whole"
            )
        if entry.dtype in _BYTES and math.prod(entry.shape) * size != stop - start:
            raise InputError(f"{name!r:.80} of shape {list(entry.shape)} has {stop - start:,} bytes")


def weight_files(index: Path) -> list[str]:
    """The names of the files in an index of weights in shards, sorted.

    Raises:
        OSError: the index cannot be read.
        InputError: it is no such index, or a name leads out of its folder.
    """
    names = sorted(set(typed(dict[str, str], read_object(index).get("weight_map"), "weight_map").values()))
    for name in names:
        inside(index.parent, name)
    return names


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Whether a model of these widths and numbers can be described at all.

    Raises:
        InputError: a size is not in [1, `MAX_SIZE`]; names it.
    """
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} is {size}: it must be at least 1")
        if size > MAX_SIZE:
            raise InputError(f"{name} is {size:,}: it must be at most {MAX_SIZE:,}")


def check_layers(num_layers: int, header: Header) -> None:
    """Whether weights can be those of so many layers, before these are made.

    Raises:
        InputError: there are fewer tensors than layers.
    """
    if num_layers > len(header.tensors):
        raise InputError(f"the config has {num_layers:,} layers, the weights {len(header.tensors):,} tensors")


def inside(folder: Path, name: str) -> Path:
    """The file of a name that another file gives; it must lie in the folder.

    Raises:
        InputError: the name is absolute, or leads out of the folder.
    """
    if (
        not _is_unicode(name)
        or "\0" in name
        or Path(name).is_absolute()
        or ".." in Path(name).parts
        or not Path(name).name
    ):
        raise InputError(f"it names the file {name!r:.100}, which is not in {str(folder)!r}")
    return folder / name


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError("it is not a regular file")
    return descriptor


def _is_unicode(text: str) -> bool:
    """Whether a string can be written as UTF-8: it has no lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_depth(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [item for parent in level for item in _children(parent)]
        if not level:
            return
    raise _too_deep()


def _children(value: Any) -> Iterable[Any]:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (item for item in items if isinstance(item, dict | list))


def _too_deep() -> InputError:
    return InputError(f"its JSON is nested deeper than {MAX_DEPTH} levels")


def _dotted(name: str, field: str) -> str:
    return f"{name}.{field}" if name else field


def _wrong(name: str, value: Any, wanted: str) -> InputError:
    return InputError(f"{name:.100} is {reprlib.repr(value)}, not {wanted}")
