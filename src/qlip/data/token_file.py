"""Token files: Parquet with a key and a fixed-size list of unsigned integers a row.

Whose ids they are stands in the file's metadata: the tokenizer's name and the hash of what makes its ids.
A file appears whole or not at all.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qlip.data.parquet import find_parquet, readable
from qlip.errors import InputError
from qlip.files import whole_file

FORMAT_VERSION = 1
_METADATA_KEY = b"qlip"


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

    def schema(self) -> pa.Schema:
        """Columns `key` and `tokens`, with this description in the metadata."""
        ids = pa.list_(pa.from_numpy_dtype(np.dtype(self.dtype)), self.num_tokens)
        metadata = json.dumps(asdict(self) | {"dtype": self.dtype})
        return pa.schema([("key", pa.string()), ("tokens", ids)], metadata={_METADATA_KEY: metadata})

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
                if not schema.equals(found.schema()):
                    raise ValueError(f"its columns are {', '.join(map(str, schema))}")
                return found
        except (KeyError, TypeError, ValueError, OverflowError, pa.ArrowException) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise InputError(
                f"{path}: its `qlip` metadata is damaged ({reason}): tokenize the pictures again"
            ) from error
        raise InputError(f"{path}: format version {version} is newer than this open-qlip: upgrade")


@contextmanager
def token_writer(path: Path, token_format: TokenFormat) -> Iterator[Callable[[Sequence[str], np.ndarray], None]]:
    """Write one token file, batch after batch; it appears when the block ends well.

    Args:
        path: the file.
        token_format: what it says of its ids.

    Yields:
        a function that adds rows: B keys and (B, N) ids.
    """
    schema = token_format.schema()

    def write(keys: Sequence[str], tokens: np.ndarray) -> None:
        ids = pa.array(tokens.astype(token_format.dtype).reshape(-1))
        lists = pa.FixedSizeListArray.from_arrays(ids, type=schema.field("tokens").type)
        writer.write_table(pa.table([pa.array(keys, pa.string()), lists], schema=schema))

    settings = {"compression": "zstd", "write_page_checksum": True}
    with whole_file(path) as unfinished, pq.ParquetWriter(unfinished, schema, **settings) as writer:
        yield write


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
    def open(cls, paths: Sequence[str | Path]) -> "TokenFiles":
        """Open token files, or folders of them.

        Raises:
            InputError: a file is no token file, or they are of different tokenizers or grids.
        """
        files = find_parquet(paths)
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
