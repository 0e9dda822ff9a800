"""Listings of images: CSV, TSV and JSONL files with an image's path and its words in each row.

Paths are relative to the file; those that a pipe gives (`/dev/stdin`), to the current folder. The column with them
is the first that there is of `PATHS`; for the words see `qlip.data.samples`. A row that cannot be used costs that
row. Rows that name what other programs leave beside images (`qlip.data.walk`) do not count.
"""

import codecs
import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.csv

from qlip.data.samples import COLUMNS, BadSample, Fault, Samples, captions_of, describe, described, read_picture
from qlip.data.values import decode, printable, refuse_utf16, repeated
from qlip.data.walk import is_in_left
from qlip.errors import InputError, one_line
from qlip.guarded import parse_json

PATHS = ("image", "path", "file", "file_name", "filename", "filepath", "image_path")


_MAYBE_LEFT = re.compile(rb"""["/\\](?:\.(?![./])|~\$|\#|__|@|(?i:thumbs|ehthumbs|desktop|icon))|~""")
_ANY = "latin-1"  # as which all bytes can be read
_BLOCK_BYTES = 1 << 24  # the longest row of a CSV file


class CsvSamples(Samples):
    """The rows of a CSV file, or of a TSV file by its suffix; its text is held in memory."""

    def __init__(self, file: Path, piped: bytes | None = None):
        """Read the file; rows of another length than the header are `unreadable`.

        Args:
            file: the file, or the pipe.
            piped: what the pipe gave.

        Raises:
            InputError: it cannot be read, is UTF-16, has no column of paths, or has a column twice.
        """
        try:
            contents = file.read_bytes() if piped is None else piped
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({one_line(error)})") from error
        _check_encoding(file, contents)
        is_tsv = file.suffix.lower() == ".tsv" or (piped is not None and b"\t" in piped.partition(b"\n")[0])
        self._file, self._folder = file, file.parent if piped is None else Path()
        self.unreadable: tuple[Fault, ...] = ()
        try:
            table = self._parsed(contents.removeprefix(codecs.BOM_UTF8), "\t" if is_tsv else ",")
            names = [name.encode(_ANY).decode("utf-8", "backslashreplace") for name in table.column_names]
        except pa.ArrowException as error:
            raise InputError(f"{file}: not a readable table ({one_line(error)}): correct it") from error
        if not set(PATHS) & set(names):
            raise InputError(f"{file}: no column of paths; its columns are {names}: name one of them {PATHS[0]!r}")
        wanted = [name for name in names if name in {*PATHS, *COLUMNS}]
        if twice := repeated(wanted):
            raise InputError(f"{file}: has the column {twice!r} twice: rename or delete one")
        self._table = table.select(wanted)
        paths = self._table.select([name for name in wanted if name in PATHS])
        good = [not is_in_left(_path_of(row) or "") for row in _rows(paths)]
        if not all(good):
            self._table = self._table.filter(pa.array(good))

    def __len__(self) -> int:
        return len(self._table)

    def read(self, index: int) -> dict[str, Any]:
        """Row `index`."""
        key = printable(f"{self._file.name}:{index}")
        return _sample(next(_rows(self._table.slice(index, 1))), self._folder, key)

    def captions(self) -> Iterator[str]:
        """Those of all rows that are good."""
        words = self._table.select([name for name in self._table.column_names if name not in PATHS])
        yield from captions_of(described(_rows(words)))

    def _parsed(self, contents: bytes, delimiter: str) -> pa.Table:
        """All columns of use as bytes: so what a cell holds concerns no other."""

        def skip(row: Any) -> str:
            reason = f"has {row.actual_columns} cells, the header {row.expected_columns}: is a quote missing?"
            self.unreadable += (Fault(f"{self._file.name}, row {row.number}", reason),)
            return "skip"

        return pa.csv.read_csv(
            io.BytesIO(contents),
            # threads lose the numbers of rows; of bytes that are no text a row with a wrong length ends all
            pa.csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES, encoding=_ANY),
            pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip),
            pa.csv.ConvertOptions(check_utf8=False, column_types=dict.fromkeys((*PATHS, *COLUMNS), pa.binary())),
        )


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Cells as the bytes that the file has."""
    for batch in table.to_batches(1000):
        for row in batch.to_pylist():
            yield {name: cell and cell.decode().encode(_ANY) for name, cell in row.items()}


class JsonlSamples(Samples):
    """The lines of a JSONL file, an object each; held in memory is where they begin (of a pipe, all)."""

    def __init__(self, file: Path, piped: bytes | None = None):
        """Find the lines.

        Args:
            file: the file, or the pipe.
            piped: what the pipe gave.

        Raises:
            InputError: the file cannot be read, is UTF-16, or is empty.
        """
        self._file, self._folder, self._piped = file, file.parent if piped is None else Path(), piped
        starts, place = [], 0
        try:
            with self._open() as lines:
                for line in lines:
                    if not place:
                        _check_encoding(file, line)
                    if line.strip(b" \t\r\n\xef\xbb\xbf") and not _is_left(line):
                        starts.append(place)
                    place += len(line)
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({one_line(error)})") from error
        self._starts = np.array(starts, np.int64)
        if not starts:
            raise InputError(f"{file}: has no lines")

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, index: int) -> dict[str, Any]:
        """Line `index`, blank ones not counted."""
        key = printable(f"{self._file.name}:{index}")
        try:
            with self._open() as file:
                file.seek(self._starts[index])
                record = parse_json(decode(file.readline()))
        except (OSError, ValueError) as error:
            raise BadSample(key, f"not a line of JSON ({one_line(error)})") from error
        if not isinstance(record, dict):
            raise BadSample(key, "not a JSON object")
        return _sample(record, self._folder, key)

    def captions(self) -> Iterator[str]:
        """Those of all lines that are good."""
        yield from captions_of(described(self._records()))

    def _records(self) -> Iterator[dict[str, Any]]:
        with self._open() as lines:
            for line in lines:
                with suppress(InputError):  # `read` tells of it
                    record = parse_json(decode(line))
                    if isinstance(record, dict):
                        yield record

    def _open(self) -> BinaryIO:
        return self._file.open("rb") if self._piped is None else io.BytesIO(self._piped)


def _check_encoding(file: Path, contents: bytes) -> None:
    try:
        refuse_utf16(contents)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _is_left(line: bytes) -> bool:
    """Whether a line of JSON names what other programs leave; most need not be parsed for that."""
    if _MAYBE_LEFT.search(line):
        with suppress(InputError):
            record = parse_json(decode(line))
            return isinstance(record, dict) and is_in_left(_path_of(record) or "")
    return False


def _path_of(record: Mapping[str, Any]) -> str | None:
    path = next((record[name] for name in PATHS if record.get(name)), None)
    if isinstance(path, bytes):  # names of files need not be UTF-8
        return os.fsdecode(path)
    return path if isinstance(path, str) else None


def _sample(record: Mapping[str, Any], folder: Path, key: str) -> dict[str, Any]:
    path = _path_of(record)
    if not path:
        raise BadSample(key, f"no path of a picture: put it under {PATHS[0]!r}")
    return {"image": read_picture(folder / path, key), "key": key} | describe(record, key)
