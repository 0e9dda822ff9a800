"""Image–text samples in Parquet files of the `datasets` convention.

A row has `image` {bytes, path} and `label` (an index into class names) or `caption` (a string). Rows are
read where they lie (memory-mapped) and only decoded when asked for.
"""

import bisect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qlip.errors import InputError


class ParquetSamples(Sequence):
    """The rows of one or several Parquet files, in order.

    `samples[i]` is a dict with `image` (encoded bytes), `key`, and `label` or `caption` where there is one.
    """

    def __init__(self, paths: Sequence[str | Path]):
        """Open the files.

        Raises:
            InputError: no file, an unreadable one, or one without an `image` {bytes} column.
        """
        files = find_parquet(paths)
        self._tables = [_open(file) for file in files]
        self._names = [file.name for file in files]
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
        sample = {"image": record["image"]["bytes"], "key": f"{self._names[file]}:{row}"}
        return sample | {k: record[k] for k in ("label", "caption") if record.get(k) is not None}

    @property
    def has_labels(self) -> bool:
        """Whether rows carry `label`."""
        return "label" in self._tables[0].column_names


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


def _open(file: Path) -> pa.Table:
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file}: not a readable Parquet file ({error})") from error
    image = schema.field("image").type if "image" in schema.names else None
    if image is None or not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
        raise InputError(f"{file}: no column `image` with a field `bytes`; its columns are {schema.names}")
    columns = [name for name in ("image", "label", "caption") if name in schema.names]
    return pq.read_table(file, columns=columns, memory_map=True)


@dataclass(frozen=True)
class Captioner:
    """Words for a sample: its own caption, or its label's names put into templates.

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
        label = sample.get("label")
        if label is None or not 0 <= label < len(self.names):
            raise InputError(
                f"{sample['key']}: label {label} has no name: give a class-name file with {len(self.names)}+ names"
                if label is not None
                else f"{sample['key']}: neither `caption` nor `label`"
            )
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
