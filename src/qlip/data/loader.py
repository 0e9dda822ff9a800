"""From samples to training batches, in an order that depends on (seed, epoch, sample) alone.

1. `order`: epoch e visits the samples in the permutation that (seed, e) draws; an incomplete last batch
is dropped.
2. `TrainingSet`: sample i in epoch e is decoded and augmented by a generator seeded with (seed, e, i).
3. `batches`: endless batches from any step on, so that a resumed run sees what the first would have.
"""

import hashlib
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qlip.errors import InputError

Transform = Callable[[bytes, np.random.Generator], Tensor]
Caption = Callable[[dict[str, Any], np.random.Generator], str]
Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]


class TrainingSet(Dataset):
    """Samples decoded, augmented and captioned; indexed by (epoch, sample).

    Samples of one group say the same: those with the same (first) caption of their own, else those with the same
    label, whichever caption or name was drawn. Two labels that share a name stay apart.
    """

    def __init__(self, samples: Sequence[dict], transform: Transform, caption: Caption | None, seed: int):
        """Hold the samples.

        Args:
            samples: dicts with `image` bytes, `key`, and `label`, `caption` or `captions`.
            transform: encoded bytes and a generator → (3, H, W) float tensor.
            caption: sample and a generator → its words; None: pictures alone.
            seed: of the augmentation.
        """
        self.samples, self.transform, self.caption, self.seed = samples, transform, caption, seed

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        epoch, i = index
        rng = np.random.default_rng((self.seed, epoch, i))
        sample = self.samples[i]
        words: dict[str, Any] = {}
        if self.caption is not None:
            caption = self.caption(sample, rng)
            own = sample.get("captions", [sample.get("caption")])[0]
            group = sample["label"] if own is None else _stable_hash(own)
            words = {"caption": caption, "group": group}
        try:
            pixels = self.transform(sample["image"], rng)
        except InputError as error:
            raise InputError(f"{sample['key']}: {error}") from error
        return {"pixel_values": pixels, "key": sample["key"]} | words


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
) -> Iterator[dict[str, Any]]:
    """Endless training batches, or this rank's share of them: equal parts, in the order of ranks.

    A worker makes a share in `num_parts` pieces, so that those made ahead are small.

    Yields:
        pixel_values (B,3,H,W); keys, a list of B strings; with `tokenize` also input_ids and attention_mask (B,S),
        cut to the longest caption, and group (B,) int64, equal for samples whose captions mean the same.

    Raises:
        InputError: a sample has no words, or its picture cannot be read; names the sample.
    """
    share = batch_size // world_size
    size = share // num_parts
    first = rank * share
    loader: DataLoader = DataLoader(
        _Batches(dataset, tokenize),
        sampler=(
            indices[start : start + size]
            for indices in order(len(dataset.samples), batch_size, dataset.seed, start_step)
            for start in range(first, first + share, size)
        ),
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=_outlive_sigterm,
    )
    parts = []
    for part in loader:
        if isinstance(part, InputError):
            raise part
        parts.append(part)
        if len(parts) == num_parts:
            yield _joined(parts)
            parts = []


def _outlive_sigterm(worker: int) -> None:
    """A signal to all processes of a group is for the training to answer, which needs its workers until then."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


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
        batch: dict[str, Any] = {
            "pixel_values": torch.stack([s["pixel_values"] for s in samples]),
            "keys": [s["key"] for s in samples],
        }
        if self.tokenize is None:
            return batch
        input_ids, attention_mask = self.tokenize([s["caption"] for s in samples])
        return batch | {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "group": torch.tensor([s["group"] for s in samples]),
        }


def _stable_hash(text: str) -> int:
    """63 bits of a hash that is the same in every process (Python's own is salted)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
