"""Reading data through, in worker processes: every picture decoded, once, in order."""

import hashlib
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from qlip.data.delivery import FromWorkers
from qlip.data.samples import Fault, Samples, readable
from qlip.data.stream import Stream
from qlip.errors import InputError
from qlip.image_files import open_image
from qlip.model.image import read_image

CHUNK = 64  # samples that a worker reads at a time
JPEG_QUALITY = 95
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2"}


@dataclass(frozen=True)
class Seen:
    """A sample whose picture was decoded.

    Attributes:
        key: of the sample.
        width: of the picture, as it came.
        height: the same.
        num_bytes: of the encoded picture, as it came.
        digest: of these bytes.
        record: its words, and whose it is.
        image: encoded, as it came or smaller; empty if it was not asked for.
        suffix: for a file of these bytes.
    """

    key: str
    width: int
    height: int
    num_bytes: int
    digest: bytes
    record: dict[str, Any]
    image: bytes = b""
    suffix: str = ""


@dataclass(frozen=True)
class Look:
    """What a worker does with a sample.

    Attributes:
        keep: whether to hand the encoded picture on.
        size: pixels that the short side of what is handed on has at most; a larger one is made smaller and
            encoded as JPEG.
    """

    keep: bool = False
    size: int | None = None

    def __call__(self, sample: dict[str, Any] | Fault) -> Seen | Fault:
        """Decode a sample's picture."""
        if isinstance(sample, Fault):
            return sample
        encoded, key = sample["image"], sample["key"]
        try:
            picture = read_image(encoded)
        except InputError as error:
            return Fault(key, str(error))
        record = {name: value for name, value in sample.items() if name not in ("image", "key")}
        seen = (key, *picture.size, len(encoded), hashlib.blake2b(encoded, digest_size=16).digest(), record)
        if not self.keep:
            return Seen(*seen)
        if self.size and min(picture.size) > self.size:
            return Seen(*seen, image=_smaller(picture, self.size), suffix="jpg")
        kind = open_image(encoded).format or ""
        return Seen(*seen, image=encoded, suffix=_SUFFIXES.get(kind, kind.lower()))


def read_through(
    samples: Samples | Stream, look: Look, num_workers: int = 0
) -> Iterator[tuple[list[Seen | Fault], float]]:
    """Read every sample once.

    Args:
        samples: what is read; of a stream each worker reads shards of its own.
        look: what to do with each.
        num_workers: processes; 0: this one.

    Yields:
        at most 64 results, in order, and the seconds of processor time that they took.
    """
    if isinstance(samples, Stream):
        yield from FromWorkers(_Shards(samples, look), num_workers)
    else:
        chunks = range(0, len(samples), CHUNK)
        yield from FromWorkers(_Chunks(samples, look), num_workers, chunks)


@dataclass(frozen=True)
class _Chunks(Dataset):
    samples: Samples
    look: Look

    def __getitem__(self, start: int) -> tuple[list[Seen | Fault], float]:
        since = time.process_time()
        found = readable(self.samples, range(start, min(start + CHUNK, len(self.samples))))
        return list(map(self.look, found)), time.process_time() - since


@dataclass(frozen=True)
class _Shards(IterableDataset):
    stream: Stream
    look: Look

    def __iter__(self) -> Iterator[tuple[list[Seen | Fault], float]]:
        info = get_worker_info()
        shards = self.stream.shards[info.id :: info.num_workers] if info else self.stream.shards
        since, results = time.process_time(), []
        for sample in Stream(shards):
            results.append(self.look(sample))
            if len(results) == CHUNK:
                yield results, time.process_time() - since
                since, results = time.process_time(), []
        yield results, time.process_time() - since


def _smaller(picture: Image.Image, size: int) -> bytes:
    short = min(picture.size)
    width, height = (round(side * size / short) for side in picture.size)
    file = io.BytesIO()
    picture.resize((width, height), Image.Resampling.BICUBIC).save(
        file, "JPEG", quality=JPEG_QUALITY, subsampling=0
    )
    return file.getvalue()
