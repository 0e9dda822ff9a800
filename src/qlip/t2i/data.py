"""Token files as a text-to-image model trains on them: sub-tokens, and what each picture is made after."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlip.data.journal import Journal
from qlip.data.loader import MOST_IN_A_ROW
from qlip.data.samples import BadSample, Fault, evenly
from qlip.data.token_dataset import TokenDataset, words_of
from qlip.errors import InputError
from qlip.t2i.condition import FeatureFiles, TextReader
from qlip.t2i.config import T2IConfig
from qlip.t2i.model import pad_left

Reader = TextReader | None  # None: the condition is a label
Sentences = Sequence[Sequence[str]]
"""For each label what may be said of it (`qlip.data.captions.Captioner`), where pictures have no captions."""


def check_columns(dataset: TokenDataset, reader: Reader, sentences: Sentences = ()) -> None:
    """Whether the rows have what the model is conditioned on.

    Raises:
        InputError: they do not.
    """
    wanted = ("label",) if reader is None else ("caption", "captions")
    if reader is not None and sentences and "label" in dataset.columns:
        return
    if not set(wanted) & set(dataset.columns):
        raise InputError(
            f"the token files have no {' or '.join(wanted)}: tokenize again with --keep {wanted[0]}, of data that "
            "has it"
        )


def check_held_out(
    dataset: TokenDataset, reader: Reader, max_pictures: int, sentences: Sentences = (), num_classes: int = 0
) -> None:
    """Whether `held_out` will find what it needs, before a training and not at its first evaluation.

    Raises:
        InputError: a picture has no words or no label below `num_classes`, or words that no feature file has.
    """
    rows = dataset.__getitems__(evenly(len(dataset), max_pictures))
    for i in range(len(rows["key"])):
        _check(rows, i, reader, sentences, num_classes)


def training_batches(
    dataset: TokenDataset,
    reader: Reader,
    dropout: float,
    batch_size: int,
    seed: int = 0,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    sentences: Sentences = (),
    num_classes: int | None = None,
    journal: Journal | None = None,
) -> Iterator[dict[str, Any]]:
    """Endless batches, or this rank's share of them; what is drawn depends on (seed, step) alone.

    A row that cannot be used is replaced by another, drawn from (seed, step) as well, and noted in the journal;
    without one the first such row is an error.

    Yields:
        what `T2I.forward` takes, and `keys`.

    Raises:
        InputError: too many rows have no words or label that the model can be conditioned on.
    """
    journal = journal or Journal(dataset)  # type: ignore[arg-type]  # its length is all that counts
    share = batch_size // world_size
    own = slice(rank * share, (rank + 1) * share)
    batches = dataset.batches(batch_size, seed, start_step, rank, world_size, num_workers)
    for step, rows in enumerate(batches, start_step):
        check = partial(_check, reader=reader, sentences=sentences, num_classes=num_classes)
        journal.skip(_replace(dataset, rows, check, (seed, step, rank)))
        drawn = np.random.default_rng((seed, step)).random((2, batch_size))[:, own]
        yield batch_of(rows, reader, drawn[0], sentences) | {"dropped": torch.from_numpy(drawn[1] < dropout)}


def batch_of(
    rows: dict[str, Any], reader: Reader, choice: np.ndarray | None = None, sentences: Sentences = ()
) -> dict[str, Any]:
    """Some rows of a `TokenDataset` as `T2I.forward` takes them, nothing dropped.

    Args:
        rows: with lists of `key` and some of `label`, `caption`, `captions`.
        reader: what reads captions; None: labels are the condition.
        choice: (B,) in [0, 1), which of several captions; by default the first.
        sentences: said of the labels of pictures without captions.

    Raises:
        InputError: a picture has no words or label; names it.
    """
    choice = np.zeros(len(rows["key"])) if choice is None else choice
    if reader is None:
        conditions = [torch.tensor(_label(rows, i)) for i in range(len(choice))]
    else:
        captions = [_captions(rows, i, sentences) for i in range(len(choice))]
        conditions = reader([some[int(at * len(some))] for some, at in zip(captions, choice, strict=True)])
    condition, lengths = pad_left(conditions)
    return {
        "condition": condition,
        "lengths": lengths,
        "sub_tokens": rows["sub_tokens"],
        "dropped": torch.zeros(len(choice), dtype=torch.bool),
        "keys": rows["key"],
    }


@torch.no_grad()
def held_out(
    model: Any,
    dataset: TokenDataset,
    reader: Reader,
    max_pictures: int,
    batch_size: int = 64,
    sentences: Sentences = (),
) -> dict[str, float]:
    """The negative log-likelihood of pictures that were not trained on.

    Args:
        model: a `T2I`.
        dataset: of its tokenizer and sub-tokens.
        reader: see `batch_of`.
        max_pictures: so many, evenly spread.
        batch_size: at once.
        sentences: see `batch_of`.

    Returns:
        `bits_per_image`, of which a random guess needs all that a picture's tokens have; comparable between widths
        of sub-tokens; and `bits_per_image_unconditional`, without the condition.
    """
    config: T2IConfig = model.config
    indices = evenly(len(dataset), max_pictures)
    count = len(indices)
    total = torch.zeros(2, dtype=torch.float64)
    for start in range(0, count, batch_size):
        part = indices[start : start + batch_size]
        batch = batch_of(dataset.__getitems__(part), reader, sentences=sentences)
        inputs: list[Tensor] = [batch[name].to(model.device) for name in ("condition", "lengths", "sub_tokens")]
        for i in range(2):
            dropped = torch.full((len(part),), bool(i), device=model.device)
            total[i] += model.bits_per_image(model(*inputs, dropped)) * len(part)
    results = {"bits_per_image": float(total[0]) / count}
    if config.condition_dropout:
        results["bits_per_image_unconditional"] = float(total[1]) / count
    return results


def _replace(
    dataset: TokenDataset,
    rows: dict[str, Any],
    check: Callable[[dict[str, Any], int], None],
    seed: tuple[int, ...],
) -> list[Fault]:
    """Put others into the places of rows that cannot be used; what was wrong with these."""
    faults: list[Fault] = []
    for i in range(len(rows["key"])):
        rng = None
        for _ in range(MOST_IN_A_ROW):
            try:
                check(rows, i)
                break
            except BadSample as error:
                faults.append(Fault(error.key, error.reason))
            rng = rng or np.random.default_rng((*seed, i))
            for name, value in dataset[int(rng.integers(len(dataset)))].items():
                rows[name][i] = value
        else:
            raise InputError(
                f"{faults[-1].key}: {faults[-1].reason}; and so it is with {MOST_IN_A_ROW} rows in a row"
            )
    return faults


def _check(rows: dict[str, Any], i: int, reader: Reader, sentences: Sentences, num_classes: int | None) -> None:
    """Whether row `i` has what the model is conditioned on.

    Raises:
        BadSample: it has not.
    """
    if reader is None:
        label = _label(rows, i)
        if label < 0 or (num_classes is not None and label >= num_classes):
            raise BadSample(rows["key"][i], f"label {label} is no class of the model, which has {num_classes}")
        return
    for text in _captions(rows, i, sentences):
        if isinstance(reader, FeatureFiles) and not reader.holds(text):  # who reads words reads any
            raise BadSample(rows["key"][i], f"no feature file holds its caption {text!r:.60}: `qlip features`")


def _captions(rows: dict[str, Any], i: int, sentences: Sentences) -> Sequence[str]:
    """What may be said of row `i`, at least one text."""
    words = words_of({name: rows[name][i] for name in ("key", "captions", "caption", "label") if name in rows})
    several = words.get("captions") or ([words["caption"]] if "caption" in words else [])
    if not several and sentences and (label := words.get("label")) is not None:
        if not 0 <= label < len(sentences):
            raise BadSample(rows["key"][i], f"label {label} has no name: give a file of {label + 1} class names")
        several = sentences[label]
    if not several:
        raise BadSample(rows["key"][i], "it has no words: leave it out when you tokenize")
    return several


def _label(rows: dict[str, Any], i: int) -> int:
    words = words_of({"key": rows["key"][i], "label": rows["label"][i]})
    if "label" not in words:
        raise BadSample(rows["key"][i], "it has no label: leave it out when you tokenize")
    return words["label"]
