"""Pictures before and after both stages."""

import json

import pytest
import torch

import qlip
from qlip.data.parquet import ParquetSamples
from qlip.errors import InputError
from qlip.eval.reconstruction import reconstruction
from qlip.figures.stages import draw, stages
from qlip.model.image import ImageProcessor


@pytest.fixture
def two_models(small_model, tmp_path):
    small_model.save(tmp_path / "first")
    with torch.no_grad():
        small_model.vision_decoder.conv_out.bias.add_(1.0)
    small_model.save(tmp_path / "second")
    return str(tmp_path / "first"), str(tmp_path / "second")


def test_scores_are_those_of_the_evaluation_and_pictures_are_there(two_models, color_data, tmp_path):
    val = [str(color_data / "val.parquet")]
    path = stages(*two_models, val, tmp_path / "out", 16, "cpu")
    record = json.loads(path.read_text())
    assert record["ids"]["stage1"] == record["ids"]["stage2"]  # only the decoder was changed
    for name, folder in zip(("stage1", "stage2"), two_models, strict=True):
        expected = reconstruction(qlip.load(folder), ParquetSamples(val))
        for metric in ("psnr", "ssim"):
            mean = sum(picture[name][metric] for picture in record["pictures"]) / 16
            assert mean == pytest.approx(expected[metric], rel=1e-6)
    assert len(list((tmp_path / "out" / "stages").glob("*.png"))) == 48
    figure = draw(record, tmp_path / "out")
    captions = [axis.get_xlabel() for axis in figure.axes]
    assert sum("dB" in caption for caption in captions) == 32 and path.with_suffix(".png").is_file()


def test_without_weights_lpips_is_left_out(two_models, color_data, tmp_path, monkeypatch, caplog):
    def missing():
        raise InputError("the perceptual loss has no weights")

    monkeypatch.setattr("qlip.figures.stages.load_perceptual", missing)
    path = stages(*two_models, [str(color_data / "val.parquet")], tmp_path, 2, "cpu")
    record = json.loads(path.read_text())
    assert record["perceptual"] is None and "perceptual" not in record["pictures"][0]["stage1"]
    assert "no weights" in caplog.text


def test_models_of_different_pictures_are_refused(two_models, small_model, color_data, tmp_path):
    small_model.image_processor = ImageProcessor(resize=40, crop=32)
    small_model.save(tmp_path / "other")
    with pytest.raises(InputError, match="differently"):
        stages(two_models[0], str(tmp_path / "other"), [str(color_data / "val.parquet")], tmp_path, 2, "cpu")
    with pytest.raises(InputError, match="from 1 to the 16"):
        stages(*two_models, [str(color_data / "val.parquet")], tmp_path, 17, "cpu")
