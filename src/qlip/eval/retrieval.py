"""Retrieval both ways: the picture of a caption among all pictures, a caption of a picture among all captions."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qlip.errors import InputError
from qlip.eval.batches import Batch, Columns, collect, with_captions
from qlip.eval.interval import Number, mean_of
from qlip.model.qlip import BATCH_SIZE, QLIP

AT = (1, 5, 10)
ROWS = 1024  # queries whose similarities are held at once


def embed_pairs(model: QLIP, batches: Iterable[Batch], most_captions: int = 5) -> Columns:
    """Embed pictures and their captions.

    Args:
        model: with image processor and text tokenizer.
        batches: pictures with captions.
        most_captions: of a picture, the first ones; the field's benchmarks have five.

    Returns:
        image_embeds (n, P); text_embeds (n, most_captions, P), zeros where there are fewer; num_captions (n,).

    Raises:
        InputError: a picture has no caption.
    """
    tokenizer = model.need_text_tokenizer()

    def score(batch: Batch) -> dict[str, Tensor]:
        texts = [with_captions(sample)[:most_captions] for sample in batch.samples]
        for sample, captions in zip(batch.samples, texts, strict=True):
            if not captions:
                raise InputError(f"{sample.get('key')}: no caption: give data with captions")
        counts = torch.tensor([len(captions) for captions in texts])
        flat = [caption for captions in texts for caption in captions]
        parts = (tokenizer(flat[i : i + BATCH_SIZE])[0].to(model.device) for i in range(0, len(flat), BATCH_SIZE))
        embeds = torch.cat([model.encode_text(part).cpu() for part in parts])
        padded = embeds.new_zeros(len(texts), most_captions, embeds.shape[1])
        padded[torch.arange(most_captions) < counts[:, None]] = embeds
        pixel_values = batch.pixel_values(model.need_image_processor()).to(model.device)
        return {"image_embeds": model.encode_image(pixel_values), "text_embeds": padded, "num_captions": counts}

    return collect(batches, score)


def recalls(image_embeds: Tensor, text_embeds: Tensor, num_captions: Tensor) -> dict[str, Number]:
    """Recall at 1, 5 and 10.

    Equal similarities keep the order of the data, so that a model that embeds everything alike finds nothing.

    Args:
        image_embeds: (n, P) unit vectors.
        text_embeds: (n, C, P) unit vectors, the first `num_captions` of each picture's.
        num_captions: (n,).

    Returns:
        image_to_text_recall@k: share of pictures with any of their captions among the k nearest captions;
        text_to_image_recall@k: share of captions with their picture among the k nearest pictures. Intervals are
        over pictures, each with all its captions.
    """
    there = torch.arange(text_embeds.shape[1]) < num_captions[:, None]
    texts = text_embeds[there]
    owner = torch.arange(len(image_embeds)).repeat_interleave(num_captions)
    first_right = torch.cat(
        [
            _rank_of(images @ texts.T, owner == torch.arange(start, start + len(images))[:, None])
            for start, images in _parts(image_embeds)
        ]
    )
    picture_rank = torch.cat(
        [
            _rank_of(
                part @ image_embeds.T, owner[start : start + len(part), None] == torch.arange(len(image_embeds))
            )
            for start, part in _parts(texts)
        ]
    )
    found = {f"image_to_text_recall@{k}": mean_of(first_right < k) for k in AT}
    for k in AT:
        hits = torch.zeros(len(image_embeds), dtype=torch.float64)
        hits.index_add_(0, owner, (picture_rank < k).double())
        found[f"text_to_image_recall@{k}"] = mean_of(hits, num_captions)
    return found


def _rank_of(similarities: Tensor, right: Tensor) -> Tensor:
    """(Q, n) similarities and which of the n are right → (Q,) place of the best right one, from 0."""
    order = similarities.argsort(dim=1, descending=True, stable=True)
    return right.gather(1, order).int().argmax(1)


def _parts(rows: Tensor) -> Sequence[tuple[int, Tensor]]:
    return [(start, rows[start : start + ROWS]) for start in range(0, len(rows), ROWS)]
