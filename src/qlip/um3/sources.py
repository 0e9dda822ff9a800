"""What a unified model learns from: plain text, and pictures' tokens with their words.

Text is tokenized once, before training, into one long array of ids: so any place in it can be read at once, an
epoch's order is a permutation of its documents, and a batch needs nothing but its number. With a `cache` the array
is a file, mapped into memory, and the next run finds it there.

| source | what it is |
| --- | --- |
| `a.jsonl` | an object a line, its text under `column` |
| `a.parquet` | a row a document, its text in `column` |
| `a.txt` | the whole file is a document |
| `folder/` | all such files in it and below, by name |
| `datasets:NAME[:SPLIT]` | a set of the `datasets` library (extra `datasets`) |
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer
from torch import Tensor

from qlip.data.captions import Captioner
from qlip.data.hub import hub_texts
from qlip.data.loader import MOST_IN_A_ROW
from qlip.data.parquet import readable
from qlip.data.samples import BadSample, Fault
from qlip.data.token_dataset import TokenDataset, words_of
from qlip.data.values import read_text
from qlip.data.walk import walk
from qlip.errors import InputError, one_line
from qlip.files import json_lines, whole_file
from qlip.model.text import check_text
from qlip.um3.config import UM3Config
from qlip.um3.layout import text_document

SUFFIXES = (".jsonl", ".parquet", ".txt")
AT_ONCE = 1000  # documents that are tokenized together
_HUB = "datasets:"
_CACHE_VERSION = "1"


class Text:
    """Documents' ids, one document after the other. Pickles, for worker processes.

    Attributes:
        ids: (num_tokens,) unsigned integers.
        ends: (n,) int64, where each document ends.
    """

    def __init__(self, ids: np.ndarray, ends: np.ndarray):
        self.ids, self.ends = ids, ends

    @classmethod
    def open(
        cls,
        sources: Sequence[str],
        tokenizer: Tokenizer,
        config: UM3Config,
        column: str = "text",
        cache: Path | None = None,
    ) -> "Text":
        """Tokenize sources, or find them tokenized.

        Args:
            sources: files, folders or names, see above.
            tokenizer: of `qlip.um3.checkpoint.open_tokenizer`.
            config: the model's, for what stands around a document.
            column: which holds the text.
            cache: a folder for the ids, 2 or 4 bytes a token.

        Raises:
            InputError: a source cannot be read, has no such column, or all of it is empty.
        """
        files = find_texts(sources)
        dtype = np.min_scalar_type(config.num_text)
        documents = _tokenized(files, tokenizer, config, column)
        if cache is None:
            parts = [(ids.astype(dtype), lengths) for ids, lengths in documents]
            if not parts:
                raise _nothing(sources)
            ids, lengths = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            return cls(ids, np.cumsum(lengths))
        path = cache / f"text-{_stamp(files, tokenizer, config, column)}.ids"
        if not path.exists():  # written last, so that the other file is there, too
            lengths_of: list[np.ndarray] = []
            with whole_file(path) as unfinished, unfinished.open("wb") as file:
                for ids, some in documents:
                    file.write(ids.astype(dtype).tobytes())
                    lengths_of.append(some)
                if not lengths_of:
                    raise _nothing(sources)
                with whole_file(path.with_suffix(".npy")) as other, other.open("wb") as ends:
                    np.save(ends, np.cumsum(np.concatenate(lengths_of)))
        return _mapped(path, dtype, np.load(path.with_suffix(".npy")))

    def __reduce__(self):
        if isinstance(self.ids, np.memmap):  # by itself it would take along all that is mapped
            return _mapped, (self.ids.filename, self.ids.dtype, self.ends)
        return Text, (self.ids, self.ends)

    @property
    def num_tokens(self) -> int:
        """Of all documents, with their beginnings and ends."""
        return int(self.ends[-1])

    def __len__(self) -> int:
        return len(self.ends)

    def document(self, index: int) -> np.ndarray:
        """(T,) int64 ids of a document."""
        return self.ids[self.ends[index - 1] if index else 0 : self.ends[index]].astype(np.int64)

    def window(self, start: int, length: int, seed: int) -> list[np.ndarray]:
        """The ids from a place on, as the pieces of the documents that they belong to.

        Endless: epoch e has the documents one after the other, in the permutation that (seed, e) draws.

        Args:
            start: the place, counted over epochs.
            length: how many ids.
            seed: of the order.
        """
        pieces: list[np.ndarray] = []
        while length:
            epoch, place = divmod(start, self.num_tokens)
            order, ends = _order(self, seed, epoch)
            at = int(np.searchsorted(ends, place, side="right"))
            left = int(ends[at]) - place
            stop = int(self.ends[order[at]])
            pieces.append(self.ids[stop - left : stop - left + min(left, length)].astype(np.int64))
            start, length = start + len(pieces[-1]), length - len(pieces[-1])
        return pieces


def _mapped(path: Path, dtype: np.dtype, ends: np.ndarray) -> Text:
    return Text(np.memmap(path, dtype, "r"), ends)


@lru_cache(maxsize=4)  # an epoch and the next, of training and of something else
def _order(text: Text, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The permutation of an epoch, and where each of its documents ends."""
    permutation = np.random.default_rng((seed, epoch)).permutation(len(text))
    return permutation, np.cumsum(np.diff(text.ends, prepend=0)[permutation])


class Pictures:
    """Pictures' tokens and captions by number. Pickles, for worker processes."""

    def __init__(
        self,
        paths: Sequence[Path],
        config: UM3Config,
        tokenizer: Tokenizer,
        max_caption_tokens: int,
        captioner: Captioner | None = None,
        cache: Path | None = None,
    ):
        """Open the token files.

        Args:
            paths: token files, or folders of them.
            config: the model's.
            tokenizer: of `qlip.um3.checkpoint.open_tokenizer`.
            max_caption_tokens: the most of a caption that is read.
            captioner: makes captions; by default a picture must have its own.
            cache: see `TokenDataset`.

        Raises:
            InputError: they are no token files, or not of the model's ids and grid.
        """
        # A set for each path: one may have captions, another labels.
        self.parts = [TokenDataset(path, config.num_bits, cache) for path in paths]
        self.ends = list(accumulate(map(len, self.parts)))
        self.config, self.tokenizer, self.max_caption_tokens = config, tokenizer, max_caption_tokens
        self.captioner = captioner or Captioner()
        for path, part in zip(paths, self.parts, strict=True):
            if (part.format.id_hash, part.format.grid) != (config.id_hash, config.grid):
                raise InputError(
                    f"{path}: ids {part.format.id_hash} of {part.format.model!r} on a grid of {part.format.grid}, "
                    f"the model has {config.id_hash} of {config.tokenizer!r} on {config.grid}: tokenize with that"
                )

    def __len__(self) -> int:
        return self.ends[-1]

    def read(
        self, indices: Sequence[int], draws: Sequence[Any], faults: list[Fault] | None = None
    ) -> list[tuple[str, Tensor, list[int]]]:
        """Some images: of each its key, tokens (N,) and the ids of its caption.

        Args:
            indices: which.
            draws: a seed for each, by which one of several captions is drawn.
            faults: takes what cannot be used, and another image, drawn by the same seed, replaces it. None: the
                first such image is an error.

        Raises:
            InputError: an image has no words; names it.
        """
        return [self._usable(index, draw, faults) for index, draw in zip(indices, draws, strict=True)]

    def _usable(self, index: int, draw: Any, faults: list[Fault] | None) -> tuple[str, Tensor, list[int]]:
        rng = np.random.default_rng(draw)
        for attempt in range(1, MOST_IN_A_ROW + 1):
            try:
                return self._one(index, rng)
            except BadSample as error:
                if faults is None or attempt == MOST_IN_A_ROW:
                    raise
                faults.append(Fault(error.key, error.reason, index))
            rng = np.random.default_rng((*np.atleast_1d(draw), attempt))
            index = int(rng.integers(len(self)))
        raise AssertionError

    def _one(self, index: int, rng: np.random.Generator) -> tuple[str, Tensor, list[int]]:
        which = bisect_right(self.ends, index)
        row = self.parts[which][index - (self.ends[which - 1] if which else 0)]
        caption = self.captioner(words_of(row) | {"key": row["key"]}, rng)
        ids = self.tokenizer.encode(caption, add_special_tokens=False).ids[: self.max_caption_tokens]
        return row["key"], row["sub_tokens"][:, 0], ids


def find_texts(sources: Sequence[str]) -> list[str]:
    """The files and sets of sources, in order; for `read_texts`.

    Raises:
        InputError: one is not there, or is no text.
    """
    return [file for source in sources for file in _files(source)]


def read_texts(file: str, column: str) -> Iterator[str]:
    """The documents of a file or a set, in order; empty ones too, which null and NaN are as well.

    Raises:
        InputError: it cannot be read, or has no such column, or a document is no valid text; names it.
    """
    if file.startswith(_HUB):
        yield from _documents(
            enumerate(hub_texts(file.removeprefix(_HUB), column), 1), f"{file}: document", column
        )
    elif file.endswith(".parquet"):
        with readable(file), pq.ParquetFile(file) as parquet:
            if column not in parquet.schema_arrow.names:
                raise InputError(f"{file}: no column {column!r}; its columns are {parquet.schema_arrow.names}")
            batches = parquet.iter_batches(AT_ONCE, columns=[column])
            values = (value for batch in batches for value in batch[column].to_pylist())
            yield from _documents(enumerate(values, 1), f"{file}: row", column)
    else:
        try:
            if file.endswith(".txt"):
                yield read_text(Path(file))
            else:
                yield from _documents(_of_lines(file, column), f"{file}: line", column)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file} is not readable text ({one_line(error)}): fix it") from error


def _files(source: str) -> list[str]:
    path = Path(source)
    if source.startswith(_HUB):
        return [source]
    files = sorted(p for p in map(path.joinpath, walk(path)) if p.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise InputError(f"{source}: no text there; name {', '.join(SUFFIXES)}, a folder of them or datasets:NAME")
    if files[0].suffix not in SUFFIXES:
        raise InputError(f"{source}: text is read from {', '.join(SUFFIXES)}: convert it")
    return list(map(str, files))


def _of_lines(file: str, column: str) -> Iterator[tuple[int, Any]]:
    """The column of each object of a `.jsonl`, with the number of its line."""
    try:
        for number, _, entry in json_lines(file):
            if not isinstance(entry, dict) or column not in entry:
                raise InputError(f"line {number:,} is not an object with {column!r}: fix it, or name the column")
            yield number, entry[column]
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _documents(values: Iterable[tuple[int, Any]], where: str, column: str) -> Iterator[str]:
    """Values as texts; null and NaN are empty."""
    for number, value in values:
        if value is None or value != value:
            yield ""
            continue
        try:
            yield check_text(value)
        except InputError as error:
            raise InputError(f"{where} {number:,}: {column!r} is no text ({error}): leave it out") from error


def _tokenized(
    files: list[str], tokenizer: Tokenizer, config: UM3Config, column: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids of some documents, one after the other, and their lengths; blank ones left out."""
    texts = (text for file in files for text in read_texts(file, column) if text.strip())
    while some := list(islice(texts, AT_ONCE)):
        found = tokenizer.encode_batch_fast(some, add_special_tokens=False)
        documents = [text_document(encoding.ids, config) for encoding in found]
        lengths = np.array([len(document) for document in documents], np.int64)
        yield np.concatenate([np.array(document, np.int64) for document in documents]), lengths


def _stamp(files: list[str], tokenizer: Tokenizer, config: UM3Config, column: str) -> str:
    """A name for what the ids are made of; of a set of the library that is its name."""
    digest = hashlib.sha256(f"{_CACHE_VERSION} {column} {config.bos} {config.eos} {config.num_text}".encode())
    digest.update(tokenizer.to_str().encode())
    for file in files:
        stat = None if file.startswith(_HUB) else Path(file).stat()
        digest.update(f"{file} {stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()[:16]


def _nothing(sources: Sequence[str]) -> InputError:
    return InputError(f"{', '.join(sources)}: all documents are empty: name text")
