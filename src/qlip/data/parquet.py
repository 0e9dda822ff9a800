"""Image–text samples in Parquet files of the `datasets` convention.

A row has `image` {bytes, path} and words (see `qlip.data.samples`); a row without bytes is read from its path,
beside the Parquet file. Rows are read when they are asked for: the row group that holds one is decoded, and kept
as long as there is room, in each process for itself.
"""

import bisect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qlip.data.samples import COLUMNS, BadSample, Joined, Samples, captions_of, describe, described, encoded_image
from qlip.data.values import printable, repeated
from qlip.data.walk import visible
from qlip.errors import InputError, one_line

HELD_BYTES = 1 << 30  # of decoded row groups, in a process
CAPTIONS_AT_ONCE = 1000


class ParquetSamples(Joined):
    """The rows of one or several Parquet files, in order."""

    def __init__(self, paths: Sequence[str | Path]):
        """Open the files.

        Raises:
            InputError: no file, or none that can be read and has an `image` {bytes} column.
        """
        joined = Joined.of_files(ParquetFile, find_parquet(paths))
        super().__init__(joined.parts, joined.unreadable)


class ParquetFile(Samples):
    """The rows of one Parquet file.

    Attributes:
        num_bytes: of its rows, decoded.
    """

    def __init__(self, file: Path):
        """Read the footer.

        Raises:
            InputError: the file is no Parquet, or has no `image` {bytes} column.
        """
        with readable(file):
            metadata = pq.read_metadata(file)
            schema = metadata.schema.to_arrow_schema()
            stat = file.stat()
        if twice := repeated(name for name in schema.names if name in ("image", *COLUMNS)):
            raise InputError(f"{file}: has the column {twice!r} twice: rename or delete one")
        image = schema.field("image").type if "image" in schema.names else None
        if image is None or not pa.types.is_struct(image) or image.get_field_index("bytes") < 0:
            raise InputError(f"{file}: no column `image` with a field `bytes`; its columns are {schema.names}")
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self._file, self._version = file, (stat.st_size, stat.st_mtime_ns)
        self._columns = [name for name in schema.names if name in ("image", *COLUMNS)]
        self._ends = np.cumsum([group.num_rows for group in groups]).tolist()
        self.num_bytes = sum(group.total_byte_size for group in groups)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, index: int) -> dict[str, Any]:
        """Row `index`."""
        group = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[group - 1] if group else 0)
        key = printable(f"{self._file.name}:{index}")
        try:
            table = _held.get((self._file, self._version, group), lambda: self._read_group(group))
        except InputError as error:
            raise BadSample(key, error) from error
        record = _record(table, row, key)
        image = encoded_image(record["image"], key, self._file.parent)
        return {"image": image, "key": key} | describe(record, key)

    def captions(self) -> Iterator[str]:
        """The captions of the rows that have one."""
        columns = [name for name in ("caption", "captions", "text") if name in self._columns]
        if not columns:
            return
        with readable(self._file), pq.ParquetFile(self._file) as parquet:
            for batch in parquet.iter_batches(CAPTIONS_AT_ONCE, columns=columns):
                yield from captions_of(described(_good_records(batch)))

    def _read_group(self, group: int) -> pa.Table:
        with readable(self._file), pq.ParquetFile(self._file, memory_map=True) as parquet:
            return parquet.read_row_group(group, columns=self._columns, use_threads=False)


class _Held:
    """What was decoded last, up to a number of bytes."""

    def __init__(self, num_bytes: int):
        self._room = num_bytes
        self._tables: OrderedDict[tuple, pa.Table] = OrderedDict()

    def get(self, key: tuple, read: Callable[[], pa.Table]) -> pa.Table:
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        table = read()
        self._room -= table.nbytes
        while self._tables and self._room < 0:
            self._room += self._tables.popitem(last=False)[1].nbytes
        self._tables[key] = table
        return table


_held = _Held(HELD_BYTES)  # one for all files: memory is the process's, not a file's


def find_parquet(paths: Sequence[str | Path]) -> list[Path]:
    """Files, and the `*.parquet` of folders, sorted within each.

    Raises:
        InputError: nothing was found.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = visible(path, "*.parquet") if path.is_dir() else [path]
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


def _record(rows: pa.Table | pa.RecordBatch, row: int, key: str) -> dict[str, Any]:
    """A row as Python has it.

    Raises:
        BadSample: a value has no such form, as strings that are not UTF-8.
    """
    record = {}
    for name, column in zip(rows.schema.names, rows.columns, strict=True):
        try:
            record[name] = column[row].as_py()
        except (ValueError, OverflowError, pa.ArrowException) as error:
            raise BadSample(key, f"its {name} cannot be read ({one_line(error)})") from error
    return record


def _good_records(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    for row in range(len(batch)):
        with suppress(BadSample):  # `read` tells of it
            yield _record(batch, row, "")
