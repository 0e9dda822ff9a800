"""WebDataset shards: `.tar` files in which neighbours of one name make a sample.

    00000017.jpg    the picture
    00000017.txt    its captions, one a line
    00000017.cls    the number of its class
    00000017.json   an object with any of `caption`, `captions`, `label`, …: goes before the two others

The name ends at the first dot; other members are passed over. Where an image is passed over, as `b.v2.png`, and
no other member makes a sample of its name, it is a bad sample. Members that other programs leave beside data
(`qlip.data.walk`) do not count.

A local shard is read at any place: one scan finds where each sample's members lie, and leaves that beside the
shard, in `NAME.tar.index`, where the folder can be written to. A shard that was changed since is scanned again.
"""

import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from qlip.data.samples import BadSample, Fault, Joined, Samples, captions_of, describe, lines_of
from qlip.data.values import decode, printable
from qlip.data.walk import is_in_left
from qlip.errors import InputError, one_line
from qlip.guarded import parse_json, read_json, typed
from qlip.image_files import IMAGE_SUFFIXES, max_bytes

T = TypeVar("T")
FIELDS = ("image", "json", "txt", "cls")
MANIFEST = "manifest.json"
_HEADER_BYTES = 1 << 20  # of a long name, or of what PAX says
_EMPTY = (tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_LONGEST_NAME = 90  # that a header of one block surely holds, with its suffix
_PLACES = [(f"{field}_{what}", pa.int64()) for field in FIELDS for what in ("offset", "size")]
_INDEX = pa.schema([("key", pa.string()), *_PLACES])
_INDEX_VERSION = "3"  # whoever changes what is found in a shard counts it up


class Member(tarfile.TarInfo):
    """A member of a shard. tarfile alone takes a damaged header for the end, and that of a file for a shard's.

    No header is larger than `_HEADER_BYTES`, and no member than an image may be.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Member":
        """A member from its header.

        Raises:
            tarfile.HeaderError: it is damaged, or of a size that no member has.
        """
        member = super().frombuf(buf, encoding, errors)
        most = max_bytes() if member.isreg() else _HEADER_BYTES
        if member.size < 0 or (member.size > most and member.type not in _EMPTY):
            raise tarfile.HeaderError(f"{member.name!r:.80} is said to have {member.size:,} bytes")
        return member

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "Member":
        """The next member.

        Raises:
            tarfile.ReadError: there is none, nor the mark of the end; or it is sparse.
        """
        offset = tar.offset
        try:
            member = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except (
            tarfile.HeaderError,
            ValueError,
            LookupError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ) as error:
            raise tarfile.ReadError(f"damaged at byte {offset:,}: {one_line(error)}") from error
        if member.issparse() or not 0 <= member.size <= max_bytes():
            raise tarfile.ReadError(f"{member.name!r:.80} at byte {offset:,} is sparse, or larger than an image")
        return member


class ShardSamples(Joined):
    """The samples of local shards, in order; class names come from the first one's manifest."""

    def __init__(self, paths: Sequence[Path]):
        """Read or make each shard's index.

        Raises:
            InputError: none of them is a shard, or they are not all.
        """
        manifest = read_manifest(paths[0].parent, Manifest)
        if manifest and not manifest.complete:
            raise InputError(f"{paths[0].parent}: `qlip data pack` has not finished here: start it again")
        joined = Joined.of_files(Shard, paths)
        super().__init__(joined.parts, joined.unreadable)
        self.class_names = manifest.class_names if manifest else ()


class Shard(Samples):
    """The samples of one local shard."""

    def __init__(self, path: Path):
        """Read or make the index.

        Raises:
            InputError: the file is no shard. One that ends early has what is surely whole, and is `unreadable`.
        """
        try:
            self._index = _read_index(path)
        except (OSError, tarfile.TarError) as error:
            raise InputError(f"{path}: not a readable shard ({one_line(error)}): replace it") from error
        self._path = path
        if fault := self._index.schema.metadata[b"fault"].decode():
            self.unreadable = (Fault(str(path), f"{fault}: replace it", is_file=True),)
        if not len(self):
            raise InputError(f"{path}: no samples in this shard")

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> dict[str, Any]:
        """Sample `index`."""
        key, fields = self._fields(index, FIELDS)
        return sample_of(key, fields)

    def captions(self) -> Iterator[str]:
        """Those of all samples whose words are good."""
        for i in range(len(self)):
            with suppress(BadSample):  # `read` tells of it
                yield from captions_of([_words(*self._fields(i, ("json", "txt")))])

    def _fields(self, index: int, names: Iterable[str]) -> tuple[str, dict[str, bytes]]:
        row = self._index.slice(index, 1).to_pylist()[0]
        key, fields = f"{self._path.name}/{row['key']}", {}
        try:
            with self._path.open("rb") as file:
                for name in names:
                    if row[f"{name}_offset"] is not None:
                        file.seek(row[f"{name}_offset"] - tarfile.BLOCKSIZE)
                        self._check(file.read(tarfile.BLOCKSIZE), row["key"], name, row[f"{name}_size"])
                        fields[name] = file.read(row[f"{name}_size"])
        except (OSError, tarfile.TarError) as error:
            raise BadSample(key, f"its shard cannot be read ({one_line(error)})") from error
        return key, fields

    def _check(self, header: bytes, key: str, field: str, size: int) -> None:
        """Whether a member is the one that the index says: another shard may have taken the place of this one.

        Raises:
            tarfile.TarError: it is not.
        """
        member = Member.frombuf(header, tarfile.ENCODING, "surrogateescape")
        is_plain = key.isascii() and len(key) < _LONGEST_NAME  # else its name is in a header of its own
        named = not is_plain or (printable(_split(member.name)[0]) == key and field_of(member.name) == field)
        if not named or member.size not in (size, 0):  # 0: a size in a header of its own
            raise tarfile.ReadError(
                f"it is not the one that its index was made of: delete {self._path.name}.index"
            )


def sample_of(key: str, fields: Mapping[str, bytes]) -> dict[str, Any]:
    """A sample from the contents of its members.

    Raises:
        BadSample: it has no picture, or its words are damaged.
    """
    key = printable(key)
    if "image" not in fields:
        raise BadSample(
            key, "no picture among its members (NAME.x.png is passed over: names end at the first dot)"
        )
    return {"image": fields["image"], "key": key} | _words(key, fields)


def grouped(members: Iterable[tuple[str, T]]) -> Iterator[tuple[str, dict[str, T]]]:
    """Named members of a shard → the name of each sample, and its members by field."""
    good = (member for member in members if not is_in_left(member[0]))
    for stem, group in itertools.groupby(good, lambda member: _split(member[0])[0]):
        fields: dict[str, T] = {}
        passed_over = False
        for name, value in group:
            passed_over |= name.rpartition(".")[2].lower() in IMAGE_SUFFIXES
            if field := field_of(name):
                fields.setdefault(field, value)
        if fields or passed_over:
            yield printable(stem), fields


def field_of(name: str) -> str | None:
    """Which of `FIELDS` a member is."""
    suffix = _split(name)[1].lower()
    return "image" if suffix in IMAGE_SUFFIXES else suffix if suffix in FIELDS[1:] else None


def add_sample(tar: tarfile.TarFile, number: int, image: bytes, suffix: str, record: Mapping[str, Any]) -> None:
    """Append a sample to a shard; equal samples make equal bytes."""
    stem = f"{number:08d}"
    members = {suffix: image, "json": json.dumps(record, ensure_ascii=False).encode()}
    said = next(captions_of([record]), "")
    if said:  # for other readers of such shards, as is `cls`
        members["txt"] = " ".join(said.split()).encode()
    if isinstance(record.get("label"), int):
        members["cls"] = str(record["label"]).encode()
    for name, contents in members.items():
        member = tarfile.TarInfo(f"{stem}.{name}")
        member.size = len(contents)
        tar.addfile(member, io.BytesIO(contents))


@dataclass(frozen=True)
class Manifest:
    """What a `manifest.json` says of the data beside it; other fields are ignored.

    Attributes:
        class_names: what the labels mean.
        licence: of the data.
        sha256: checksums of files, by name.
        complete: whether all that belongs there is; false while `qlip data pack` writes, and after it was killed.
    """

    class_names: tuple[str, ...] = ()
    licence: str | None = None
    sha256: dict[str, str] = field(default_factory=dict)
    complete: bool = True


def read_manifest(folder: Path, kind: type[T], name: str = MANIFEST) -> T | None:
    """The manifest of a folder; None where there is none.

    Args:
        folder: where it is looked for.
        kind: a dataclass of the fields to read.
        name: of the file.

    Raises:
        InputError: it is damaged, or a field has another type.
    """
    path = folder / name
    try:
        values = read_json(path)
        return typed(kind, values, unknown="ignore") if isinstance(values, dict) else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, InputError) as error:
        raise InputError(f"{path}: not a usable manifest ({one_line(error)}): replace or delete it") from error


def _words(key: str, fields: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        record = parse_json(decode(fields["json"])) if "json" in fields else {}
        if not isinstance(record, dict):
            raise InputError("its .json holds no object")
        words = describe(record, key)
        if "txt" in fields and not {"caption", "captions"} & words.keys():
            words |= lines_of(decode(fields["txt"]), key)
        if "cls" in fields and "label" not in words:
            words |= describe({"label": fields["cls"]}, key)
    except BadSample:
        raise
    except InputError as error:
        raise BadSample(key, f"its words are damaged ({one_line(error)})") from error
    return words


def _split(name: str) -> tuple[str, str]:
    """Up to the first dot of the last part, and behind it."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


def _read_index(path: Path) -> pa.Table:
    """The index beside a shard if it is of this version of it, else a new one."""
    if not path.is_file():
        raise InputError(f"{path}: not a regular file")
    stat, cache = path.stat(), path.with_name(path.name + ".index")
    stamp = f"{_INDEX_VERSION} {stat.st_size} {stat.st_mtime_ns}".encode()
    with suppress(OSError, pa.ArrowException, ValueError, MemoryError):
        table = pa.ipc.open_file(pa.memory_map(os.fspath(cache))).read_all() if cache.is_file() else None
        if table and _is_index(table, stamp, stat.st_size):
            return table
    rows, fault = _scan(path)
    table = pa.Table.from_pylist(rows, _INDEX.with_metadata({b"stamp": stamp, b"fault": fault.encode()}))
    unfinished = cache.with_name(f".{cache.name}.{os.getpid()}")  # other processes may be at it, too
    with suppress(OSError):
        with pa.ipc.new_file(os.fspath(unfinished), table.schema) as writer:
            writer.write_table(table)
        unfinished.replace(cache)
    return table


def _is_index(table: pa.Table, stamp: bytes, size: int) -> bool:
    """Whether a table is the index of a shard: it may come with somebody's data."""
    metadata = table.schema.metadata or {}
    if table.schema != _INDEX or metadata.get(b"stamp") != stamp or b"fault" not in metadata:
        return False
    table.validate(full=True)
    for name in FIELDS:
        offsets, sizes = table[f"{name}_offset"], table[f"{name}_size"]
        if not offsets.is_valid().equals(sizes.is_valid()):
            return False
        places = [pc.min_max(values).as_py() for values in (offsets, sizes, pc.add_checked(offsets, sizes))]
        (first, _), (least, _), (_, end) = (place.values() for place in places)
        if first is not None and not (first >= tarfile.BLOCKSIZE and least >= 0 and end <= size):
            return False
    return not table["key"].null_count


def _scan(path: Path) -> tuple[list[dict[str, Any]], str]:
    """A row for each sample, and what ended the scan before its time."""
    rows: list[dict[str, Any]] = []
    end = path.stat().st_size
    try:
        with tarfile.open(path, "r:", tarinfo=Member) as tar:
            members = ((m.name, (m.offset_data, m.size)) for m in tar if m.isfile())
            for key, places in grouped(members):
                row: dict[str, Any] = {"key": key}
                for field, (offset, size) in places.items():
                    if offset + size > end:
                        raise tarfile.ReadError(f"damaged: {key!r:.80} goes on behind the end")
                    row |= {f"{field}_offset": offset, f"{field}_size": size}
                rows.append(row)
    except tarfile.TarError as error:
        if not rows:
            raise
        return rows, one_line(error)
    return rows, ""
