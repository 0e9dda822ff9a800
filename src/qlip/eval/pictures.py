"""Pictures for people: originals beside what was rebuilt."""

from collections.abc import Sequence

from PIL import Image

from qlip.eval.metrics import to_uint8
from qlip.model.qlip import QLIP


def reconstruction_grid(model: QLIP, samples: Sequence[dict], columns: int = 8, zoom: int = 2) -> Image.Image:
    """Originals in the odd rows, rebuilt from their tokens in the rows below them.

    Args:
        model: with an image processor.
        samples: dicts with `image`, encoded bytes.
        columns: pictures in a row.
        zoom: how many times larger each pixel is drawn.
    """
    originals = [model.need_image_processor().preprocess(sample["image"]) for sample in samples]
    rebuilt = to_uint8(model.detokenize(model.tokenize(originals))).permute(0, 2, 3, 1).numpy()
    width, height, gap = originals[0].width * zoom, originals[0].height * zoom, 4
    rows = -(-len(samples) // columns)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (2 * height + 2 * gap) - gap), "white")
    for i, (original, pixels) in enumerate(zip(originals, rebuilt, strict=True)):
        x, y = i % columns * (width + gap), i // columns * (2 * height + 2 * gap)
        for picture, offset in ((original, 0), (Image.fromarray(pixels), height)):
            grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y + offset))
    return grid
