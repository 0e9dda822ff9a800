"""Pictures in, captions out."""

from collections.abc import Sequence
from pathlib import Path

from qlip.eval.batches import Track
from qlip.jobs.pictures import Pictures, find_pictures
from qlip.um3.pipeline import UnifiedModel


def caption_files(
    model: UnifiedModel, paths: Sequence[Path], track: Track = iter, batch_size: int = 16, **options
) -> tuple[list[tuple[Path, str]], list[str]]:
    """Describe pictures.

    Args:
        model: what describes.
        paths: files and folders.
        track: shows progress.
        batch_size: pictures at once.
        options: see `UnifiedModel.caption`.

    Returns:
        each picture's caption, and a line for each that failed.
    """
    read = model.tokenizer.need_image_processor().preprocess
    pictures = Pictures(find_pictures(paths), read, batch_size)
    captions: list[tuple[Path, str]] = []
    for batch, images in pictures.batches(track):
        captions += zip(batch, model.caption(images, batch_size=batch_size, **options), strict=True)
    return captions, pictures.failures
