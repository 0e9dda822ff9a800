"""The configuration: published files, presets and what is refused."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlip.errors import InputError
from qlip.model import PRESETS, QLIP, ImageTowerConfig, QLIPConfig, QuantizerConfig, TextConfig
from qlip.model.config import ACTIVATIONS

MANIFESTS = Path(__file__).parents[2] / "data" / "manifests"
PUBLISHED = ["b16-256", "b8-256", "l14-392"]


def manifest(name):
    return json.loads((MANIFESTS / f"{name}.json").read_text())


# What was published


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_keys_shapes_and_parameters(name):
    published = manifest(name)
    with torch.device("meta"):
        model = QLIP(PRESETS[name])
    shapes = {key: list(weight.shape) for key, weight in model.state_dict().items()}
    assert shapes == {key: shape for key, shape in published["keys"].items() if ".rope." not in key}
    assert sum(p.numel() for p in model.parameters()) == published["parameters"]
    for part, count in published["parts"].items():
        assert sum(p.numel() for p in getattr(model, part).parameters()) == count


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_the_presets(name):
    assert QLIPConfig.from_dict(manifest(name)["config"]) == PRESETS[name]


def test_absent_keys_have_their_published_meaning():
    config = QLIPConfig.from_dict({"vision_config": {}, "text_config": {}, "decoder_config": {}})
    assert config == QLIPConfig()
    for tower in (config.vision, config.decoder, config.text):
        assert tower.hidden_act == "gelu" and tower.layer_norm_eps == 1e-5
        assert not (tower.rope or tower.swiglu or tower.subln)
        assert tower.q_bias and tower.k_bias and tower.v_bias
    assert config.vision.num_channels == 3


# To a file and back


def towers(cls, **own):
    """Configs of a tower, every switch either way; heads of 4, 8 or 12, so that any may be rotary."""
    switches = {name: st.booleans() for name in ("rope", "swiglu", "subln", "q_bias", "k_bias", "v_bias")}
    return st.tuples(st.integers(1, 3), st.sampled_from([4, 8, 12])).flatmap(
        lambda heads: st.builds(
            cls,
            hidden_size=st.just(heads[0] * heads[1]),
            num_attention_heads=st.just(heads[0]),
            num_hidden_layers=st.integers(1, 3),
            intermediate_size=st.integers(1, 64),
            hidden_act=st.sampled_from(ACTIVATIONS),
            layer_norm_eps=st.sampled_from([1e-6, 1e-5]),
            **switches,
            **own,
        )
    )


def image_towers(grid):
    return st.integers(1, 9).flatmap(
        lambda patch: towers(ImageTowerConfig, image_size=st.just(grid * patch), patch_size=st.just(patch))
    )


@st.composite
def configs(draw):
    grid, groups, group_size = draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 7))
    quantizer = st.builds(
        QuantizerConfig,
        embed_dim=st.just(groups * group_size),
        group_size=st.just(group_size),
        inv_temperature=st.floats(0.01, 100),
        persample_entropy_compute=st.sampled_from(["group", "analytical"]),
    )
    vision = draw(image_towers(grid))
    image_size = st.tuples(st.integers(1, 5), st.integers(1, 5)).map(
        lambda grid: tuple(n * vision.patch_size for n in grid)
    )
    return QLIPConfig(
        vision=vision,
        decoder=draw(image_towers(grid)),
        text=draw(towers(TextConfig, vocab_size=st.integers(3, 99), max_position_embeddings=st.integers(1, 9))),
        quantizer=draw(quantizer),
        projection_dim=draw(st.integers(1, 16)),
        vision_projection_bias=draw(st.booleans()),
        text_projection_bias=draw(st.booleans()),
    ).at_size(draw(image_size))


@given(configs())
def test_a_config_comes_back_from_its_file(config):
    written = config.to_dict()
    assert QLIPConfig.from_dict(json.loads(json.dumps(written))) == config
    assert written["vision_config"]["hidden_size_post_q"] == config.decoder.hidden_size
    assert QLIPConfig.from_dict(written).to_dict() == written
    assert ("image_size" in written) == (config.size != (config.vision.image_size, config.vision.image_size))


def expected_keys(config):
    """docs/paper.md section 1, "Checkpoint keys", for every switch."""
    keys = {"logit_scale", "visual_projection.weight", "text_projection.weight"}
    keys |= {"visual_projection.bias"} if config.vision_projection_bias else set()
    keys |= {"text_projection.bias"} if config.text_projection_bias else set()
    keys |= {"text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight"}
    keys |= {f"vision_model.embeddings.{n}" for n in ("class_embedding", "position_embedding.weight")}
    keys |= {"vision_decoder.position_embeddings"}
    modules = [
        f"vision_model.{mlp}.{fc}" for mlp in ("quant_embed", "quant_embed_post") for fc in ("c_fc", "c_proj")
    ]
    modules += ["vision_model.embeddings.patch_embedding", "vision_model.post_layernorm"]
    modules += [f"vision_decoder.{n}" for n in ("norm", "ffn.0", "conv_out")] + ["text_model.final_layer_norm"]
    towers = {"vision_model": config.vision, "vision_decoder": config.decoder, "text_model": config.text}
    for name, tower in towers.items():
        for layer in (f"{name}.encoder.layers.{i}" for i in range(tower.num_hidden_layers)):
            modules += [f"{layer}.layer_norm1", f"{layer}.layer_norm2", f"{layer}.self_attn.out_proj"]
            modules += [f"{layer}.mlp.{n}" for n in (("w1", "w2", "w3") if tower.swiglu else ("fc1", "fc2"))]
            modules += [f"{layer}.self_attn.inner_attn_ln"] if tower.subln else []
            modules += [f"{layer}.mlp.ffn_ln"] if tower.subln and tower.swiglu else []
            for n, bias in (("q", tower.q_bias), ("k", tower.k_bias), ("v", tower.v_bias)):
                keys |= {f"{layer}.self_attn.{n}_proj.{leaf}" for leaf in ("weight", "bias")[: 1 + bias]}
    return keys | {f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")}


@given(configs())
@settings(max_examples=25, deadline=None)
def test_every_config_builds_runs_and_names_its_weights(config):
    model = QLIP(config)
    assert model.state_dict().keys() == expected_keys(config)
    decoder = config.decoder
    pixels = torch.randn(2, 3, *config.size)
    output = model(pixels, torch.randint(config.text.vocab_size, (2, config.text.max_position_embeddings)))
    assert output.reconstructions.shape == (2, 3, *(n * decoder.patch_size for n in config.grid))
    assert output.latents.shape == (2, config.num_tokens, config.num_bits)
    assert output.logits_per_image.shape == (2, 2)
    assert all(torch.isfinite(getattr(output, f.name)).all() for f in fields(output))


# What is refused


def test_a_projection_of_no_width():
    with pytest.raises(InputError, match="projection_dim is 0"):
        QLIPConfig(projection_dim=0)


def changed(section, **values):
    config = QLIPConfig()
    return replace(config, **{section: replace(getattr(config, section), **values)})


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("vision", {"hidden_size": 0}, "vision.hidden_size is 0"),
        ("text", {"num_hidden_layers": 0}, "text.num_hidden_layers is 0"),
        ("decoder", {"intermediate_size": -1}, "decoder.intermediate_size is -1"),
        ("text", {"num_attention_heads": 0}, "text.num_attention_heads is 0"),
        ("vision", {"num_attention_heads": 7}, "vision.hidden_size 768 .* num_attention_heads 7"),
        ("vision", {"rope": True, "num_attention_heads": 128}, "vision: rotary .* divisible by 4"),
        ("text", {"rope": True, "hidden_size": 24}, "text: rotary .* divisible by 2"),
        ("decoder", {"hidden_act": "swish"}, "decoder.hidden_act is 'swish'"),
        ("vision", {"patch_size": 30}, "vision.image_size 224 is not a multiple of patch_size 30"),
        ("decoder", {"patch_size": 0}, "decoder.patch_size is 0"),
        ("vision", {"image_size": 0}, "vision.image_size is 0"),
        ("vision", {"num_channels": 0}, "vision.num_channels is 0"),
        ("text", {"vocab_size": 0}, "text.vocab_size is 0"),
        ("text", {"max_position_embeddings": -1}, "text.max_position_embeddings is -1"),
        ("vision", {"patch_size": 16}, "vision has 14 patches a side and decoder 7"),
        ("quantizer", {"embed_dim": 0}, "quantizer.embed_dim is 0"),
        ("quantizer", {"embed_dim": 64}, "quantizer.embed_dim is 64"),
        ("quantizer", {"group_size": 5}, "quantizer.group_size 5 does not divide embed_dim 28"),
        ("quantizer", {"group_size": 0}, "quantizer.group_size 0"),
        ("quantizer", {"inv_temperature": 0.0}, "quantizer.inv_temperature is 0.0"),
        ("quantizer", {"persample_entropy_compute": "grouped"}, "persample_entropy_compute is 'grouped'"),
    ],
)
def test_what_cannot_be_built_is_named(section, values, message):
    with pytest.raises(InputError, match=message):
        changed(section, **values)


def read(**values):
    sections = {"vision_config": {}, "text_config": {}, "decoder_config": {}}
    return QLIPConfig.from_dict(sections | values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vision_config": None}, "no section 'vision_config'"),
        ({"text_config": []}, "no section 'text_config'"),
        ({"projection_dim": "512"}, "projection_dim is '512', not an integer"),
        ({"projection_dim": True}, "projection_dim is True, not an integer"),
        ({"vision_projection_bias": 1}, "vision_projection_bias is 1, not true or false"),
        ({"vision_config": {"layer_norm_eps": "1e-6"}}, "layer_norm_eps is '1e-6', not a number"),
        ({"text_config": {"hidden_size": None}}, "hidden_size is None, not an integer"),
        ({"vision_config": {"hidden_size_post_q": 64}}, "hidden_size_post_q is 64, .* hidden_size 768"),
        ({"image_size": [224, 100]}, "image_size 224 × 100 holds no whole patches: use multiples of 32"),
        ({"image_size": "224"}, "image_size is .*: use a number of pixels, or a height and a width"),
        ({"image_size": 224.5}, "image_size is 224.5"),
        ({"image_size": [224]}, "image_size is .*: use a number of pixels, or a height and a width"),
        ({"vision_config": {"quantizer": "vq"}}, "quantizer is 'vq', but only 'bsq'"),
        ({"vision_config": {"quantizer_cfg": {"l2_norm": False}}}, "l2_norm is False"),
        ({"vision_config": {"quantizer_cfg": {"input_format": "bchw"}}}, "input_format is 'bchw'"),
    ],
)
def test_a_broken_file_is_explained(values, message):
    with pytest.raises(InputError, match=message):
        read(**values)


def test_a_whole_number_will_do_for_a_float_and_strange_keys_are_ignored():
    config = read(initializer_factor=1, torch_dtype="float32", vision_config={"use_rms_norm": True})
    assert config == QLIPConfig() and type(config.initializer_factor) is float
