"""`verify`: a good checkpoint passes, and each fault fails the check that is for it."""

import json
import struct
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from qlip.eval.verify import CHECKS, PHOTOS, Check, verify
from qlip.model import QLIP, QLIPConfig
from qlip.model.image import ImageProcessor
from qlip.model.text import TextTokenizer

TESTS = Path(__file__).parents[2]
NAMES = ["loads", *CHECKS]


@pytest.fixture
def model():
    """A small model with random weights, whose decoder paints every patch as the photograph's mean patch."""
    config = json.loads((TESTS / "golden" / "cases" / "published-settings" / "config.json").read_text())
    config = QLIPConfig.from_dict(config)
    words = TextTokenizer.train(["a photo of a cat", "the red car"], 560, 16)
    torch.manual_seed(0)
    model = QLIP(
        replace(config, text=replace(config.text, vocab_size=words.vocab_size)),
        image_processor=ImageProcessor(config.vision.image_size, config.vision.image_size),
        text_tokenizer=words,
    )
    pixel_values = model.image_processor((files("qlip") / "demo" / "photos" / PHOTOS[0]).read_bytes())
    patch = config.vision.patch_size
    with torch.no_grad():
        model.vision_decoder.conv_out.weight.zero_()
        model.vision_decoder.conv_out.bias.copy_(F.unfold(pixel_values, patch, stride=patch).mean((0, 2)))
    return model


def run(model, folder, **options):
    """The checks by name; those that were not run too."""
    model.save(folder)
    return by_name(verify(folder, **options))


def by_name(checks):
    assert [check.name for check in checks] == NAMES
    assert all(isinstance(check, Check) and "\n" not in check.detail for check in checks)
    return {check.name: check for check in checks}


def assert_only_fails(checks, name, detail):
    assert [check.name for check in checks.values() if not check.passed] == [name]
    assert detail in checks[name].detail


def test_a_good_checkpoint_passes(model, tmp_path):
    checks = run(model, tmp_path / "mine")
    assert all(check.passed for check in checks.values()), checks
    assert checks["loads"].detail == "mine, float32 on cpu"
    assert checks["parameters"].detail.startswith(f"{sum(p.numel() for p in model.parameters()):,}: ")
    assert checks["published"].detail == "none of the published three"
    assert checks["ids"].detail == model.id_hash()
    assert "dB PSNR" in checks["reconstruction"].detail


def test_options_reach_the_loader(model, tmp_path):
    checks = run(model, tmp_path / "mine", dtype=torch.bfloat16)
    assert all(check.passed for check in checks.values()), checks
    assert checks["loads"].detail == "mine, bfloat16 on cpu"


def test_what_a_checkpoint_may_lack_is_a_note(model, tmp_path):
    model.image_processor = model.text_tokenizer = None
    checks = run(model, tmp_path)
    assert all(check.passed for check in checks.values()), checks
    assert checks["preprocessor"].detail.startswith("none") and checks["vocabulary"].detail.startswith("none")


@pytest.mark.parametrize("width", [1, 63])
def test_tokens_of_any_width(model, tmp_path, width):
    config = replace(model.config, quantizer=replace(model.config.quantizer, embed_dim=width))
    assert run(QLIP(config), tmp_path)["tokens"].passed


@pytest.mark.parametrize(
    ("value", "passes"),
    [(0.0, True), (4.6052, True), (4.7, False), (-0.1, False), (torch.nan, False), (torch.inf, False)],
)
def test_logit_scale(model, tmp_path, value, passes):
    model.logit_scale.data.fill_(value)
    assert run(model, tmp_path)["logit_scale"].passed is passes


def test_a_weight_that_is_not_finite_is_named(model, tmp_path):
    model.text_projection.weight.data[0, 0] = torch.nan
    assert_only_fails(run(model, tmp_path), "finite", "text_projection.weight holds")


def test_weights_of_nothing_but_nan_raise_nothing(model, tmp_path):
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    checks = run(model, tmp_path)
    assert not checks["finite"].passed and not checks["reconstruction"].passed
    assert checks["ids"].passed


@pytest.mark.parametrize("eos", [2, 17])
def test_a_text_must_end_where_the_tower_reads_it_off(model, tmp_path, eos):
    model.config = replace(model.config, text=replace(model.config.text, eos_token_id=eos))
    checks = run(model, tmp_path)
    if eos == 2:  # the largest id, which eos is
        assert checks["vocabulary"].passed
    else:
        assert_only_fails(checks, "vocabulary", "reads them off at id 17")


def test_a_decoder_without_training_is_found(model, tmp_path):
    model.reset_parameters()
    assert_only_fails(run(model, tmp_path), "reconstruction", "in its mean colour it has")


@pytest.mark.parametrize(("depth", "passes"), [(1e-6, True), (0.1, False)])
def test_bits_may_turn_in_a_batch_only_where_the_latent_is_almost_0(model, tmp_path, monkeypatch, depth, passes):
    def encode(self, pixel_values):
        latents = torch.full((len(pixel_values), 16, 28), 28**-0.5)
        latents[:, 3, 5] = depth if len(pixel_values) == 1 else -depth
        return latents

    monkeypatch.setattr(QLIP, "encode", encode)
    check = run(model, tmp_path)["stable"]
    assert check.passed is passes
    assert "1 of 448 bits" in check.detail and "turn in a batch of 3" in check.detail


# What claims to be published


def empty_checkpoint(folder, name, config):
    """All keys and shapes of a published checkpoint in a file of nothing: sparse, so no disk is used."""
    manifest = json.loads((TESTS / "data" / "manifests" / f"{name}.json").read_text())
    header, end = {}, 0
    for key, shape in manifest["keys"].items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(manifest["config"] | config))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize(
    ("name", "count"), [("b16-256", "239,434,013"), ("b8-256", "238,991,069"), ("l14-392", "738,111,243")]
)
def test_the_published_three_are_recognised(name, count, tmp_path):
    empty_checkpoint(tmp_path / "any", name, {})
    checks = by_name(verify(tmp_path / "any", device="meta"))
    assert checks["published"] == Check("published", True, checks["published"].detail)
    assert checks["published"].detail.startswith(f"{name}: parameters, image_size")
    assert checks["parameters"].detail.startswith(f"{count}: ")
    assert not checks["finite"].passed  # nothing can be said of weights that are nowhere, nor does it raise


def test_a_published_name_with_another_model_is_found(model, tmp_path):
    checks = run(model, tmp_path / "QLIP-B-16-256")
    assert_only_fails(checks, "published", "but the published b16-256 has 239434013")


def test_a_published_name_with_other_settings_is_found(tmp_path):
    text = {"eos_token_id": 49407, "model_type": "clip_text_model"}
    empty_checkpoint(tmp_path / "QLIP-B-8-256", "b8-256", {"text_config": text})
    check = by_name(verify(tmp_path / "QLIP-B-8-256", device="meta"))["published"]
    assert check == Check("published", False, "eos_token_id is 49407, but the published b8-256 has 2")


# What cannot be loaded


def break_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_size"] = None
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "break_it",
    [
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"junk"),
        lambda folder: (folder / "preprocessor_config.json").write_text("{"),
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        lambda folder: [path.unlink() for path in folder.iterdir()],
        break_config,
    ],
)
def test_what_cannot_be_loaded_fails_without_raising(model, tmp_path, break_it):
    model.save(tmp_path)
    break_it(tmp_path)
    checks = by_name(verify(tmp_path))
    assert not checks["loads"].passed and checks["loads"].detail
    assert {(check.passed, check.detail) for check in list(checks.values())[1:]} == {(False, "not run")}


def test_an_unknown_name_fails_without_raising():
    assert "not known" in by_name(verify("nothing"))["loads"].detail
