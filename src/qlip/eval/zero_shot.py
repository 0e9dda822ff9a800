"""Classification with words (Radford et al. 2021): which of the class names is a picture nearest to?"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlip.eval.batches import Batch, Columns, Pictures, Track, collect
from qlip.model.qlip import QLIP

TOP = (1, 5)


def classify(
    model: QLIP,
    batches: Iterable[Batch],
    names: Sequence[str],
    templates: Sequence[str],
    index: Callable[[dict[str, Any]], int],
) -> Columns:
    """Each class is the mean embedding of its name in every template, normalised again.

    Args:
        model: with image processor and text tokenizer.
        batches: labelled pictures.
        names: one name a class.
        templates: sentences with `{}`.
        index: the place of a sample's class in `names`.

    Returns:
        top1 and top5: whether the right name is among so many nearest.
    """
    text = model.embed_labels(names, templates)

    def score(batch: Batch) -> dict[str, Tensor]:
        labels = torch.tensor([index(sample) for sample in batch.samples])
        pixel_values = batch.pixel_values(model.need_image_processor()).to(model.device)
        logits = model.similarity(model.encode_image(pixel_values), text)
        right = logits.topk(min(max(TOP), len(names))).indices.cpu() == labels[:, None]
        return {f"top{k}": right[:, :k].any(1).double() for k in TOP}

    return collect(batches, score)


def zero_shot(
    model: QLIP, samples: Sequence[dict], names: Sequence[str], templates: Sequence[str], track: Track = iter
) -> dict[str, float]:
    """As `classify`, of samples whose `label` is an index into `names`: the shares of top1 and top5."""
    pictures = Pictures(samples, model.need_image_processor())
    return classify(model, track(pictures.batches()), names, templates, lambda sample: sample["label"]).means()
