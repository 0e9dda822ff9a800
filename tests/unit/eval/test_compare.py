import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from qlip.eval import compare
from qlip.eval.batches import Pictures
from qlip.eval.codecs import CODECS
from qlip.eval.compare import draw_rates, measure_formats, measure_tokenizer
from qlip.eval.reconstruction import reconstruction


@pytest.fixture
def pictures(small_model, photos, monkeypatch):
    monkeypatch.setattr(compare, "CODECS", CODECS[:1])  # AVIF takes time
    samples = [{"image": p.read_bytes(), "key": p.name} for p in photos[:3]]
    return Pictures(samples, small_model.image_processor, batch_size=2)


def mean_square(a, b):
    return (a - b).square().mean((1, 2, 3))


def test_a_tokenizers_row(small_model, pictures):
    columns = measure_tokenizer(small_model, pictures.batches(), {"lpips": mean_square})
    expected = reconstruction(small_model, pictures.samples, perceptual=mean_square)
    assert columns.means() == {
        "num_bytes": 16 * 28 / 8,
        "bits_per_pixel": 16 * 28 / 32**2,
        "psnr": pytest.approx(expected["psnr"]),
        "ssim": pytest.approx(expected["ssim"]),
        "lpips": pytest.approx(expected["perceptual"]),
    }


def test_files_are_what_pillow_writes(pictures):
    columns = measure_formats(pictures.batches(), [400, 600], {}, torch.device("cpu"))
    originals = [pictures.prepare(sample["image"]) for sample in pictures.samples]
    for i, original in enumerate(originals):
        file = min((encode(original, progressive=p) for p in (False, True)), key=len)
        assert columns["JPEG quality 20/num_bytes"][i] == len(file)
        assert columns["JPEG quality 20/bits_per_pixel"][i] == len(file) * 8 / 32**2
        expected = peak_signal_noise_ratio(np.array(original), np.array(Image.open(io.BytesIO(file))))
        assert columns["JPEG quality 20/psnr"][i] == pytest.approx(expected)
    near, free = columns["JPEG near 600 bytes/num_bytes"], columns["JPEG near 600 bytes, header free/num_bytes"]
    assert (near - 600).abs().max() < 30 and (free > near).all()
    assert (columns["JPEG near 400 bytes/num_bytes"] < near).all()


def encode(picture, **options):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=20, optimize=True, subsampling="4:2:0", **options)
    return file.getvalue()


def test_the_picture_is_drawn(tmp_path):
    def numbers(rate, quality):
        return {
            name: {"value": value} for name, value in (("bits_per_pixel", rate), ("psnr", quality), ("ssim", 0.5))
        }

    files = {f"{c.name} quality {q}": numbers(0.1 * q, 20 + q) for c in CODECS for q in (2, 10)}
    found = {"models": [{"name": "mine"}], "results": {"mine": numbers(0.4, 21)} | files}
    draw_rates(json.loads(json.dumps(found)), tmp_path / "compare.png")
    width, height = Image.open(tmp_path / "compare.png").size
    assert width > 1.8 * height  # PSNR beside SSIM
