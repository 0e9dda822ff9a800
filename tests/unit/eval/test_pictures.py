import io

import numpy as np
from PIL import Image

from qlip.eval.metrics import to_uint8
from qlip.eval.pictures import reconstruction_grid
from qlip.model import QLIP


def samples(photos):
    return [{"image": photo.read_bytes()} for photo in photos]


def test_grid_shows_originals_above_what_is_rebuilt(small_model, photos):
    data = samples(photos[:5])
    grid = reconstruction_grid(small_model, data, columns=3, zoom=1)
    assert grid.size == (3 * 36 - 4, 2 * 72 - 4)
    original = Image.open(io.BytesIO(data[4]["image"]))
    cell = grid.crop((36, 72, 36 + 32, 72 + 32))  # second row, second column, upper half
    assert cell.tobytes() == small_model.image_processor.preprocess(original).tobytes()


def test_grid_of_pictures_that_are_no_squares(small_model, photos):
    config = small_model.config.at_size((16, 48))
    model = QLIP(config, image_processor=small_model.image_processor.at_size(config.size)).eval()
    data = samples(photos[:3])
    grid = reconstruction_grid(model, data, columns=2, zoom=1)
    assert grid.size == (2 * 52 - 4, 2 * 40 - 4)
    below = grid.crop((0, 40 + 16, 48, 40 + 32))  # second row, first column, lower half
    rebuilt = to_uint8(model.detokenize(model.tokenize(data[2]["image"])))[0].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(below).astype(int) - rebuilt).max() <= 1
