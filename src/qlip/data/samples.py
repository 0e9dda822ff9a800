"""What a source gives: samples, by number.

A sample is a dict with `image` (encoded bytes), `key` (a name that finds it again), words where there are some
(`label`, an index into class names; `caption`, a string; `captions`, several of which training draws one each
time, the first being the plainest; `concept`, a name that samples share if their captions mean the same), and
`licence`, `author`, `source`, `url` where they are known.
"""

import bisect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from qlip.data.values import about_of, label_of, lines, printable, text_of, texts_of
from qlip.errors import InputError
from qlip.image_files import allows_outside, is_inside, read_file

T = TypeVar("T")

ABOUT = ("licence", "license", "author", "source", "url")
COLUMNS = ("label", "caption", "captions", "concept", "text", *ABOUT)


class BadSample(InputError):
    """A sample that cannot be used: its key and the reason."""

    def __init__(self, key: str, reason: object):
        super().__init__(printable(key), printable(" ".join(str(reason).split())))
        self.key, self.reason = self.args

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


@dataclass(frozen=True)
class Fault:
    """What could not be used: a sample, or a whole file.

    Attributes:
        key: of the sample, or the file's name.
        reason: why not.
        index: number of the sample in its source, where it has one.
        is_file: whether it is a file.
    """

    key: str
    reason: str
    index: int | None = None
    is_file: bool = False

    def __post_init__(self) -> None:
        for name in ("key", "reason"):  # lists of faults are written as UTF-8
            object.__setattr__(self, name, printable(getattr(self, name)))


class Samples(Sequence):
    """Samples of one source. Pickles, so that worker processes of any start method can open it for themselves.

    Attributes:
        class_names: what the labels mean, where the source says so.
        unreadable: of the source's files, those that could not be opened.
        num_files: with those.
    """

    class_names: tuple[str, ...] = ()
    unreadable: tuple[Fault, ...] = ()
    num_files: int = 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.read(index)

    def read(self, index: int) -> dict[str, Any]:
        """Sample `index`.

        Raises:
            BadSample: it cannot be read.
        """
        raise NotImplementedError

    def captions(self) -> Iterator[str]:
        """All captions, without touching the pictures."""
        raise NotImplementedError


class Joined(Samples):
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[Samples], unreadable: Sequence[Fault] = ()):
        """Join them.

        Args:
            parts: at least one.
            unreadable: files that should have been parts, too.

        Raises:
            InputError: they number different classes.
        """
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts]).tolist()
        self.unreadable = (*unreadable, *(fault for part in parts for fault in part.unreadable))
        self.num_files = sum(fault.is_file for fault in unreadable) + sum(part.num_files for part in parts)
        names = {part.class_names for part in parts if part.class_names}
        if len(names) > 1:
            first, second = sorted(names)[:2]
            raise InputError(
                f"two sources number their classes differently ({_some(first)}; {_some(second)}): "
                "give their pictures captions, or the same classes"
            )
        self.class_names = names.pop() if names else ()

    @classmethod
    def of_files(cls, kind: Callable[[Path], Samples], files: Sequence[Path]) -> "Joined":
        """Open each file; those that cannot be are `unreadable`.

        Raises:
            InputError: none can be opened; about the last.
        """
        parts: list[Samples] = []
        unreadable: list[Fault] = []
        for file in files:
            try:
                parts.append(kind(file))
            except InputError as error:
                if file == files[-1] and not parts:
                    raise
                unreadable.append(Fault(str(file), str(error).removeprefix(f"{file}: "), is_file=True))
        return cls(parts, unreadable)

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> dict[str, Any]:
        """Sample `index` of all."""
        part = bisect.bisect_right(self._ends, index)
        return self.parts[part].read(index - (self._ends[part - 1] if part else 0))

    def captions(self) -> Iterator[str]:
        """Those of each source."""
        for part in self.parts:
            yield from part.captions()


def readable(samples: Samples, indices: Iterable[int]) -> Iterator[dict[str, Any] | Fault]:
    """Some of the samples, and in the place of each that cannot be read the reason."""
    for index in indices:
        try:
            yield samples[index]
        except BadSample as error:
            yield Fault(error.key, error.reason, index)


def evenly(total: int, count: int) -> list[int]:
    """At most `count` of the numbers below `total`, evenly spread."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def describe(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Of a record's columns those of a sample: its words, and whose it is; see `qlip.data.values`.

    `text` is another name for `caption`; a list under `caption` is `captions`, and so are the lines of a string
    under `captions`.

    Args:
        record: values by column.
        key: of the sample.

    Raises:
        BadSample: a value is not what its column should have.
    """
    found: dict[str, Any] = {}
    for name in ("label", "concept", *ABOUT):
        value = _read(label_of if name == "label" else about_of, record, name, key)
        if value is not None:
            found[name] = value
    caption, captions = (_read(read, record, name, key) for name, read in _CAPTIONS.items())
    if not caption and not captions:
        caption = _read(texts_of, record, "text", key)
    if len(caption) > 1:
        caption, captions = [], captions or caption
    if caption:
        found["caption"] = caption[0]
    if captions:
        found["captions"] = captions
    return found


def described(records: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The words of some records, without those that are bad: whoever reads the sample is told."""
    for record in records:
        with suppress(BadSample):
            yield describe(record, "")


def lines_of(text: str, key: str) -> dict[str, Any]:
    """The words of a `.txt` file: a line is the caption, several are captions.

    Raises:
        BadSample: they are no text.
    """
    return describe({"caption": lines(text)}, key)


def captions_of(samples: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Every caption of some samples."""
    for sample in samples:
        yield from [sample["caption"]] if "caption" in sample else sample.get("captions", [])


def read_picture(path: Path, key: str) -> bytes:
    """A picture's file, a regular one.

    Raises:
        BadSample: it cannot be read.
    """
    try:
        return read_file(path)
    except ValueError as error:
        raise BadSample(key, f"its picture {str(path)!r} cannot be read ({error})") from error


def encoded_image(image: Any, key: str, folder: Path, *others: Path) -> bytes:
    """The bytes of an image as `datasets` writes it: a dict of `bytes`, else the contents of its `path`.

    Args:
        image: of a row.
        key: of the sample.
        folder: what `path` is relative to. It has to lie there unless `allows_outside`.
        others: folders in which it may lie, too.

    Raises:
        BadSample: it has neither, or not of the right types; or the file cannot be read.
    """
    image = {} if image is None else image
    content = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(content, bytes):
        return content
    if content is not None:
        raise BadSample(
            key, f"its `bytes` are {type(content).__name__}: write them as binary, as an image file has them"
        )
    path = image.get("path")
    if not path:
        raise BadSample(key, "`image` has neither `bytes` nor `path`: leave the row out")
    if not isinstance(path, str | bytes):
        raise BadSample(key, f"its `path` is {type(path).__name__}: write it as text")
    file = folder / os.fsdecode(path)
    if not (allows_outside() or any(is_inside(file, place) for place in (folder, *others))):
        raise BadSample(
            key, f"its picture {str(file)!r} lies outside of {str(folder)!r}: pass --allow-outside if you trust it"
        )
    return read_picture(file, key)


def _several(value: Any) -> list[str]:
    """Captions: a list, or the lines of a text."""
    return texts_of(value) if isinstance(value, list | tuple) else lines(text_of(value) or "")


_CAPTIONS: dict[str, Callable[[Any], list[str]]] = {"caption": texts_of, "captions": _several}


def _read(read: Callable[[Any], T], record: Mapping[str, Any], name: str, key: str) -> T:
    try:
        return read(record.get(name))
    except InputError as error:
        raise BadSample(key, f"its {name} {error}") from error


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + ", …" * (len(names) > 3)
