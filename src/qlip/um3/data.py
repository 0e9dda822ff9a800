"""Batches of packed rows for a unified model, each a function of seed and step alone (`qlip.um3.mix`)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from qlip.data.delivery import FromWorkers
from qlip.data.journal import Journal
from qlip.data.samples import Fault
from qlip.data.workers import outlive_signals
from qlip.errors import InputError
from qlip.um3.config import FRAME, UM3Config
from qlip.um3.layout import image_to_text, text_to_image
from qlip.um3.mix import KINDS, MixConfig, Plan, RowPlan
from qlip.um3.sources import Pictures, Text


@dataclass(frozen=True)
class DataSources:
    """What there is to mix.

    Attributes:
        text: documents; None if the mix has none.
        pictures: with captions; None if the mix has none.
    """

    text: Text | None
    pictures: Pictures | None

    def check(self, mix: MixConfig) -> None:
        """Whether there is something of everything that the mix has.

        Raises:
            InputError: there is not; says which option names it.
        """
        for kind, source, option in (
            (KINDS[0], self.text, "--text"),
            (KINDS[1], self.pictures, "--tokens"),
            (KINDS[2], self.pictures, "--tokens"),
        ):
            if source is None and mix.uses(kind):
                remedy = ", or weigh it 0" if kind == KINDS[0] else ""  # it cannot do without pictures
                raise InputError(
                    f"the mix has a weight for {kind}, but there is none: name it with {option}{remedy}"
                )


class Batches(Dataset):
    """A rank's share of every batch, by the step's number, from 0. Pickles, for worker processes."""

    def __init__(
        self,
        sources: DataSources,
        mix: MixConfig,
        config: UM3Config,
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        """Plan them.

        Args:
            sources: what there is.
            mix: how much of what.
            config: the model's.
            sequence_length: T.
            batch_size: B, rows of a step, over all processes.
            seed: of the order and of what is drawn.
            rank: of this process.
            world_size: number of processes, which divides B.

        Raises:
            InputError: a source is missing, a row has no room for a picture, or B cannot be shared.
        """
        sources.check(mix)
        if batch_size % world_size:
            raise InputError(f"batch_size {batch_size} is not divisible by the {world_size} processes")
        longest = sources.pictures.max_caption_tokens if sources.pictures else 0
        room = config.num_image_tokens + FRAME + longest
        self.plan = Plan(mix, batch_size, sequence_length + 1, room, seed)
        self.sources, self.config, self.seed = sources, config, seed
        share = batch_size // world_size
        self.own = slice(rank * share, (rank + 1) * share)

    def __getitem__(self, step: int) -> dict[str, Any] | InputError:
        """The rank's rows of a step, or what is wrong with them.

        Returns:
            `input_ids` and `document_ids` (B/W, T+1) int64, 0 being no document; `num_tokens` (B/W, 3) int64, how
            many tokens are of each of `KINDS`; `keys`, a word for each row on what is in it; `faults`, images that
            could not be used.
        """
        faults: list[Fault] = []
        try:
            rows = [self._row(plan, faults) for plan in self.plan.rows(step)[self.own]]
        except InputError as error:
            return error  # raised in a worker, it would come back as a traceback of many lines
        input_ids, document_ids, num_tokens, keys = zip(*rows, strict=True)
        return {
            "input_ids": torch.from_numpy(np.stack(input_ids)),
            "document_ids": torch.from_numpy(np.stack(document_ids)),
            "num_tokens": torch.tensor(num_tokens),
            "keys": list(keys),
            "faults": faults,
        }

    def _row(self, plan: RowPlan, faults: list[Fault]) -> tuple[np.ndarray, np.ndarray, list[int], str]:
        documents, num_tokens, keys = self._pictures(plan, faults), [0] * len(KINDS), []
        for key, kind, document in documents:
            num_tokens[kind] += len(document)
            keys.append(key)
        pieces = [np.array(document, np.int64) for _, _, document in documents]
        if plan.text_length and self.sources.text:
            pieces += self.sources.text.window(plan.text_start, plan.text_length, self.seed)
            num_tokens[0] += plan.text_length
            keys.append(f"text at {plan.text_start}")
        return *pack(pieces, self.plan.row_length), num_tokens, " + ".join(keys)

    def _pictures(self, plan: RowPlan, faults: list[Fault]) -> list[tuple[str, int, list[int]]]:
        """Key, kind and ids of each picture of a row."""
        if not plan.pictures or (source := self.sources.pictures) is None:
            return []
        places = [divmod(number, len(source)) for number in plan.pictures]
        indices = [int(_permutation(len(source), self.seed, epoch)[place]) for epoch, place in places]
        found = source.read(indices, [(self.seed, number) for number in plan.pictures], faults)
        documents = []
        for (key, tokens, caption), drawn in zip(found, plan.drawn, strict=True):
            if drawn:
                documents.append((key, 2, text_to_image(caption, tokens, self.config)))
            else:
                documents.append((key, 1, image_to_text(tokens, caption, self.config)))
        return documents


def training_batches(
    batches: Batches, start_step: int = 0, num_workers: int = 0, journal: Journal | None = None
) -> Iterator[dict[str, Any]]:
    """Endless batches from a step on, counted from 0; see `Batches`.

    Without a journal, which notes what is skipped, the first image that cannot be used is an error.

    Raises:
        InputError: too many images have no words, or data cannot be read.
    """
    journal = journal or Journal(batches.sources.pictures or ())  # type: ignore[arg-type]  # its length is what counts
    for batch in FromWorkers(batches, num_workers, count(start_step), worker_init_fn=outlive_signals):
        if isinstance(batch, InputError):
            raise batch
        journal.skip(batch.pop("faults"))
        yield batch


def pack(documents: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents one after the other → ids and document numbers from 1, (length,) each; 0 where nothing is left.

    Raises:
        InputError: they are longer than the row.
    """
    total = sum(map(len, documents))
    if total > length:
        raise InputError(f"documents of {total} tokens do not fit a row of {length}: raise sequence_length")
    rest = length - total
    numbers = np.repeat(np.arange(1, len(documents) + 1), [len(document) for document in documents])
    ids = np.concatenate([*documents, np.zeros(rest, np.int64)])
    return ids, np.concatenate([numbers, np.zeros(rest, np.int64)])


@lru_cache(maxsize=4)
def _permutation(num_pictures: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_pictures)
