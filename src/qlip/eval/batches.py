"""Pictures of a data set as an evaluation sees them, and what it finds of each, a row a picture.

Batches are numbered over the whole data set, and a process evaluates whole batches: so several processes compute
just what one would, and their rows, in the order of ranks, are its rows.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from qlip.data.delivery import FromWorkers
from qlip.data.samples import BadSample, Fault
from qlip.errors import InputError
from qlip.eval.metrics import stack_uint8
from qlip.eval.options import Resize
from qlip.model.image import ImageProcessor
from qlip.train.distributed import rank, world_size

BATCH_SIZE = 64
DIGEST_BYTES = 16

Track = Callable[[Iterable], Iterable]
"""Wraps an iterable to show progress over it."""

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Some pictures in the model's size.

    Attributes:
        pictures: (B, 3, H, W) uint8; B may be 0, if none could be read.
        samples: what else is known of each: `key`, `label`, `caption`, `captions`.
        digests: (M, 16) uint8, of all samples that the batch is of, M ≥ B.
        faults: samples that could not be used.
    """

    pictures: Tensor
    samples: list[dict[str, Any]]
    digests: Tensor
    faults: list[Fault]

    def pixel_values(self, processor: ImageProcessor) -> Tensor:
        """The pictures normalised, (B, 3, H, W) float32."""
        return torch.stack([processor.normalize(picture.permute(1, 2, 0).numpy()) for picture in self.pictures])


@dataclass(frozen=True)
class Pictures(Dataset):
    """A data set in numbered batches. Pickles, for worker processes.

    Attributes:
        samples: dicts with `image`, encoded bytes, and maybe `key`, `label`, `caption`, `captions`.
        processor: of the model; its size and filter are used.
        resize: "crop": the short side to the processor's length, then the middle, as ImageNet is evaluated;
            "squash": the whole picture to that size, whatever its aspect.
        max_samples: how many are looked at, evenly spread; None: all.
        batch_size: samples of a batch.
    """

    samples: Sequence[dict[str, Any]]
    processor: ImageProcessor
    resize: Resize = "crop"
    max_samples: int | None = None
    batch_size: int = BATCH_SIZE

    @property
    def num_samples(self) -> int:
        """How many are looked at."""
        return min(len(self.samples), self.max_samples or len(self.samples))

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        good, faults, digests, pictures = [], [], [], []
        for index in self._indices(number):
            try:
                sample = self.samples[index]
                digests.append(_digest(sample))
                pictures.append(self.prepare(sample["image"]))
                good.append({name: value for name, value in sample.items() if name != "image"})
            except BadSample as error:
                digests.append(_digest({"key": error.key}))
                faults.append(Fault(error.key, error.reason, index))
            except InputError as error:  # the picture is damaged
                faults.append(Fault(str(sample.get("key", index)), str(error), index))
        stacked = stack_uint8(pictures) if pictures else torch.empty(0, 3, *self.processor.size, dtype=torch.uint8)
        return Batch(stacked, good, torch.stack(digests), faults)

    def prepare(self, image: bytes) -> Image.Image:
        """Read a picture and bring it to size, 8-bit RGB."""
        return self.processor.preprocess(image, self.resize)

    def batches(self, numbers: range | None = None, num_workers: int = 0) -> Iterable[Batch]:
        """Some batches, or all, in order; as many as its length says.

        Args:
            numbers: of the batches.
            num_workers: processes that decode; 0 decodes in this one.
        """
        numbers = range(len(self)) if numbers is None else numbers
        workers = min(num_workers, len(numbers))
        own = torch.Generator()  # or it draws from the one that a training goes on with
        return FromWorkers(self, workers, numbers, generator=own)

    def digests(self, numbers: range) -> Tensor:
        """The digests (M, 16) of some batches' samples, which are read and not decoded."""
        found = []
        for index in (i for number in numbers for i in self._indices(number)):
            try:
                found.append(_digest(self.samples[index]))
            except BadSample as error:
                found.append(_digest({"key": error.key}))
        return _joined([digest[None] for digest in found])

    def my_share(self) -> range:
        """The numbers of this rank's batches."""
        return range(rank() * len(self) // world_size(), (rank() + 1) * len(self) // world_size())

    def _indices(self, number: int) -> list[int]:
        """Of a batch's samples."""
        first = number * self.batch_size
        places = range(first, min(first + self.batch_size, self.num_samples))
        return [i * len(self.samples) // self.num_samples for i in places]

    def describe(self) -> dict[str, Any]:
        """What was done to the pictures, for the record."""
        height, width = self.processor.size
        how = f"the short side to {self.processor.resize} pixels, the middle {height} × {width}"
        if self.resize == "squash":
            how = f"the whole picture to {height} × {width} pixels, whatever its aspect"
        name = Image.Resampling(self.processor.resample).name.lower()
        return {"resize": self.resize, "pictures": f"{how}, {name}", "batch_size": self.batch_size}


@dataclass(frozen=True)
class Columns:
    """What was found, a row for each picture.

    Attributes:
        values: name → (n, ...), on the CPU.
        digests: (m, 16) uint8, of all samples, also those that could not be used.
        faults: those, n + len(faults) = m.
    """

    values: dict[str, Tensor]
    digests: Tensor
    faults: list[Fault]

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def __len__(self) -> int:
        return len(self.digests) - len(self.faults)

    def data_hash(self) -> str:
        """Of all samples' keys, bytes and words in their order: 16 hexadecimal digits."""
        return data_hash(self.digests)

    def means(self) -> dict[str, float]:
        """The mean of every column of one number a picture.

        Raises:
            InputError: a picture could not be used.
        """
        if self.faults:
            raise InputError(f"{self.faults[0].key}: {self.faults[0].reason}")
        return {name: float(rows.double().mean()) for name, rows in self.values.items() if rows.ndim == 1}


@torch.no_grad()
def collect(batches: Iterable[Batch], score: Callable[[Batch], dict[str, Tensor]]) -> Columns:
    """Look at every batch.

    Args:
        batches: of this process.
        score: gives named rows (B, ...) of a batch that is not empty.
    """
    rows: list[dict[str, Tensor]] = []
    digests: list[Tensor] = []
    faults: list[Fault] = []
    for batch in batches:
        digests.append(batch.digests)
        faults += batch.faults
        if batch.samples:
            rows.append({name: value.cpu() for name, value in score(batch).items()})
    return Columns(_stacked(rows), _joined(digests), faults)


def gather(columns: Columns) -> Columns:
    """The rows of all ranks in the order of the data; all must call it.

    Raises:
        InputError: no picture could be used; names one.
    """
    parts = gather_objects(columns)
    faults = [fault for part in parts for fault in part.faults]
    joined = Columns(_stacked([p.values for p in parts if p.values]), _joined([p.digests for p in parts]), faults)
    if not len(joined):
        raise InputError(
            f"not one of {len(faults):,} pictures can be used; the first: {faults[0].key}: {faults[0].reason}"
        )
    return joined


def gather_objects(part: T) -> list[T]:
    """What each rank has, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [part]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, part)
    return parts


def data_hash(digests: Tensor) -> str:
    """A hash of the samples' digests (M, 16) in their order."""
    return hashlib.sha256(digests.numpy().tobytes()).hexdigest()[:16]


def with_captions(sample: dict[str, Any]) -> list[str]:
    """All captions of a sample; none where it has none."""
    return [sample["caption"]] if "caption" in sample else list(sample.get("captions", ()))


def _digest(sample: dict[str, Any]) -> Tensor:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    words = with_captions(sample)
    for field in (str(sample.get("key", "")), sample.get("image", b""), str(sample.get("label", "")), *words):
        field = field.encode("utf-8", "surrogatepass") if isinstance(field, str) else field
        digest.update(len(field).to_bytes(8, "little") + field)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in (rows[0] if rows else ())}


def _joined(digests: list[Tensor]) -> Tensor:
    return torch.cat(digests) if digests else torch.empty(0, DIGEST_BYTES, dtype=torch.uint8)
