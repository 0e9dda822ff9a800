"""Which of some words fits each picture."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from qlip.eval.batches import Track
from qlip.jobs.pictures import Pictures, find_pictures
from qlip.model.image import Resize
from qlip.model.qlip import QLIP


def classify_files(
    model: QLIP,
    paths: Sequence[Path],
    labels: Sequence[str],
    templates: Sequence[str],
    track: Track = iter,
    resize: Resize = "crop",
) -> tuple[list[tuple[Path, dict[str, float]]], list[str]]:
    """Classify pictures with words.

    Args:
        model: with an image processor and a text vocabulary.
        paths: files and folders.
        labels: the words.
        templates: sentences with `{}` where the word goes.
        track: shows progress.
        resize: see `ImageProcessor.preprocess`.

    Returns:
        for each picture the labels' probabilities, the likeliest first, and a line for each that failed.
    """
    pictures = Pictures(find_pictures(paths), partial(model.need_image_processor().preprocess, resize=resize))
    results = []
    for batch, images in pictures.batches(track):
        for path, row in zip(batch, model.classify(images, labels, templates), strict=True):
            order = row.argsort(descending=True)
            results.append((path, {labels[int(i)]: float(row[i]) for i in order}))
    return results, pictures.failures
