"""From samples to training batches.

1. A source gives samples by number (`qlip.data.sources`); what is remote gives them from front to back
(`qlip.data.stream`).
2. `order`: epoch e visits the samples in the permutation that (seed, e) draws; an incomplete last batch
is dropped. Of a stream it is the shards that are permuted, and a buffer that is shuffled.
3. Each rank makes its share of a batch; its workers make the batches in turn.
4. `TrainingSet`: sample i in epoch e is decoded, augmented and captioned by a generator seeded with (seed, e, i).
In the place of one that cannot be used comes another, drawn from (seed, e, i) as well. So a batch depends on the
seed and its number alone, not on workers, ranks or interruptions.
5. `batches`: endless batches from any step on, so that a resumed run sees what the first would have: exactly from
the next sample on. A stream goes on with the shards that were not read out: exactly to the shard.
6. `Journal`: lists what was skipped, ends the run where it is too much, and keeps a stream's place.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from qlip.data.buckets import Buckets, Size
from qlip.data.delivery import FromWorkers
from qlip.data.journal import Journal
from qlip.data.samples import BadSample, Fault
from qlip.data.stream import Reader, Stream
from qlip.data.teacher import TeacherFiles
from qlip.data.workers import outlive_signals
from qlip.errors import InputError

Transform = Callable[..., Tensor]
Caption = Callable[[dict[str, Any], np.random.Generator], str]
Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]

MOST_IN_A_ROW = 100  # samples that cannot be used, before it is taken to be all of them


class TrainingSet(Dataset):
    """Samples decoded, augmented and captioned; indexed by (epoch, sample).

    Samples of one group say the same: those with captions of their own and the same `concept`, or without one the
    same (first) caption; else those with the same label. It does not matter which caption or name was drawn. Two
    labels that share a name stay apart.
    """

    def __init__(
        self,
        samples: Sequence[dict] | Stream,
        transform: Transform,
        caption: Caption | None,
        seed: int,
        buckets: Buckets | None = None,
        teacher: TeacherFiles | None = None,
    ):
        """Hold the samples.

        Args:
            samples: dicts with `image` bytes, `key`, and `label`, `caption` or `captions`.
            transform: encoded bytes, a generator and, with buckets, `size` → (3, H, W) float tensor.
            caption: sample and a generator → its words; None: pictures alone.
            seed: of order and augmentation.
            buckets: the size of each sample, where they are not all of one; not of a stream.
            teacher: features of the whole images, whatever part of them is cropped.
        """
        self.samples, self.transform, self.caption, self.seed = samples, transform, caption, seed
        self.buckets, self.teacher = buckets, teacher

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        """Sample i in epoch e, or another in its place; with `faults`, what could not be used.

        Raises:
            InputError: 100 in a row cannot be used.
        """
        assert not isinstance(self.samples, Stream)
        faults: list[Fault] = []
        _, i = index
        size = self.buckets.size(i) if self.buckets else None  # of the batch, whatever comes in the sample's place
        rng = np.random.default_rng((self.seed, *index))
        for attempt in range(1, MOST_IN_A_ROW + 1):
            try:
                return self.make(self.samples[i], rng, size) | {"faults": faults}
            except BadSample as error:
                faults.append(Fault(error.key, error.reason, i))
            rng = np.random.default_rng((self.seed, *index, attempt))
            i = int(rng.integers(len(self.samples)))
        raise _none_good(faults[0])

    def order(self, batch_size: int, start_step: int) -> Iterator[list[tuple[int, int]]]:
        """Endless batches of (epoch, sample), from batch number `start_step` on."""
        if self.buckets:
            return self.buckets.order(batch_size, self.seed, start_step)
        assert not isinstance(self.samples, Stream)
        return order(len(self.samples), batch_size, self.seed, start_step)

    def make(self, sample: dict[str, Any], rng: np.random.Generator, size: Size | None = None) -> dict[str, Any]:
        """What a batch has of a sample: pixel_values, key, and what `caption` and `teacher` have to say.

        Raises:
            BadSample: it has no words, or its picture cannot be read.
        """
        words: dict[str, Any] = {}
        if self.caption is not None:
            caption = self.caption(sample, rng)
            own = sample.get("captions", [sample.get("caption")])[0]
            group = sample["label"] if own is None else _stable_hash(str(sample.get("concept", own)))
            words = {"caption": caption, "group": group}
        try:
            sized = {"size": size} if size else {}
            pixels = self.transform(sample["image"], rng, **sized)
        except InputError as error:
            raise BadSample(sample["key"], error) from error
        features = self.teacher.find(sample["image"]) if self.teacher is not None else {}
        return {"pixel_values": pixels, "key": sample["key"]} | words | features

    def collate(self, samples: list[dict[str, Any]], tokenize: Tokenize | None) -> dict[str, Any]:
        """What `make` gave of several samples, as a batch; see `batches`."""
        tensors = [name for name, value in samples[0].items() if isinstance(value, Tensor)]
        batch: dict[str, Any] = {name: torch.stack([sample[name] for sample in samples]) for name in tensors}
        batch["keys"] = [sample["key"] for sample in samples]
        if tokenize is None:
            return batch
        input_ids, attention_mask = tokenize([sample["caption"] for sample in samples])
        group = torch.tensor([sample["group"] for sample in samples])
        return batch | {"input_ids": input_ids, "attention_mask": attention_mask, "group": group}


def order(num_samples: int, batch_size: int, seed: int, start_step: int = 0) -> Iterator[list[tuple[int, int]]]:
    """Endless batches of (epoch, sample), from batch number `start_step` on.

    Raises:
        InputError: fewer samples than one batch.
    """
    per_epoch = num_samples // batch_size
    if per_epoch == 0:
        raise InputError(f"{num_samples} samples do not fill a batch of {batch_size}: lower batch_size")
    epoch, skip = divmod(start_step, per_epoch)
    while True:
        permutation = np.random.default_rng((seed, epoch)).permutation(num_samples)
        for k in range(skip, per_epoch):
            yield [(epoch, int(i)) for i in permutation[k * batch_size : (k + 1) * batch_size]]
        epoch, skip = epoch + 1, 0


def batches(
    dataset: TrainingSet,
    tokenize: Tokenize | None,
    batch_size: int,
    start_step: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_parts: int = 1,
    journal: Journal | None = None,
) -> Iterator[dict[str, Any]]:
    """Endless training batches, or this rank's share of them: equal parts, in the order of ranks.

    A worker makes a share in `num_parts` pieces, so that those made ahead are small. Without a journal the first
    sample that cannot be used is an error, and a stream begins anew.

    Yields:
        pixel_values (B,3,H,W); keys, a list of B strings; with `tokenize` also input_ids and attention_mask (B,S),
        cut to the longest caption, and group (B,) int64, equal for samples whose captions mean the same; with a
        teacher what `TeacherFiles.find` gives of each sample.

    Raises:
        InputError: too many samples have no words, or a picture that cannot be read; names one.
    """
    share = batch_size // world_size
    size = share // num_parts
    journal = journal or Journal(dataset.samples)
    make = partial(FromWorkers, num_workers=num_workers, worker_init_fn=outlive_signals)
    position = journal.position(start_step)
    if isinstance(dataset.samples, Stream):
        stream = _StreamedBatches(dataset, tokenize, size, position, rank, world_size)
        loader = make(stream)
    else:
        first = rank * share
        loader = make(
            _Batches(dataset, tokenize),
            sampler=(
                indices[start : start + size]
                for indices in dataset.order(batch_size, start_step)
                for start in range(first, first + share, size)
            ),
        )
    step, parts = start_step, []
    positions = dict.fromkeys(range(max(1, num_workers)), position)
    for part in loader:
        if isinstance(part, InputError):
            raise part
        journal.skip(part.pop("faults"), step * batch_size)
        if "position" in part:
            positions |= part.pop("position")
        parts.append(part)
        if len(parts) == num_parts:
            step += 1
            if isinstance(dataset.samples, Stream):
                journal.move(step, min(positions.values()))
            yield _joined(parts)
            parts = []


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch of its pieces, texts cut to the longest."""
    batch: dict[str, Any] = {"keys": [key for part in parts for key in part["keys"]]}
    for name in parts[0].keys() - batch.keys():
        batch[name] = torch.cat([part[name] for part in parts]) if len(parts) > 1 else parts[0][name]
    if "attention_mask" in batch:
        longest = int(batch["attention_mask"].sum(1).max())
        batch |= {name: batch[name][:, :longest] for name in ("input_ids", "attention_mask")}
    return batch


@dataclass(frozen=True)
class _Batches(Dataset):
    """Whole batches, indexed by what `order` gives; pickles, so that workers of any start method can have it."""

    dataset: TrainingSet
    tokenize: Tokenize | None

    def __getitem__(self, indices: list[tuple[int, int]]) -> dict[str, Any] | InputError:
        try:
            samples = [self.dataset[index] for index in indices]
        except InputError as error:
            return error  # raised in a worker, it would come back as a traceback of many lines
        return self.dataset.collate(samples, self.tokenize) | {
            "faults": [f for sample in samples for f in sample["faults"]]
        }


@dataclass(frozen=True)
class _StreamedBatches(IterableDataset):
    """Batches of a stream from a position on; each worker of each rank reads shards of its own."""

    dataset: TrainingSet
    tokenize: Tokenize | None
    size: int
    position: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[dict[str, Any] | InputError]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        number, num_readers = self.rank * num_workers + worker, self.world_size * num_workers
        stream, seed = self.dataset.samples, self.dataset.seed
        assert isinstance(stream, Stream)
        reader = Reader(stream, seed, self.position, number, num_readers)
        samples: list[dict[str, Any]] = []
        faults: list[Fault] = []
        in_a_row = 0
        try:
            for item in reader:
                if isinstance(item, Fault):
                    faults.append(item)
                    continue
                try:
                    rng = np.random.default_rng((seed, item.position, item.number))
                    samples.append(self.dataset.make(item.read(), rng))
                    in_a_row = 0
                except BadSample as error:
                    faults.append(Fault(error.key, error.reason))
                    in_a_row += 1
                    if in_a_row == MOST_IN_A_ROW:
                        raise _none_good(faults[-1]) from None
                if len(samples) == self.size:
                    batch = self.dataset.collate(samples, self.tokenize)
                    yield batch | {"faults": faults, "position": {worker: reader.position}}
                    samples, faults = [], []
        except InputError as error:
            yield error


def _none_good(fault: Fault) -> InputError:
    return InputError(
        f"{fault.key}: {fault.reason}; and so it is with {MOST_IN_A_ROW} samples in a row: look at them with "
        "`qlip data check`"
    )


def _stable_hash(text: str) -> int:
    """63 bits of a hash that is the same in every process (Python's own is salted)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
