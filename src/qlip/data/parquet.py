"""Image–text samples in Parquet files of the `datasets` convention.

A row has `image` {bytes, path} and `label` (an index into class names), `caption` (a string) or `captions` (a list
of strings, of which training draws one each time; the first is the plainest). The encoded pictures of all rows are held in memory; a row without bytes is read from its path, beside the Parquet file,
when it is asked for.
"""

import bisect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qlip.errors import InputError


WORDS = ("label", "caption", "captions")


class ParquetSamples(Sequence):
    """The rows of one or several Parquet files, in order.

    `samples[i]` is a dict with `image` (encoded bytes), `key`, and `label`, `caption` or `captions` where there
    is one.
    """

    def __init__(self, paths: Sequence[str | Path]):
        """Open the files.

        Raises:
            InputError: no file, an unreadable one, or one without an `image` {bytes} column.
        """
        files = find_parquet(paths)
        self._tables = [_open(file) for file in files]
        self._files = files
        self._ends = np.cumsum([len(table) for table in self._tables]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[file - 1] if file else 0)
        record = self._tables[file].slice(row, 1).to_pylist()[0]
        key = f"{self._files[file].name}:{row}"
        sample = {"image": _encoded(record["image"] or {}, key, self._files[file].parent), "key": key}
        words = {name: record.get(name) for name in WORDS}
        return sample | {name: value for name, value in words.items() if value not in (None, [])}

    @property
    def has_labels(self) -> bool:
        """Whether rows carry `label`."""
        return "label" in self._tables[0].column_names

    def captions(self) -> Iterator[str]:
        """The captions of the rows that have one, in order, without touching their pictures."""
        for table in self._tables:
            names = [name for name in ("caption", "captions") if name in table.column_names]
            for chunk in (chunk for name in names for chunk in table[name].chunks):
                for said in chunk.to_pylist():
                    yield from [said] if isinstance(said, str) else said or []


def find_parquet(paths: Sequence[str | Path]) -> list[Path]:
    """Files, and the `*.parquet` of folders, sorted within each.

    Raises:
        InputError: nothing was found.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not found or not found[0].exists():
            raise InputError(f"{path}: no Parquet file there")
        files += found
    if not files:
        raise InputError("no data: name at least one Parquet file or a folder of them")
    return files


@contextmanager
def readable(file: str | Path) -> Iterator[None]:
    """Name the file that Arrow complains of.

    Raises:
        InputError: the block raised what damaged files raise.
    """
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: not a readable Parquet file ({reason}): replace it") from error


def _open(file: Path) -> pa.Table:
    with readable(file):
        schema = pq.read_schema(file)
    image = schema.field("image").type if "image" in schema.names else None
    if image is None or not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        raise InputError(f"{file}: no column `image` with a field `bytes`; its columns are {schema.names}")
    columns = [name for name in ("image", *WORDS) if name in schema.names]
    with readable(file):
        return pq.read_table(file, columns=columns, memory_map=True)


def _encoded(image: dict[str, Any], key: str, folder: Path) -> bytes:
    """An image's bytes, else the contents of its path."""
    if (encoded := image.get("bytes")) is not None:
        return encoded
    if not image.get("path"):
        raise InputError(f"{key}: `image` has neither `bytes` nor `path`: leave the row out")
    try:
        return (folder / image["path"]).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{key}: its picture {image['path']!r} cannot be read ({reason}): put it beside the Parquet file"
        ) from error


@dataclass(frozen=True)
class Captioner:
    """Words for a sample: its own caption, one of its captions, or its label's names put into templates.

    Attributes:
        names: for each label its names, the first the usual one; empty if samples have captions.
        templates: sentences with `{}` where the name goes.
    """

    names: Sequence[Sequence[str]] = ()
    templates: Sequence[str] = ("a photo of a {}.",)

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> str:
        """The sample's caption; a labelled one draws its name (half the time the usual one) and its template.

        Raises:
            InputError: the sample has neither caption nor a label with a name.
        """
        if "caption" in sample:
            return sample["caption"]
        if captions := sample.get("captions"):
            return captions[int(rng.integers(len(captions)))]
        label = sample.get("label")
        if label is None:
            raise InputError(f"{sample['key']}: neither `caption` nor `label`: leave the row out")
        if not 0 <= label < len(self.names):
            remedy = f"give a class-name file of at least {label + 1} names" if label >= 0 else "leave the row out"
            raise InputError(f"{sample['key']}: label {label} has no name: {remedy}")
        names = self.names[label]
        name = names[0] if rng.random() < 0.5 else names[int(rng.integers(len(names)))]
        return self.templates[int(rng.integers(len(self.templates)))].replace("{}", name)


def read_class_names(path: str | Path) -> list[list[str]]:
    """Read class names: a JSON list with a name, a list of names or {"names": [...]} for each label.

    Raises:
        InputError: the file is missing or of another form.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable JSON file of class names ({error})") from error
    entries = entries if isinstance(entries, list) else [None]
    names = [e["names"] if isinstance(e, dict) and "names" in e else e for e in entries]
    names = [[n] if isinstance(n, str) else n for n in names]
    if not all(isinstance(n, list) and n and all(isinstance(s, str) for s in n) for n in names):
        raise InputError(f'{path}: expected a list with a name, a list of names or {{"names": [...]}} a label')
    return names
