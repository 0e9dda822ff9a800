import numpy as np
import pytest
import skimage.metrics
import torch

from qlip.errors import InputError
from qlip.eval.metrics import psnr, ssim, to_uint8


def pictures(seed, size=(40, 57)):
    rng = np.random.default_rng(seed)
    base = np.linspace(0, 255, size[0])[None, None, :, None] * np.ones((3, 3, 1, size[1]))
    return torch.from_numpy(np.clip(base + rng.normal(0, 20, (3, 3, *size)), 0, 255).astype(np.uint8))


def test_psnr_and_ssim_equal_scikit_image():
    a, b = pictures(0), pictures(1)
    for i in range(3):
        x, y = a[i].permute(1, 2, 0).numpy(), b[i].permute(1, 2, 0).numpy()
        expected = skimage.metrics.peak_signal_noise_ratio(x, y, data_range=255)
        assert psnr(a, b)[i].item() == pytest.approx(expected, abs=1e-10)
        expected = skimage.metrics.structural_similarity(
            x, y, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ssim(a, b)[i].item() == pytest.approx(expected, abs=1e-10)


def test_equal_pictures():
    a = pictures(0)
    assert psnr(a, a).isinf().all()
    torch.testing.assert_close(ssim(a, a), torch.ones(3, dtype=torch.float64))


def test_bad_pictures_are_named():
    a = pictures(0)
    with pytest.raises(InputError, match="uint8"):
        psnr(a.float(), a.float())
    with pytest.raises(InputError, match="differ in shape"):
        psnr(a, a[:, :, 1:])
    with pytest.raises(InputError, match="11 × 11"):
        ssim(a[..., :10], a[..., :10])


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([0.0, 0.5, 1.0, 1.2, -0.1, 254.6 / 255]).view(1, 1, 1, -1)
    assert to_uint8(values).flatten().tolist() == [0, 128, 255, 255, 0, 255]
