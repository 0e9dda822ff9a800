"""Tiny models against what the released code, and EVA-CLIP's, computed from the same weights.

`cases/README.md` says what each case is. The tolerances are those it measured, absolute, in float32.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlip.model import QLIP, ImageTowerConfig, QLIPConfig, QuantizerConfig, TextConfig, init_from
from qlip.model.quantizer import entropies, group_tokens, quantizer_loss
from qlip.train.losses import contrastive_loss

CASES = Path(__file__).parent / "cases"
EMBEDS, LATENTS, PIXELS, HIDDEN = 5e-7, 1e-6, 4e-6, 1e-5
# 14.3 times a cosine. Against the models in float64, the expected logits are up to 4.9e-6 off, ours up to 8.1e-6:
# float32's noise, which depends on the machine's matrix kernels.
LOGITS = 1.3e-5


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture(params=["published-settings", "eva-tiny", "grouped-entropy", "plain-clip"], scope="module")
def case(request):
    """Name, model, expected tensors, the model's output and its hidden states."""
    folder = CASES / request.param
    model = QLIP(QLIPConfig.from_dict(json.loads((folder / "config.json").read_text()))).eval()
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({key: w for key, w in weights.items() if ".rope." not in key})  # tables, not weights
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        output = model(expected["pixel_values"], expected["input_ids"])
        hidden = model.vision_model(expected["pixel_values"])
    return request.param, model, expected, output, hidden


def test_embeddings(case):
    _, model, expected, output, _ = case
    close(output.image_embeds, expected["image_embeds"], EMBEDS)
    close(output.text_embeds, expected["text_embeds"], EMBEDS)
    close(output.logits_per_image, expected["logits_per_image"], LOGITS)
    embeds = output.image_embeds, output.text_embeds
    close(contrastive_loss(*embeds, model.logit_scale.exp()), expected["loss"], PIXELS)


def test_hidden_states(case):
    _, model, expected, _, hidden = case
    close(hidden, expected["last_hidden_state"], HIDDEN)
    with torch.no_grad():
        close(model.vision_model.post_layernorm(hidden[:, 0]), expected["pooled"], HIDDEN)


def test_codes_and_tokens(case):
    name, model, expected, output, _ = case
    close(output.latents, expected["latents"], LATENTS)
    close(output.codes, expected["quantized"], LATENTS)
    assert torch.equal(output.codes > 0, expected["quantized"] > 0)
    groups = group_tokens(output.codes, model.config.quantizer.group_size)
    assert torch.equal(groups, expected["group_indices"])
    tokens = model.codes_to_tokens(output.codes)
    assert torch.equal(model.tokens_to_codes(tokens), output.codes)
    if name != "published-settings":  # there the release's 28 bits were summed in float32
        assert torch.equal(tokens, expected["indices"])


def test_reconstructions(case):
    _, model, expected, output, _ = case
    close(output.reconstructions, expected["reconstructions"], PIXELS)
    with torch.no_grad():
        pixels = expected["pixel_values"]
        close(model.decode(model.quantize(model.encode(pixels))), expected["reconstructions"], PIXELS)


def test_quantizer_losses(case):
    _, model, expected, output, _ = case
    quantizer = model.config.quantizer
    h = quantizer.group_size if quantizer.persample_entropy_compute == "group" else 1
    _, codebook = entropies(output.latents, h, quantizer.inv_temperature)
    close(codebook, expected["codebook_entropy"], PIXELS)
    close(quantizer_loss(output.latents, quantizer), expected["quantizer_loss"], PIXELS)


def eva_clip_config():
    """The QLIP that has the towers of `eva_config.json`."""
    eva = json.loads((CASES / "eva-clip-init" / "eva_config.json").read_text())
    vision, text = eva["vision_cfg"], eva["text_cfg"]
    tower = ImageTowerConfig(
        hidden_size=vision["width"],
        intermediate_size=int(vision["width"] * vision["mlp_ratio"]),
        num_hidden_layers=vision["layers"],
        num_attention_heads=vision["width"] // vision["head_width"],
        layer_norm_eps=1e-6,
        rope=vision["rope"],
        swiglu=vision["naiveswiglu"],
        subln=vision["subln"],
        k_bias=False,
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
    )
    return QLIPConfig(
        vision=tower,
        decoder=tower,
        quantizer=QuantizerConfig(),
        text=TextConfig(
            hidden_size=text["width"],
            intermediate_size=4 * text["width"],
            num_hidden_layers=text["layers"],
            num_attention_heads=text["heads"],
            vocab_size=text["vocab_size"],
            max_position_embeddings=text["context_length"],
            eos_token_id=2,
        ),
        projection_dim=eva["embed_dim"],
        vision_projection_bias=True,
    )


def test_init_from_eva_clip():
    folder = CASES / "eva-clip-init"
    model, expected = QLIP(eva_clip_config()).eval(), load_file(folder / "expected.safetensors")
    report = init_from(model, folder / "eva_clip.safetensors", "eva-clip")
    with torch.no_grad():
        output = model(expected["pixel_values"], expected["input_ids"])
        hidden = model.vision_model(expected["pixel_values"])
    close(hidden, expected["last_hidden_state"], HIDDEN)
    close(output.image_embeds, expected["image_embeds"], EMBEDS)
    close(output.text_embeds, expected["text_embeds"], EMBEDS)
    close(model.logit_scale.data, expected["logit_scale"], 0)
    assert report.resized == report.unused == ()
    assert {name.split(".")[0] for name in report.fresh} == {"vision_model", "vision_decoder"}
    assert all("quant_embed" in name or name.startswith("vision_decoder.") for name in report.fresh)
