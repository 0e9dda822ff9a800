"""Token files: Parquet with a key and a fixed-size list of unsigned integers a row, and words if they were kept.

Whose ids they are stands in the file's metadata: the tokenizer's name and the hash of what makes its ids. Another
entry says which part of which data a file is of. A file appears whole or not at all.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qlip.data.parquet import find_parquet, readable
from qlip.errors import InputError
from qlip.files import whole_file

FORMAT_VERSION = 1
ROW_GROUP = 1000  # rows that are decoded together
KEPT = {"caption": pa.string(), "captions": pa.list_(pa.string()), "label": pa.int64()}
"""Columns that a file may have besides `key` and `tokens`; null where a sample has no such words."""

_METADATA_KEY = b"qlip"
_ORIGIN_KEY = b"qlip_origin"


@dataclass(frozen=True)
class TokenFormat:
    """What a token file says of its ids.

    Attributes:
        model: name of the tokenizer.
        id_hash: hash of what makes the ids, `QLIP.id_hash()`.
        bits: L, the width of a token.
        grid: rows and columns of tokens in a picture.
        format_version: of the file.
    """

    model: str
    id_hash: str
    bits: int
    grid: tuple[int, int]
    format_version: int = FORMAT_VERSION

    @property
    def num_tokens(self) -> int:
        """Tokens of a picture."""
        return self.grid[0] * self.grid[1]

    @property
    def dtype(self) -> str:
        """The narrowest unsigned type that holds a token: uint32 up to 32 bits, else uint64."""
        return "uint32" if self.bits <= 32 else "uint64"

    def describe(self) -> dict[str, Any]:
        """These attributes and the ids' dtype."""
        return asdict(self) | {"dtype": self.dtype}

    def schema(self, keep: Sequence[str] = ()) -> pa.Schema:
        """Columns `key`, `tokens` and some of `KEPT`, with this description in the metadata."""
        ids = pa.list_(pa.from_numpy_dtype(np.dtype(self.dtype)), self.num_tokens)
        columns = [("key", pa.string()), ("tokens", ids), *((name, KEPT[name]) for name in keep)]
        return pa.schema(columns, metadata={_METADATA_KEY: json.dumps(self.describe())})

    @classmethod
    def read(cls, path: str | Path) -> "TokenFormat":
        """Read the description in a file.

        Raises:
            InputError: the file is not Parquet, not a token file, damaged, or of a later format.
        """
        with readable(path):
            schema = pq.read_schema(path)
        metadata = (schema.metadata or {}).get(_METADATA_KEY)
        if metadata is None:
            raise InputError(f"{path}: not a token file; `qlip tokenize` writes them")
        try:
            fields = json.loads(metadata)
            version = int(fields["format_version"])
            if version <= FORMAT_VERSION:
                rows, columns = map(int, fields["grid"])
                found = cls(
                    str(fields["model"]), str(fields["id_hash"]), int(fields["bits"]), (rows, columns), version
                )
                if not schema.equals(found.schema([name for name in schema.names if name in KEPT])):
                    raise ValueError(f"its columns are {', '.join(map(str, schema))}")
                return found
        except (KeyError, TypeError, ValueError, OverflowError, pa.ArrowException) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise InputError(
                f"{path}: its `qlip` metadata is damaged ({reason}): tokenize the pictures again"
            ) from error
        raise InputError(f"{path}: format version {version} is newer than this open-qlip: upgrade")


def write_token_file(
    path: Path,
    token_format: TokenFormat,
    keys: Sequence[str],
    tokens: np.ndarray,
    kept: Mapping[str, Sequence[Any]] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write a token file; equal rows make equal bytes.

    Args:
        path: the file.
        token_format: what it says of its ids.
        keys: n.
        tokens: (n, N) ids.
        kept: columns of `KEPT`, n values each.
        origin: which part of which data it is of, for `read_origin`.

    Raises:
        InputError: the file cannot be written.
    """
    kept = kept or {}
    schema = token_format.schema(tuple(kept))
    schema = schema.with_metadata(
        {**schema.metadata, _ORIGIN_KEY: json.dumps(origin)} if origin else schema.metadata
    )
    ids = pa.array(tokens.astype(token_format.dtype).reshape(-1))
    lists = pa.FixedSizeListArray.from_arrays(ids, type=schema.field("tokens").type)
    columns = [pa.array(keys, pa.string()), lists, *(pa.array(kept[name], KEPT[name]) for name in kept)]
    table = pa.table(columns, schema=schema)
    with whole_file(path) as unfinished:
        pq.write_table(
            table, unfinished, ROW_GROUP, compression="zstd", write_page_checksum=True, use_dictionary=False
        )
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())  # or a machine that goes down may leave the name without the contents


def read_origin(path: str | Path) -> dict[str, Any]:
    """What `write_token_file` was told of the origin; empty if nothing.

    Raises:
        InputError: the file is damaged.
    """
    with readable(path):
        metadata = pq.read_schema(path).metadata or {}
    try:
        return dict(json.loads(metadata.get(_ORIGIN_KEY, b"{}")))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: its `qlip_origin` metadata is damaged ({error}): tokenize again") from error


@dataclass(frozen=True)
class TokenFiles:
    """Token files of one tokenizer and one grid, read one batch after the other.

    Attributes:
        files: the Parquet files, in order.
        format: what they all say of their ids.
    """

    files: Sequence[Path]
    format: TokenFormat

    @classmethod
    def open(cls, paths: Sequence[str | os.PathLike[str]]) -> "TokenFiles":
        """Open token files, or folders of them.

        Raises:
            InputError: a file is no token file, or they are of different tokenizers or grids.
        """
        files = find_parquet([Path(path) for path in paths])
        formats = [TokenFormat.read(file) for file in files]
        for file, found in zip(files, formats, strict=True):
            if found.id_hash != formats[0].id_hash:
                raise InputError(
                    f"{file} holds ids {found.id_hash}, {files[0]} {formats[0].id_hash}: read them one at a time"
                )
            if found.grid != formats[0].grid:
                theirs, first = (f"{rows} × {columns}" for rows, columns in (found.grid, formats[0].grid))
                raise InputError(
                    f"{file} holds {theirs} tokens a picture, {files[0]} {first}: read them one at a time"
                )
        return cls(files, formats[0])

    def keys(self) -> list[str]:
        """All keys, in order.

        Raises:
            InputError: a file is damaged, or a row has no key.
        """
        keys: list[str] = []
        for file in self.files:
            with readable(file):
                found = pq.read_table(file, columns=["key"], page_checksum_verification=True)["key"].to_pylist()
            if None in found:
                raise InputError(f"{file}: row {found.index(None)} has no key: tokenize the pictures again")
            keys += found
        return keys

    def batches(self, batch_size: int = 64) -> Iterator[tuple[list[str], np.ndarray]]:
        """Batches of B keys and their (B, N) ids, in order.

        Raises:
            InputError: a file is damaged, or a row has no ids.
        """
        for file in self.files:
            with readable(file), pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                for batch in parquet.iter_batches(batch_size):
                    ids = batch.column("tokens")
                    if ids.null_count or ids.flatten().null_count:
                        raise InputError(f"{file}: a row has no ids: tokenize the pictures again")
                    yield batch.column("key").to_pylist(), ids.flatten().to_numpy().reshape(len(ids), -1)
