"""What is tokenized: any source of data, and pictures by their names; cut into units, a fixed range of it each."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePath

from qlip.data.folder import PictureFiles
from qlip.data.samples import BadSample, Joined, evenly
from qlip.data.sources import is_picture, open_samples
from qlip.data.stream import RemoteShard, SampleRange, Stream

NUM_LOOKED_AT = 8  # samples that tell one source from another


@dataclass(frozen=True)
class Unit:
    """A range of the source.

    Attributes:
        number: from 0.
        samples: its samples, read from front to back.
    """

    number: int
    samples: RemoteShard | SampleRange


def open_sources(sources: Sequence[str]) -> Joined | Stream:
    """Open sources of data and pictures, in this order.

    Raises:
        InputError: nothing is named, or something is not there or of no known kind.
    """
    parts: list[Joined | Stream] = []
    for are_pictures, group in groupby(sources, is_picture):
        some = list(group)
        parts.append(Joined([PictureFiles(some)]) if are_pictures else open_samples(some))
    if len(parts) < 2:
        return parts[0] if parts else open_samples([])
    unreadable = [fault for part in parts for fault in part.unreadable]
    if not any(isinstance(part, Stream) for part in parts):
        return Joined([part for part in parts if isinstance(part, Joined)])
    shards = [part.shards if isinstance(part, Stream) else [SampleRange(part, 0, len(part))] for part in parts]
    return Stream([shard for some in shards for shard in some], tuple(unreadable))


def cut(samples: Joined | Stream, rows: int) -> list[Unit]:
    """The units of some data: `rows` samples each, or what a stream has as a shard."""
    if isinstance(samples, Stream):
        return [Unit(number, shard) for number, shard in enumerate(samples.shards)]
    starts = range(0, len(samples), rows)
    return [
        Unit(number, SampleRange(samples, start, min(start + rows, len(samples))))
        for number, start in enumerate(starts)
    ]


def fingerprint(samples: Joined | Stream) -> str:
    """16 hexadecimal digits that tell these data from others.

    They come from the number of samples, or the names of remote shards, and from the keys and bytes of 8 samples:
    a picture that was replaced among a million is not seen, one more or less is.
    """
    digest = hashlib.sha256()
    if isinstance(samples, Stream):
        local = [shard for shard in samples.shards if isinstance(shard, SampleRange)]
        digest.update("\n".join(shard.name for shard in samples.shards).encode())
        places = [(shard.samples, shard.start) for shard in (local[i] for i in evenly(len(local), NUM_LOOKED_AT))]
    else:
        digest.update(str(len(samples)).encode())
        places = [(samples, index) for index in evenly(len(samples), NUM_LOOKED_AT)]
    for source, index in places:
        try:
            sample = source.read(index)
            fields = (sample["key"].encode("utf-8", "surrogatepass"), sample["image"])
        except BadSample as error:
            fields = (error.key.encode("utf-8", "surrogatepass"), b"")
        for field in fields:
            digest.update(len(field).to_bytes(8, "little") + field)
    return digest.hexdigest()[:16]


def names(sources: Sequence[str]) -> list[str]:
    """What the sources are called wherever they lie; pictures are counted."""
    found = []
    for are_pictures, group in groupby(sources, is_picture):
        some = list(group)
        if are_pictures:
            found.append(f"{len(some)} pictures" if len(some) > 1 else PurePath(some[0]).name)
        else:
            found += [source if ":" in source else PurePath(source).name for source in some]
    return [os.fsencode(name).decode("utf-8", "backslashreplace") for name in found]
