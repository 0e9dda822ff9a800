"""Token files: Parquet with a key and a fixed-size list of unsigned integers a row, and words if they were kept.

Whose ids they are stands in the file's metadata: the tokenizer's name and the hash of what makes its ids. Another
entry says which part of which data a file is of. A file appears whole or not at all.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qlip.data.parquet import find_parquet, readable
from qlip.data.samples import Fault
from qlip.data.shards import MANIFEST as OLD_MANIFEST
from qlip.data.shards import read_manifest
from qlip.errors import InputError, one_line
from qlip.files import whole_file
from qlip.guarded import inside, parse_json, typed

logger = logging.getLogger("qlip")

FORMAT_VERSION = 1
MANIFEST = "_manifest.json"  # pyarrow, Spark and others pass over names that begin so: a folder is one data set
MAX_TOKENS = 1 << 20  # of a picture: a grid of 1024 × 1024
ROW_GROUP = 1000  # rows that are decoded together
KEPT = {"caption": pa.string(), "captions": pa.list_(pa.string()), "label": pa.int64()}
"""Columns that a file may have besides `key` and `tokens`; null where a sample has no such words."""

_METADATA_KEY = b"qlip"
_ORIGIN_KEY = b"qlip_origin"
_SUM_KEY, _NO_SUM = b"qlip_sha256", b"0" * 64


@dataclass(frozen=True)
class _Version:
    format_version: int


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

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 63:
            raise InputError(f"bits is {self.bits}: a token has 1 to 63")
        if min(self.grid) < 1 or self.num_tokens > MAX_TOKENS:
            raise InputError(
                f"grid is {list(self.grid)}: rows and columns are at least 1, tokens {MAX_TOKENS:,} at most"
            )

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
            fields = parse_json(metadata)
            version = typed(_Version, fields, unknown="ignore").format_version
            found = typed(cls, fields, unknown="ignore") if version <= FORMAT_VERSION else None
        except InputError as error:
            raise InputError(
                f"{path}: its `qlip` metadata is damaged ({one_line(error)}): tokenize the pictures again"
            ) from error
        if found is None:
            raise InputError(f"{path}: format version {version} is newer than this open-qlip: upgrade")
        _check_columns(path, schema, found)
        return found


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
        with pq.ParquetWriter(
            unfinished, schema, compression="zstd", write_page_checksum=True, use_dictionary=False
        ) as writer:
            writer.write_table(table, ROW_GROUP)
            writer.add_key_value_metadata({_SUM_KEY: _NO_SUM})
        with unfinished.open("r+b") as file:
            place, digest = _sum_of(file, _NO_SUM)
            file.seek(place)
            file.write(digest)
            os.fsync(file.fileno())  # or a machine that goes down may leave the name without the contents


def is_as_written(path: Path) -> bool:
    """Whether every byte is as `write_token_file` wrote it; True, too, of files that do not have their sum.

    The sum is the SHA-256 of the file with zeros in its place.

    Raises:
        InputError: the file is no Parquet.
    """
    with readable(path):
        stated = (pq.read_metadata(path).metadata or {}).get(_SUM_KEY)
        if stated is None:
            return True
        with path.open("rb") as file:
            return _sum_of(file, stated)[1] == stated


def _sum_of(file: BinaryIO, stated: bytes) -> tuple[int, bytes]:
    """Where in a Parquet file its sum stands, and what it should be."""
    file.seek(-8, os.SEEK_END)
    start = file.tell() - int.from_bytes(file.read(4), "little")
    file.seek(start)
    footer = file.read()
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(min(1 << 20, start - file.tell())):
        digest.update(block)
    digest.update(footer.replace(stated, _NO_SUM, 1))
    return start + footer.index(stated), digest.hexdigest().encode()


def read_origin(path: str | Path) -> dict[str, Any]:
    """What `write_token_file` was told of the origin; empty if nothing.

    Raises:
        InputError: the file is damaged.
    """
    with readable(path):
        metadata = pq.read_schema(path).metadata or {}
    try:
        return typed(dict[str, Any], parse_json(metadata.get(_ORIGIN_KEY, b"{}")), "it")
    except InputError as error:
        raise InputError(f"{path}: its `qlip_origin` metadata is damaged ({error}): tokenize again") from error


def ids_of(column: pa.Array, token_format: TokenFormat, file: Path) -> np.ndarray:
    """The column `tokens` as (n, N) ids.

    Raises:
        InputError: a row has no ids, or not N.
    """
    ids = column.flatten()
    if column.null_count or ids.null_count:
        raise InputError(f"{file}: a row has no ids: tokenize the pictures again")
    if set(pc.unique(pc.list_value_length(column)).to_pylist()) - {token_format.num_tokens}:
        raise InputError(
            f"{file}: a row has not the {token_format.num_tokens} ids of the others: tokenize it again"
        )
    return ids.to_numpy().reshape(len(column), token_format.num_tokens)


@dataclass(frozen=True)
class NamedShard:
    """A token file in a manifest."""

    name: str
    num_rows: int


@dataclass(frozen=True)
class TokenManifest:
    """What the manifest of a folder of token files says; other fields are ignored."""

    format: TokenFormat
    shards: tuple[NamedShard, ...]
    sha256: dict[str, str]
    failures: tuple[dict[str, str], ...]
    lost: tuple[Fault, ...]


def read_token_manifest(folder: Path) -> TokenManifest | None:
    """The manifest of a folder of token files, by its name or the one that it had before; None without one.

    Raises:
        InputError: it is damaged.
    """
    return read_manifest(folder, TokenManifest, MANIFEST) or read_manifest(folder, TokenManifest, OLD_MANIFEST)


def _files_of(path: Path) -> list[Path]:
    """The token files at a path.

    Raises:
        InputError: there are none, or a folder lacks some.
    """
    if not path.is_dir():
        return find_parquet([path])
    manifest = read_token_manifest(path)
    if manifest is None:
        files = find_parquet([path])
        if any("unit" in read_origin(file) for file in files):
            raise InputError(
                f"{path} has no {MANIFEST}, so it may not be whole: start its `qlip tokenize` again, which writes "
                "it at the end; or name the files themselves"
            )
        return files
    for shard in manifest.shards:
        file = inside(path, shard.name)
        if not file.exists():
            raise InputError(f"{file} is missing, but in {MANIFEST}: start its `qlip tokenize` again")
    if lost := manifest.lost:
        logger.warning("%s lacks what could not be read, as %s: see `qlip tokens verify`", path, lost[0].key)
    return find_parquet([path])


def _check_columns(path: str | Path, schema: pa.Schema, token_format: TokenFormat) -> None:
    """Whether `key` is text and `tokens` are lists of the ids' type; other columns may be there, in any order.

    Raises:
        InputError: they are not.
    """
    types: dict[str, Any] = {field.name: field.type for field in schema}
    key, tokens = types.get("key"), types.get("tokens")
    key = getattr(key, "value_type", key)  # of a dictionary
    is_list = isinstance(tokens, pa.FixedSizeListType | pa.ListType | pa.LargeListType)
    right_ids = (
        is_list and str(types["tokens"].value_type) == token_format.dtype
    )  # lists of any length: `ids_of` looks
    if isinstance(tokens, pa.FixedSizeListType):
        right_ids &= tokens.list_size == token_format.num_tokens
    is_text = key in (pa.string(), pa.large_string(), pa.string_view())
    if not (is_text and right_ids and all(schema.names.count(name) == 1 for name in ("key", "tokens"))):
        raise InputError(
            f"{path}: its columns are {', '.join(map(str, schema))}: it needs `key`, text, and `tokens`, lists of "
            f"{token_format.num_tokens} {token_format.dtype}"
        )


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
            InputError: a file is no token file, a folder is not whole, or they differ in tokenizers or grids.
        """
        files = [file for path in paths for file in _files_of(Path(path))]
        if not files:
            raise InputError("no data: name at least one token file or a folder of them")
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
            with readable(file), pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                found = parquet.read(columns=["key"])["key"].to_pylist()
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
                for batch in parquet.iter_batches(batch_size, columns=["key", "tokens"]):
                    yield batch["key"].to_pylist(), ids_of(batch["tokens"], self.format, file)
