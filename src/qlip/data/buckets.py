"""Training at several sizes: a batch is of one of them, and a sample goes where the aspect is nearest to its own.

An epoch visits the samples in the permutation that `qlip.data.loader.order` draws. Each goes into the tray of its
bucket, and a full tray is the next batch; those that are not full at the end are dropped. So the order depends on
(seed, epoch) alone, and with one bucket it is that of `order`.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from qlip.data.delivery import FromWorkers
from qlip.errors import InputError
from qlip.image_files import image_size

logger = logging.getLogger("qlip")

Size = tuple[int, int]

MEASURED_AT_ONCE = 256


@dataclass(frozen=True)
class Buckets:
    """Which size each sample is trained at.

    Attributes:
        sizes: height and width of every bucket, in pixels.
        bucket: (samples,) for each sample the number of its own.
    """

    sizes: tuple[Size, ...]
    bucket: np.ndarray

    @classmethod
    def measure(cls, samples: Sequence[dict[str, Any]], sizes: Sequence[Size], num_workers: int = 0) -> "Buckets":
        """Read the header of every picture once.

        Args:
            samples: dicts with `image` bytes. One that cannot be read counts as a square; it is for whoever asks
                for it to learn what is wrong.
            sizes: height and width of every bucket, in pixels.
            num_workers: processes that read.
        """
        starts = range(0, len(samples), MEASURED_AT_ONCE)
        parts = FromWorkers(partial(_sizes, samples), num_workers, starts)
        bucket = assign([size for part in parts for size in part], sizes)
        counts = zip(sizes, np.bincount(bucket, minlength=len(sizes)), strict=True)
        logger.info("buckets: %s", ", ".join(f"{count:,} of {h} x {w}" for (h, w), count in counts))
        return cls(tuple(sizes), bucket)

    def size(self, index: int) -> Size:
        """Height and width of a sample's bucket, in pixels."""
        return self.sizes[self.bucket[index]]

    def order(self, batch_size: int, seed: int, start_step: int = 0) -> Iterator[list[tuple[int, int]]]:
        """Endless batches of (epoch, sample), each of one bucket, from batch number `start_step` on.

        Raises:
            InputError: a bucket has samples, but fewer than one batch; or there are none at all.
        """
        counts = np.bincount(self.bucket, minlength=len(self.sizes))
        for (height, width), count in zip(self.sizes, counts, strict=True):
            if count < batch_size and (count or not len(self.bucket)):
                raise InputError(
                    f"the {count} samples of the bucket {height} x {width} do not fill a batch of {batch_size}: "
                    "leave the bucket out, or lower batch_size"
                )
        epoch, skip = divmod(start_step, int(sum(counts // batch_size)))
        while True:
            batches = self._epoch(np.random.default_rng((seed, epoch)).permutation(len(self.bucket)), batch_size)
            yield from ([(epoch, i) for i in batch] for k, batch in enumerate(batches) if k >= skip)
            epoch, skip = epoch + 1, 0

    def _epoch(self, permutation: np.ndarray, batch_size: int) -> Iterator[list[int]]:
        trays: list[list[int]] = [[] for _ in self.sizes]
        for i in permutation.tolist():
            tray = trays[self.bucket[i]]
            tray.append(i)
            if len(tray) == batch_size:
                yield list(tray)
                tray.clear()


def assign(pictures: Sequence[Size], sizes: Sequence[Size]) -> np.ndarray:
    """The bucket whose aspect is nearest to each picture's, by ratio; of two as near, the first.

    Args:
        pictures: height and width of N pictures.
        sizes: height and width of the buckets.

    Returns:
        (N,) numbers of buckets.
    """
    theirs, ours = (np.log(np.array(x, dtype=float).reshape(-1, 2)) @ [1, -1] for x in (pictures, sizes))
    return np.abs(theirs[:, None] - ours).argmin(1)


def _sizes(samples: Sequence[dict[str, Any]], start: int) -> list[Size]:
    """Of `MEASURED_AT_ONCE` samples."""
    return [_size(samples, i) for i in range(start, min(start + MEASURED_AT_ONCE, len(samples)))]


def _size(samples: Sequence[dict[str, Any]], index: int) -> Size:
    try:
        return image_size(samples[index]["image"])
    except Exception:  # Pillow raises almost anything on a damaged file; it is skipped when its turn comes
        return 1, 1
