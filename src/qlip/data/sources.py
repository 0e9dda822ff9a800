"""What a string names, and how it is read.

| source | what |
| --- | --- |
| `x.parquet`, a folder of them | `qlip.data.parquet` |
| a picture, a folder of pictures | `qlip.data.folder` |
| `x.csv`, `x.tsv`, `x.jsonl` | `qlip.data.listing` |
| `x.tar`, `x-{000..127}.tar`, `x-*.tar`, a folder of them | `qlip.data.shards` |
| `https://…/x-{000..127}.tar`, `s3://…`, `gs://…` | `qlip.data.stream` |
| `datasets:NAME`, `datasets:NAME:SPLIT` | `qlip.data.hub` |
"""

import glob
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from qlip.data.folder import FolderSamples, PictureFiles
from qlip.data.hub import HubSamples
from qlip.data.listing import CsvSamples, JsonlSamples
from qlip.data.parquet import HELD_BYTES, ParquetFile, ParquetSamples
from qlip.data.remote import glob_url, require_scheme
from qlip.data.samples import Joined, Samples
from qlip.data.shards import ShardSamples
from qlip.data.stream import RANGE, RemoteShard, SampleRange, Stream
from qlip.data.walk import is_left, visible
from qlip.errors import InputError
from qlip.image_files import is_image, is_image_file, read_file

Source = str | os.PathLike[str]
logger = logging.getLogger("qlip")

_FILES: dict[str, Callable[[Path], Samples]] = {
    ".parquet": lambda path: ParquetSamples([path]),
    ".csv": CsvSamples,
    ".tsv": CsvSamples,
    ".jsonl": JsonlSamples,
    ".tar": lambda path: ShardSamples([path]),
}
_KNOWN = (
    "a folder of pictures, a picture, .parquet, .csv, .tsv, .jsonl or .tar files, https:// or s3:// shards, "
    "or datasets:NAME"
)


def open_samples(sources: Iterable[Source], buffer_size: int = 1000) -> Joined | Stream:
    """Open sources, of one kind or of several.

    Args:
        sources: see above.
        buffer_size: samples that are shuffled among each other where something is remote.

    Returns:
        samples by number; if anything is remote, a stream of all.

    Raises:
        InputError: a source is not there, cannot be read, or is of no known kind.
    """
    parts: list[Samples] = []
    remote: list[RemoteShard] = []
    for source in (os.fspath(source) for source in sources):
        if "://" in source:
            remote += map(RemoteShard, _remote_files(source))
        else:
            parts.append(_open(source))
    if not parts and not remote:
        raise InputError(f"no data: name {_KNOWN}")
    joined = Joined(parts) if parts else None
    if joined is not None:
        _warn_of_slow_reading(joined)
        if not remote:
            return joined
    ranges = [
        SampleRange(part, start, min(start + RANGE, len(part)))
        for part in parts
        for start in range(0, len(part), RANGE)
    ]
    unreadable, names = (joined.unreadable, joined.class_names) if joined is not None else ((), ())
    return Stream((*remote, *ranges), unreadable, buffer_size, names)


def open_indexed(sources: Sequence[Source]) -> Joined:
    """Open sources that can be read at any place.

    Raises:
        InputError: also if one is remote.
    """
    samples = open_samples(sources)
    if isinstance(samples, Stream):
        raise InputError(f"{sources[0]}: is read from front to back: fetch the shards first")
    return samples


def is_picture(source: str) -> bool:
    """Whether a source is an image file that was named itself."""
    if "://" in source or source.startswith("datasets:") or os.path.isdir(source):
        return False
    known = os.path.splitext(source)[1].lower() in _FILES
    return not known and "*" not in source and is_image_file(source)


def expand_braces(pattern: str) -> list[str]:
    """`a-{00..02}.tar` → a-00.tar, a-01.tar, a-02.tar; `{x,y}.tar` → x.tar, y.tar; several of them, too."""
    found = re.search(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", pattern)
    if not found:
        return [pattern]
    before, inside, after = pattern[: found.start()], found[1], pattern[found.end() :]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = numbers.groups()
        choices = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    else:
        choices = inside.split(",")
    return [before + choice + rest for choice in choices for rest in expand_braces(after)]


def local_files(pattern: str) -> list[str]:
    """The files that a path with braces and asterisks names; without asterisks whether or not they are there."""
    names = expand_braces(pattern)
    return [file for name in names for file in (_globbed(name) if "*" in name else [name])]


def _globbed(pattern: str) -> list[str]:
    return sorted(file for file in glob.glob(pattern) if not is_left(os.path.basename(file)))


def _open(source: str) -> Samples:
    if not source:
        raise InputError(f"a source is an empty string: name {_KNOWN}")
    if source.startswith("datasets:"):
        return HubSamples(source.removeprefix("datasets:"))
    path = Path(source)
    if path.is_dir():
        return _open_folder(path)
    if is_picture(source):
        return PictureFiles([source])
    if path.exists():
        if not path.is_file() or path.parent == Path("/dev"):
            return _open_pipe(path)
        if path.suffix.lower() not in _FILES:
            raise InputError(f"{source}: not a source of data: name {_KNOWN}")
        return _FILES[path.suffix.lower()](path)
    files = local_files(source)
    if files == [source]:
        hint = f"; a set of the hub is datasets:{source}" if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""
        raise InputError(f"{source}: no such file or folder{hint}")
    if not files:
        raise InputError(f"{source}: nothing there")
    suffixes = {Path(file).suffix.lower() for file in files}
    if suffixes == {".tar"}:
        return ShardSamples([Path(file) for file in files])
    return Joined([_open(file) for file in files])


def _open_pipe(path: Path) -> Samples:
    """What a pipe gives, such as `/dev/stdin` and `<(…)`, by its first bytes: an image, JSONL, else CSV or TSV."""
    try:
        contents = read_file(path, pipes=True)
    except InputError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if is_image(contents):
        return PictureFiles([str(path)], {str(path): contents})
    kind = JsonlSamples if contents.lstrip(b" \t\r\n\xef\xbb\xbf").startswith(b"{") else CsvSamples
    return kind(path, contents)


def _open_folder(path: Path) -> Samples:
    tables, shards = visible(path, "*.parquet"), visible(path, "*.tar")
    if tables and shards:
        raise InputError(f"{path}: holds Parquet files and shards: name the one, as {path / '*.tar'}")
    if tables:
        return ParquetSamples(tables)
    return ShardSamples(shards) if shards else FolderSamples(path)


def _remote_files(source: str) -> Iterator[str]:
    require_scheme(source)
    for url in expand_braces(source):
        yield from glob_url(url) if "*" in url else [url]


def _warn_of_slow_reading(samples: Joined) -> None:
    """Rows of Parquet are decoded a row group at a time: fine while the decoded ones can be kept."""
    tables = [file for part in samples.parts if isinstance(part, ParquetSamples) for file in part.parts]
    num_bytes = sum(table.num_bytes for table in tables if isinstance(table, ParquetFile))
    if num_bytes > HELD_BYTES:
        logger.warning(
            "%.0f GiB of Parquet do not fit the %.0f GiB that a process keeps decoded: reading them in random "
            "order is slow; `qlip data pack` makes shards, which are not",
            num_bytes / 2**30,
            HELD_BYTES / 2**30,
        )
