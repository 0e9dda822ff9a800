"""Token files as a language model wants them: sub-tokens by number, or batches of them in a drawn order.

Parquet is decoded a row group at a time, and 512 groups are kept in each process. That is as fast as memory while
they are all: half a million rows. Of more rows in random order each would need a group decoded, a thousand rows
for one; so with `cache` the files are written once as Arrow IPC, mapped into memory, and read where they are.
"""

import hashlib
import logging
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset

from qlip.bits import tokens_to_sub_tokens
from qlip.data.delivery import FromWorkers
from qlip.data.loader import order
from qlip.data.parquet import readable
from qlip.data.samples import BadSample
from qlip.data.token_file import KEPT, ROW_GROUP, TokenFiles, TokenFormat, ids_of
from qlip.data.values import label_of, text_of, texts_of
from qlip.data.workers import outlive_signals
from qlip.errors import InputError, one_line

Source = str | os.PathLike[str]
HELD_GROUPS = 512
_CACHE_VERSION = "1"

logger = logging.getLogger("qlip")


class TokenDataset(Dataset):
    """The rows of token files. Pickles, for worker processes.

    Attributes:
        format: whose ids they are, and of which grid.
        bits: the width of a sub-token.
        columns: what rows have besides: "key", and some of "caption", "captions", "label"; None where a file lacks
            one.
    """

    def __init__(self, paths: Source | Sequence[Source], bits: int, cache: Source | None = None):
        """Open the files; with a cache write what it lacks.

        Args:
            paths: one or several token files, or folders of them, all of one tokenizer and grid.
            bits: the width of a sub-token; divides that of a token.
            cache: a folder for files to be mapped into memory, about as large as the token files.

        Raises:
            InputError: a file is no token file, they do not belong together, `bits` does not divide a token, or
                the cache cannot be written.
        """
        source = TokenFiles.open([paths] if isinstance(paths, (str, os.PathLike)) else paths)
        self.format: TokenFormat = source.format
        self.bits = bits
        tokens_to_sub_tokens(torch.empty(0, 1, dtype=torch.int64), self.format.bits, bits)  # is there such a width
        footers = [_footer(file) for file in source.files]
        names = [footer.schema.to_arrow_schema().names for footer in footers]
        self.columns = ("key", *(name for name in KEPT if any(name in some for some in names)))
        self._groups: list[tuple[Path, str, int]] = []
        rows: list[int] = []
        for file, footer in zip(source.files, footers, strict=True):
            read_from = _cached(file, Path(cache)) if cache else file
            self._groups += [(read_from, _stamp(read_from), i) for i in range(footer.num_row_groups)]
            rows += [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
        self._ends = list(accumulate(rows))
        if cache is None and len(rows) > HELD_GROUPS and len(self) > HELD_GROUPS * ROW_GROUP:
            logger.warning("%s rows of Parquet in random order are slow: give a cache=FOLDER", f"{len(self):,}")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`.

        Returns:
            `sub_tokens` (N, L/bits) int64 in [0, 2^bits), and a value for each of `columns`.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return {name: values[0] for name, values in self.__getitems__([index % len(self)]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """Some rows as a batch.

        Returns:
            `sub_tokens` (B, N, L/bits) int64, and a list of B values for each of `columns`.

        Raises:
            InputError: a file is damaged.
        """
        tokens = np.empty((len(indices), self.format.num_tokens), np.int64)
        columns: dict[str, list[Any]] = {name: [] for name in self.columns}
        for place, index in enumerate(indices):
            which = bisect_right(self._ends, index)
            group = _read_group(*self._groups[which], self.format)
            row = index - (self._ends[which - 1] if which else 0)
            tokens[place] = group.tokens[row]
            for name, values in columns.items():
                values.append(_value(group.columns[name][row]) if name in group.columns else None)
        sub_tokens = tokens_to_sub_tokens(torch.from_numpy(tokens), self.format.bits, self.bits)
        return {"sub_tokens": sub_tokens, **columns}

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """Endless batches, or this rank's share of them: equal parts, in the order of ranks.

        Epoch e visits the rows in the permutation that (seed, e) draws, an incomplete last batch is dropped. So a
        batch depends on the seed and its number alone, and a run goes on exactly where it ended.

        Args:
            batch_size: B, of all ranks together.
            seed: of the order.
            start_step: number of the first batch.
            rank: of this process.
            world_size: number of processes, which divides B.
            num_workers: processes that read; 0: this one.

        Yields:
            what `__getitems__` gives, of B/world_size rows.

        Raises:
            InputError: there are fewer rows than a batch has, or `world_size` does not divide it.
        """
        if batch_size < 1 or batch_size % world_size:
            raise InputError(f"batch_size={batch_size} cannot be shared by {world_size} processes: use a multiple")
        share = batch_size // world_size
        mine = slice(rank * share, (rank + 1) * share)
        sampler = ([i for _, i in batch[mine]] for batch in order(len(self), batch_size, seed, start_step))
        yield from FromWorkers(self.__getitems__, num_workers, sampler, worker_init_fn=outlive_signals)


@dataclass(frozen=True)
class _Group:
    tokens: np.ndarray
    columns: dict[str, pa.Array]


def words_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The words of a row: its `caption`, `captions` and `label`, of which those that are nothing are left out.

    Null, NaN and blank captions are nothing; a single one under `captions` is a list of one.

    Raises:
        BadSample: a caption is no valid text, or a label is no number of a class.
    """
    found: dict[str, Any] = {}
    for name, read in (("caption", text_of), ("captions", texts_of), ("label", label_of)):
        try:
            value = read(row.get(name))
        except InputError as error:
            raise BadSample(row["key"], f"its {name} {error}") from error
        if value is not None and value != []:
            found[name] = value
    return found


def _value(scalar: pa.Scalar) -> Any:
    """A column's value; of strings that are no UTF-8 the bytes, so that one of them does not end a batch."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return (
            [_value(item) for item in scalar] if pa.types.is_list(scalar.type) else scalar.as_buffer().to_pybytes()
        )


@lru_cache(maxsize=HELD_GROUPS)
def _read_group(file: Path, stamp: str, number: int, token_format: TokenFormat) -> _Group:
    """A row group, decoded; of the cache a view of what is mapped."""
    with readable(file):
        if file.suffix == ".arrow":
            group = _mapped(file, stamp).get_batch(number)
            columns = dict(zip(group.schema.names, group.columns, strict=True))
        else:
            with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                table = parquet.read_row_group(number, use_threads=False)
            columns = {name: table[name].combine_chunks() for name in table.column_names}
    return _Group(ids_of(columns.pop("tokens"), token_format, file), columns)


@lru_cache(maxsize=HELD_GROUPS)
def _mapped(file: Path, stamp: str) -> pa.ipc.RecordBatchFileReader:
    return pa.ipc.open_file(pa.memory_map(os.fspath(file)))


def _cached(file: Path, folder: Path) -> Path:
    """The file as Arrow IPC, a record batch for each row group; made where it is missing, or of an older file."""
    name = hashlib.sha256(os.fsencode(file.absolute())).hexdigest()[:16]
    path = folder / f"{file.stem}-{name}.arrow"
    stamp = f"{_CACHE_VERSION} {_stamp(file)}".encode()
    with suppress(OSError, pa.ArrowException):
        if (pa.ipc.open_file(pa.memory_map(os.fspath(path))).schema.metadata or {}).get(b"stamp") == stamp:
            return path
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")  # other processes may be at it, too
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with readable(file):
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
        schema = parquet.schema_arrow.with_metadata({b"stamp": stamp})
        with parquet, pa.OSFile(os.fspath(unfinished), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for number in range(parquet.num_row_groups):
                with readable(file):
                    table = parquet.read_row_group(number)
                writer.write_batch(pa.record_batch([c.combine_chunks() for c in table.columns], schema=schema))
        unfinished.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({one_line(error)}): choose another cache") from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return path


def _footer(file: Path) -> pq.FileMetaData:
    with readable(file):
        return pq.read_metadata(file)


def _stamp(file: Path) -> str:
    """Which version of a file it is."""
    stat = file.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"
