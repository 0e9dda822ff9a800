import numpy as np
import pytest
import skimage.metrics
import torch

from qlip.eval.batches import Pictures
from qlip.eval.frechet import Statistics, frechet_distance
from qlip.eval.metrics import stack_uint8, to_uint8
from qlip.eval.reconstruction import code_use, rate, rebuild, reconstruction
from qlip.model.config import PRESETS


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
    """Of the 8-bit pictures in [0, 1], rebuilt first."""
    results = reconstruction(
        small_model, samples(photos), perceptual=lambda a, b: (a - b).square().mean((1, 2, 3))
    )
    assert "perceptual" not in reconstruction(small_model, samples(photos[:1]))
    rebuilt = to_uint8(small_model.detokenize(small_model.tokenize(photos))) / 255
    original = torch.stack([torch.from_numpy(np.array(small_model.image_processor.preprocess(p))) for p in photos])
    expected = (rebuilt - original.permute(0, 3, 1, 2) / 255).square().mean()
    assert results["perceptual"] == pytest.approx(expected.item(), rel=1e-5)


def test_code_use():
    assert code_use(torch.tensor([[0, 1, 2, 3]]), 2) == {"bit_entropy": 2.0, "distinct_tokens": 1.0}
    assert code_use(torch.tensor([[3, 3, 3, 3]]), 2) == {"bit_entropy": 0.0, "distinct_tokens": 0.25}
    use = code_use(torch.tensor([[0, 0, 0, 1]]), 2)
    assert use["bit_entropy"] == pytest.approx(-(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75)))


def test_features_are_of_the_originals_and_of_what_is_rebuilt(small_model, photos):
    class Means:
        metric, num_features = "fd_means", 3

        def __call__(self, pictures):
            assert pictures.dtype == torch.uint8
            return pictures.float().mean((2, 3))

    pictures = Pictures(samples(photos), small_model.image_processor, batch_size=5)
    columns, pairs = rebuild(small_model, pictures.batches(), features=[Means()])
    assert len(columns) == 12 and pairs.keys() == {"fd_means"}
    expected = Statistics.empty(3), Statistics.empty(3)
    expected[0].add(Means()(stack_uint8([small_model.image_processor.preprocess(p) for p in photos])))
    expected[1].add(Means()(to_uint8(small_model.detokenize(columns["tokens"]))))
    assert frechet_distance(*pairs["fd_means"]) == pytest.approx(frechet_distance(*expected), rel=1e-3)


def test_rate():
    assert rate(PRESETS["b16-256"]) == {
        "bits_per_image": 7168,
        "bits_per_pixel": 7168 / 256**2,
        "compression_ratio": pytest.approx(219.43, abs=0.01),
    }
