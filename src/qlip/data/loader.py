"""From samples to training batches, in an order that depends on (seed, epoch, sample) alone.

1. `order`: epoch e visits the samples in the permutation that (seed, e) draws; an incomplete last batch
is dropped.
2. `TrainingSet`: sample i in epoch e is decoded and augmented by a generator seeded with (seed, e, i).
3. `batches`: endless batches from any step on, so that a resumed run sees what the first would have.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
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
    """Samples decoded, augmented and captioned; indexed by (epoch, sample)."""

    def __init__(self, samples: Sequence[dict], transform: Transform, caption: Caption, seed: int):
        """Hold the samples.

        Args:
            samples: dicts with `image` bytes, `key`, and `label` or `caption`.
            transform: encoded bytes and a generator → (3, H, W) float tensor.
            caption: sample and a generator → its words.
            seed: of the augmentation.
        """
        self.samples, self.transform, self.caption, self.seed = samples, transform, caption, seed

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        epoch, i = index
        rng = np.random.default_rng((self.seed, epoch, i))
        sample = self.samples[i]
        caption = self.caption(sample, rng)
        return {
            "pixel_values": self.transform(sample["image"], rng),
            "caption": caption,
            "group": sample["label"] if "label" in sample else _stable_hash(caption),
            "key": sample["key"],
        }


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
    dataset: TrainingSet, tokenize: Tokenize, batch_size: int, start_step: int = 0, num_workers: int = 0
) -> Iterator[dict[str, Any]]:
    """Endless training batches.

    Yields:
        pixel_values (B,3,H,W), input_ids and attention_mask (B,S), cut to the longest caption; group (B,)
        int64, equal for samples whose captions mean the same; keys, a list of B strings.
    """

    def collate(samples: list[dict]) -> dict[str, Any]:
        input_ids, attention_mask = tokenize([s["caption"] for s in samples])
        longest = int(attention_mask.sum(1).max())
        return {
            "pixel_values": torch.stack([s["pixel_values"] for s in samples]),
            "input_ids": input_ids[:, :longest],
            "attention_mask": attention_mask[:, :longest],
            "group": torch.tensor([s["group"] for s in samples]),
            "keys": [s["key"] for s in samples],
        }

    loader: DataLoader = DataLoader(
        dataset,
        batch_sampler=order(len(dataset.samples), batch_size, dataset.seed, start_step),
        collate_fn=collate,
        num_workers=num_workers,
    )
    yield from loader


def _stable_hash(text: str) -> int:
    """63 bits of a hash that is the same in every process (Python's own is salted)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
