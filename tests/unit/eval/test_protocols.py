import io

import numpy as np
import pytest
import skimage.metrics
import torch
from PIL import Image

from qlip.eval.metrics import to_uint8
from qlip.eval.pictures import reconstruction_grid
from qlip.eval.protocols import code_use, reconstruction, zero_shot
from qlip.model import QLIP


def samples(photos):
    return [{"image": photo.read_bytes(), "label": i % 3} for i, photo in enumerate(photos)]


def test_reconstruction_is_the_mean_over_pictures(small_model, photos):
    results = reconstruction(small_model, samples(photos))
    processor = small_model.image_processor
    scores, tokens = [], []
    for photo in photos:
        original = processor.preprocess(photo)
        tokens.append(small_model.tokenize(original))
        rebuilt = (small_model.detokenize(tokens[-1])[0].permute(1, 2, 0) * 255).round().byte().numpy()
        scores.append(skimage.metrics.peak_signal_noise_ratio(np.array(original), rebuilt))
    assert results["psnr"] == pytest.approx(np.mean(scores), abs=1e-6)
    assert results.items() >= code_use(torch.cat(tokens), 28).items()


def test_a_perceptual_distance_is_averaged_over_pictures(small_model, photos):
    """Of the pictures in [0, 1], rebuilt first."""
    results = reconstruction(
        small_model, samples(photos), perceptual=lambda a, b: (a - b).square().mean((1, 2, 3))
    )
    assert "perceptual" not in reconstruction(small_model, samples(photos[:1]))
    rebuilt = small_model.detokenize(small_model.tokenize(photos))
    original = torch.stack([torch.from_numpy(np.array(small_model.image_processor.preprocess(p))) for p in photos])
    expected = (rebuilt - original.permute(0, 3, 1, 2) / 255).square().mean()
    assert results["perceptual"] == pytest.approx(expected.item(), rel=1e-5)


def test_code_use():
    assert code_use(torch.tensor([[0, 1, 2, 3]]), 2) == {"bit_entropy": 2.0, "distinct_tokens": 1.0}
    assert code_use(torch.tensor([[3, 3, 3, 3]]), 2) == {"bit_entropy": 0.0, "distinct_tokens": 0.25}
    use = code_use(torch.tensor([[0, 0, 0, 1]]), 2)
    assert use["bit_entropy"] == pytest.approx(-(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75)))


def test_zero_shot_counts_what_classify_says(small_model, photos):
    names, templates = ["red square", "green square", "blue square"], ["a {}.", "{}"]
    data = samples(photos)
    results = zero_shot(small_model, data, names, templates)
    best = small_model.classify([s["image"] for s in data], names, templates).argmax(1)
    assert results["top1"] == pytest.approx(
        (best == torch.tensor([s["label"] for s in data])).float().mean().item()
    )
    assert results["top5"] == 1.0  # only three classes


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
