"""Reading what is to be tokenized, in worker processes: batches of `pixel_values` and what else is kept.

A shard of tokens is a *piece* of a unit: `shard_rows` of its samples. Batches begin anew with each piece, so that
what they hold depends on the source alone, and not on workers, processes, or where an earlier run ended.

Of data with numbers the workers read batch after batch; of remote shards each worker reads its own from front to
back, since that is all one can do with them.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from qlip.data.delivery import FromWorkers
from qlip.data.samples import BadSample, Fault, readable
from qlip.data.stream import Read, SampleRange, read_on
from qlip.errors import InputError
from qlip.eval.batches import with_captions
from qlip.jobs.pictures import parts_of
from qlip.jobs.tokens_source import Unit
from qlip.model.image import ImageProcessor, Resize


@dataclass(frozen=True)
class Batch:
    """Neighbours of one piece.

    Attributes:
        unit: its number.
        piece: its number in the unit.
        pixel_values: (B, 3, H, W) float32, normalised; B may be 0, if none could be read.
        keys: B.
        kept: columns of B values.
        num_samples: that the batch is of, those that could not be used included.
        faults: these.
        partly: how many images are not seen whole, by what is seen of them.
        ends_piece: whether it is the piece's last.
        ends_unit: whether it is the unit's last.
    """

    unit: int
    piece: int
    pixel_values: Tensor
    keys: list[str]
    kept: dict[str, list[Any]]
    num_samples: int
    faults: list[Fault]
    partly: Counter[str]
    ends_piece: bool
    ends_unit: bool


@dataclass(frozen=True)
class Lost:
    """A unit that cannot be read to its end.

    Attributes:
        unit: its number.
        fault: why.
    """

    unit: int
    fault: Fault


@dataclass(frozen=True)
class Preparer:
    """How samples become batches.

    Attributes:
        processor: of the model.
        keep: columns to keep: "caption" (the first where there are several), "captions", "label".
        batch_size: samples of a batch.
        shard_rows: samples of a piece.
        resize: see `ImageProcessor.preprocess`.
    """

    processor: ImageProcessor
    keep: Sequence[str]
    batch_size: int
    shard_rows: int
    resize: Resize = "crop"

    def batches(
        self, units: Sequence[Unit], first_pieces: Sequence[int], num_workers: int
    ) -> Iterable[Batch | Lost]:
        """Read units.

        Args:
            units: all of samples with numbers, each no longer than a piece, or all of a stream.
            first_pieces: how many pieces of each are done.
            num_workers: processes that decode; 0: this one.
        """
        ranges = [unit.samples for unit in units if isinstance(unit.samples, SampleRange)]
        if len(ranges) == len(units) and all(r.stop - r.start <= self.shard_rows for r in ranges):
            data = _Numbered(self, units)
            workers = num_workers if len(data) > 1 else 0
            return FromWorkers(data, workers, range(len(data)))
        streamed = _Streamed(self, units, first_pieces)
        return FromWorkers(streamed, min(num_workers, len(units)))

    def batch(self, found: Iterable[dict[str, Any] | Fault], **place: Any) -> Batch:
        """Decode samples."""
        pixel_values: list[Tensor] = []
        keys: list[str] = []
        rows: list[list[Any]] = []
        faults: list[Fault] = []
        partly: Counter[str] = Counter()
        for sample in found:
            if isinstance(sample, Fault):
                faults.append(sample)
                continue
            try:
                image = self.processor.preprocess(sample["image"], self.resize)
                pixel_values.append(self.processor.normalize(image))
                partly.update(parts_of(image))
            except InputError as error:
                faults.append(Fault(sample["key"], str(error)))
                continue
            keys.append(sample["key"])
            rows.append([_kept(sample, name) for name in self.keep])
        stacked = torch.stack(pixel_values) if pixel_values else torch.empty(0, 3, *self.processor.size)
        kept = {name: [row[i] for row in rows] for i, name in enumerate(self.keep)}
        return Batch(
            pixel_values=stacked,
            keys=keys,
            kept=kept,
            num_samples=len(keys) + len(faults),
            faults=faults,
            partly=partly,
            **place,
        )


@dataclass(frozen=True)
class _Numbered(Dataset):
    """All batches of units that are a piece each, by number."""

    preparer: Preparer
    units: Sequence[Unit]

    @cached_property
    def _ends(self) -> list[int]:
        """The numbers at which the units' batches end."""
        return list(accumulate(-(-len(_indices(unit)) // self.preparer.batch_size) for unit in self.units))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> Batch:
        which = bisect_right(self._ends, number)
        unit, size = self.units[which], self.preparer.batch_size
        start = (number - (self._ends[which - 1] if which else 0)) * size
        indices = _indices(unit)
        ends_unit = start + size >= len(indices)
        assert isinstance(unit.samples, SampleRange)
        found = readable(unit.samples.samples, indices[start : start + size])
        return self.preparer.batch(found, unit=unit.number, piece=0, ends_piece=ends_unit, ends_unit=ends_unit)


@dataclass(frozen=True)
class _Streamed(IterableDataset):
    """The batches of streamed units; each worker reads units of its own."""

    preparer: Preparer
    units: Sequence[Unit]
    first_pieces: Sequence[int]

    def __iter__(self) -> Iterator[Batch | Lost]:
        info = get_worker_info()
        mine = slice(info.id, None, info.num_workers) if info else slice(None)
        for unit, first_piece in list(zip(self.units, self.first_pieces, strict=True))[mine]:
            try:
                yield from self._batches(unit, first_piece)
            except InputError as error:
                yield Lost(unit.number, Fault(unit.samples.name, str(error), is_file=True))

    def _batches(self, unit: Unit, first_piece: int) -> Iterator[Batch]:
        rows, size = self.preparer.shard_rows, self.preparer.batch_size
        found: list[dict[str, Any] | Fault] = []
        done = first_piece * rows
        number = done - 1
        for number, (read, is_last) in enumerate(_with_last(read_on(unit.samples, done)), done):
            try:
                found.append(read())
            except BadSample as error:
                found.append(Fault(error.key, error.reason))
            piece, place = divmod(number, rows)
            ends_piece = is_last or place == rows - 1
            if ends_piece or len(found) == size:
                yield self.preparer.batch(
                    found, unit=unit.number, piece=piece, ends_piece=ends_piece, ends_unit=is_last
                )
                found = []
        if number < done:
            raise InputError("it has no samples, or fewer than before: replace it")


def _with_last(reads: Iterable[Read]) -> Iterator[tuple[Read, bool]]:
    """Each with whether it is the last."""
    before: Read | None = None
    for read in reads:
        if before is not None:
            yield before, False
        before = read
    if before is not None:
        yield before, True


def _indices(unit: Unit) -> range:
    assert isinstance(unit.samples, SampleRange)
    return range(unit.samples.start, unit.samples.stop)


def _kept(sample: dict[str, Any], name: str) -> Any:
    """The value of a column."""
    if name == "label":
        return sample.get("label")
    captions = with_captions(sample)
    return (captions or None) if name == "captions" else next(iter(captions), None)
