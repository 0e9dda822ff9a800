"""Lists of pictures: CSV, TSV and JSONL files with a picture's path and its words in each row.

Paths are relative to the file. The column with them is the first that there is of `PATHS`; for the words see
`qlip.data.samples`.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from qlip.data.samples import COLUMNS, BadSample, Samples, captions_of, describe, read_picture
from qlip.errors import InputError, one_line

PATHS = ("image", "path", "file", "file_name", "filename", "filepath", "image_path")


class CsvSamples(Samples):
    """The rows of a CSV file, or of a TSV file by its suffix; its text is held in memory."""

    def __init__(self, file: Path):
        """Read the file.

        Raises:
            InputError: it cannot be read, or has no column of paths.
        """
        strings = {name: pa.string() for name in (*PATHS, "caption", "captions", "text")}
        delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
        try:
            table = pa.csv.read_csv(
                file,
                parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                convert_options=pa.csv.ConvertOptions(column_types=strings),
            )
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file}: not a readable table ({one_line(error)}): mend it") from error
        if not set(PATHS) & set(table.column_names):
            raise InputError(
                f"{file}: no column of paths; its columns are {table.column_names}: name one of them {PATHS[0]!r}"
            )
        self._file = file
        self._table = table.select([name for name in table.column_names if name in {*PATHS, *COLUMNS}])

    def __len__(self) -> int:
        return len(self._table)

    def read(self, index: int) -> dict[str, Any]:
        """Row `index`."""
        return _sample(self._table.slice(index, 1).to_pylist()[0], self._file, f"{self._file.name}:{index}")

    def captions(self) -> Iterator[str]:
        """Those of all rows."""
        for batch in self._table.to_batches(1000):
            yield from captions_of(map(describe, batch.to_pylist()))


class JsonlSamples(Samples):
    """The lines of a JSONL file, an object each; held in memory is where they begin."""

    def __init__(self, file: Path):
        """Find the lines.

        Raises:
            InputError: the file cannot be read, or is empty.
        """
        starts, place = [], 0
        try:
            with file.open("rb") as lines:
                for line in lines:
                    if line.strip():
                        starts.append(place)
                    place += len(line)
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({one_line(error)})") from error
        self._file, self._starts = file, np.array(starts, np.int64)
        if not starts:
            raise InputError(f"{file}: has no lines")

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, index: int) -> dict[str, Any]:
        """Line `index`, blank ones not counted."""
        key = f"{self._file.name}:{index}"
        try:
            with self._file.open("rb") as file:
                file.seek(self._starts[index])
                record = json.loads(file.readline())
        except (OSError, ValueError) as error:
            raise BadSample(key, f"not a line of JSON ({one_line(error)})") from error
        if not isinstance(record, dict):
            raise BadSample(key, "not a JSON object")
        return _sample(record, self._file, key)

    def captions(self) -> Iterator[str]:
        """Those of all lines that are good."""
        with self._file.open("rb") as lines:
            for line in lines:
                try:
                    yield from captions_of([describe(json.loads(line))])
                except (ValueError, AttributeError):  # `read` tells of it
                    continue


def _sample(record: Mapping[str, Any], file: Path, key: str) -> dict[str, Any]:
    path = next((record[name] for name in PATHS if record.get(name)), None)
    if not isinstance(path, str):
        raise BadSample(key, f"no path of a picture: put it under {PATHS[0]!r}")
    return {"image": read_picture(file.parent / path, key), "key": key} | describe(record)
