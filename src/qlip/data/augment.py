"""Training-time augmentation of pictures."""

import math

import numpy as np
from PIL import Image


def random_resized_crop(
    image: Image.Image,
    size: tuple[int, int],
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.6, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
) -> Image.Image:
    """Cut out a random part, resize it, and mirror it half of the time.

    Args:
        image: any size, RGB.
        size: height and width of the result, in pixels.
        rng: draws area, aspect, place and mirroring.
        scale: range of the part's area, as a share of the picture's.
        ratio: range of its aspect (width / height), as a multiple of the result's.
        flip: whether to mirror.

    Returns:
        A picture of that size.
    """
    width, height = image.size
    new_height, new_width = size
    area = rng.uniform(*scale) * width * height
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]))) * (new_width / new_height)
    w = min(width, max(1, round(math.sqrt(area * aspect))))
    h = min(height, max(1, round(math.sqrt(area / aspect))))
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    image = image.resize((new_width, new_height), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    if flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image
