"""QLIP through transformers: the same numbers as our own model's, CLIP's conventions, real CLIP left alone."""

import importlib.metadata
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image
from safetensors.torch import load_file
from tests.conftest import small_config

import qlip
from qlip.errors import InputError
from qlip.model import QLIP, ImageTowerConfig, TextConfig

pytest.importorskip("transformers")

from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import qlip.integrations.transformers as integration
from qlip.integrations.transformers import (
    QLIPConfig,
    QLIPImageProcessor,
    QLIPModel,
    QLIPVisionConfig,
    QLIPVisionModel,
    export,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "cases"
EMBEDS, LATENTS, PIXELS, HIDDEN = 5e-7, 1e-6, 4e-6, 1e-5  # as in golden/test_golden.py, measured, absolute
# 14.3 times a cosine. Against the models in float64, the expected logits are up to 4.9e-6 off, ours up to 8.1e-6:
# float32's noise, which depends on the machine's matrix kernels.
LOGITS = 1.3e-5
NOTHING = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def load_whole(kind, folder, **options):
    """Load a model that takes every tensor from the folder."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert {key: set(info[key]) for key in NOTHING} == NOTHING
    return model


@pytest.fixture
def folder(small_model, tmp_path):
    """A small checkpoint in the published layout."""
    small_model.save(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# The same numbers


@pytest.mark.parametrize("case", ["published-settings", "eva-tiny", "grouped-entropy", "plain-clip"])
@torch.no_grad()
def test_golden_cases(case):
    expected = load_file(GOLDEN / case / "expected.safetensors")
    pixel_values, input_ids = expected["pixel_values"], expected["input_ids"]
    ours, model = qlip.load(GOLDEN / case), load_whole(QLIPModel, GOLDEN / case)
    output = model(input_ids, pixel_values)
    close(output.image_embeds, expected["image_embeds"], EMBEDS)
    close(output.text_embeds, expected["text_embeds"], EMBEDS)
    close(output.logits_per_image, expected["logits_per_image"], LOGITS)
    close(output.logits_per_text, expected["logits_per_image"].T, LOGITS)
    latents = model.encode(pixel_values)
    close(latents, expected["latents"], LATENTS)
    codes = model.quantize(latents)
    close(codes, expected["quantized"], LATENTS)
    close(model.decode(codes), expected["reconstructions"], PIXELS)
    assert torch.equal(model.tokens_to_codes(model.codes_to_tokens(codes)), codes)

    states: list = []
    ours.vision_model(pixel_values, states)
    for vision in (load_whole(QLIPVisionModel, GOLDEN / case), model.vision_model):
        output = vision(pixel_values, output_hidden_states=True)
        close(output.last_hidden_state, expected["last_hidden_state"], HIDDEN)
        close(output.pooler_output, expected["pooled"], HIDDEN)
        assert len(output.hidden_states) == 1 + vision.config.num_hidden_layers == len(states)
        assert all(map(torch.equal, output.hidden_states, states))


@torch.no_grad()
def test_conventions_are_those_of_clip(pixels):
    """CLIP is a QLIP without what EVA-02 adds, whose patch bias is 0 and which has one norm more."""
    tower = ImageTowerConfig(32, 48, 3, 2, image_size=32, patch_size=8)
    text = TextConfig(32, 48, 2, 2, vocab_size=50, max_position_embeddings=9, bos_token_id=48, eos_token_id=49)
    ours = QLIP(small_config(vision=tower, decoder=tower, text=text))
    ours.vision_model.embeddings.patch_embedding.bias.zero_()
    config = QLIPConfig(**ours.config.to_dict())
    model = QLIPModel(config).eval()
    model.load_state_dict(ours.state_dict())
    sections = {key: getattr(config, key).to_dict() for key in ("vision_config", "text_config")}
    clip = CLIPModel(CLIPConfig(**sections, projection_dim=16)).eval()
    vision = getattr(clip.vision_model, "vision_model", clip.vision_model)
    vision.pre_layrnorm = torch.nn.Identity()
    theirs = clip.state_dict().keys()
    clip.load_state_dict({key: value for key, value in ours.state_dict().items() if key in theirs})

    ids = torch.tensor([[48, 3, 4, 49, 49], [48, 7, 8, 9, 49]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    expected, actual = clip(ids, pixels, mask), model(ids, pixels, mask)
    for key in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        close(actual[key], expected[key], PIXELS)
    last = actual.vision_model_output.last_hidden_state
    eye = CLIPVisionModel(clip.config.vision_config).eval()
    tower = getattr(eye, "vision_model", eye)
    tower.pre_layrnorm = torch.nn.Identity()
    tower.load_state_dict(vision.state_dict())
    expected, actual = (m(pixels, output_hidden_states=True) for m in (eye, model.vision_model))
    assert torch.equal(last, actual.last_hidden_state)
    for key in ("last_hidden_state", "pooler_output"):
        close(actual[key], expected[key], HIDDEN)
    for state, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        close(state, theirs, HIDDEN)
    for name, arguments in {"get_image_features": (pixels,), "get_text_features": (ids, mask)}.items():
        features = getattr(clip, name)(*arguments)  # a tensor before transformers 5.1 or so
        close(getattr(model, name)(*arguments).pooler_output, getattr(features, "pooler_output", features), HIDDEN)


@torch.no_grad()
def test_hidden_states_come_when_they_are_asked_for(folder, pixels):
    model = QLIPVisionModel.from_pretrained(folder)
    assert model(pixels).hidden_states is None
    assert len(model(pixels, output_hidden_states=0).hidden_states) == 3  # LLaVA of the first layer asks so
    last, pooled, states = model(pixels, output_hidden_states=True, return_dict=False)
    assert torch.equal(states[-1], last) and pooled.shape == (2, 32)
    model.config.output_hidden_states = True
    assert len(model(pixels).hidden_states) == 3
    model.config.return_dict = False
    assert torch.equal(model(pixels)[0], last)
    whole = QLIPModel.from_pretrained(folder, return_dict=False)
    assert torch.equal(whole.get_image_features(pixels)[0], last) and whole.encode(pixels).shape == (2, 16, 28)
    with pytest.raises(InputError, match="SDPA gives no attention weights"):
        model(pixels, output_attentions=True)


@torch.no_grad()
def test_quantized_features(small_model, folder, pixels):
    model = QLIPVisionModel.from_pretrained(folder, quantized_features=True)
    output, expected = model(pixels, output_hidden_states=True), small_model(pixels)
    assert torch.equal(output.last_hidden_state[:, 1:], expected.quantized_features)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert torch.equal(output.hidden_states[-2], small_model.hidden_states(pixels))
    assert torch.equal(output.hidden_states[-2][:, 0], output.last_hidden_state[:, 0])
    assert torch.equal(
        output.pooler_output, small_model.vision_model.post_layernorm(output.last_hidden_state[:, 0])
    )
    tower = small_config().vision
    config = QLIPVisionConfig(**tower.__dict__, quantized_features=True, hidden_size_post_q=48)
    with pytest.raises(InputError, match="the quantizer gives 48 dimensions and the encoder 32"):
        QLIPVisionModel(config)


@torch.no_grad()
def test_pictures_of_other_sizes(small_model, folder):
    wide = torch.randn(1, 3, 16, 48)
    model = QLIPVisionModel.from_pretrained(folder)
    assert torch.equal(model(wide).last_hidden_state, small_model.vision_model(wide))
    with pytest.raises(InputError, match="holds no whole patches"):
        model(torch.randn(1, 3, 33, 32))
    replace_size = replace(small_model.config, image_size=(16, 48))
    model = QLIPModel(QLIPConfig(**replace_size.to_dict()))
    assert model.decode(model.quantize(model.encode(wide))).shape == wide.shape


def test_tables_are_filled_in_any_dtype(small_model, folder):
    """A buffer that is in no checkpoint is uninitialised memory after `from_pretrained`."""
    for dtype in (torch.float32, torch.bfloat16):
        model = QLIPModel.from_pretrained(folder, dtype=dtype)
        assert model.dtype == model.qlip.dtype == dtype
        ours, theirs = (dict(m.named_buffers()) for m in (small_model, model))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_random_weights():
    model = QLIPModel(QLIPConfig(**small_config().to_dict()))
    assert model.logit_scale.item() == pytest.approx(2.6592)
    vision = AutoModel.from_config(model.config.vision_config)
    assert type(vision) is QLIPVisionModel
    for parts in (model, vision):
        for name, weight in parts.named_parameters():
            assert weight.isfinite().all() and weight.abs().max() < 5, name
    assert 0.1 < vision.vision_model.encoder.layers[0].mlp.w1.weight.std() < 0.25  # 1/√32 = 0.177


# Loading and saving


def test_saved_models_have_the_published_names(small_model, folder, tmp_path, pixels):
    QLIPModel.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == small_model.state_dict().keys()
    again = qlip.load(tmp_path / "saved")
    assert again.config == small_model.config and again.id_hash() == small_model.id_hash()
    model = load_whole(AutoModel, tmp_path / "saved")
    assert type(model) is QLIPModel and model.config.model_type == "qlip"
    QLIPVisionModel.from_pretrained(folder, quantized_features=True).save_pretrained(tmp_path / "eye")
    eye = load_whole(AutoModel, tmp_path / "eye")
    assert type(eye) is QLIPVisionModel and eye.config.quantized_features
    assert all(key.startswith("vision_model.") for key in load_file(tmp_path / "eye" / "model.safetensors"))


def test_weights_have_one_place(folder):
    model = QLIPModel.from_pretrained(folder).to(torch.float64)
    model.visual_projection = torch.nn.Linear(32, 16)
    model.logit_scale = torch.nn.Parameter(torch.tensor(1.0))
    assert model.qlip.visual_projection is model.visual_projection
    assert model.qlip.logit_scale is model.logit_scale
    assert model.qlip.text_model.final_layer_norm.weight.dtype == torch.float64
    assert not any(name.startswith("qlip.") for name in model.state_dict())


def test_clip_stays_clip(folder, tmp_path):
    clip = CLIPModel(
        CLIPConfig(
            vision_config={"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1},
            text_config={"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 99},
        )
    )
    clip.save_pretrained(tmp_path / "clip")
    QLIPModel.from_pretrained(folder)
    loaded = load_whole(AutoModel, tmp_path / "clip")
    assert type(loaded) is CLIPModel
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in clip.state_dict().items())
    assert type(AutoConfig.from_pretrained(tmp_path / "clip")) is CLIPConfig
    for kind in (QLIPModel, QLIPVisionModel):
        with pytest.raises(InputError, match="no decoder_config in its config.json, so it is no QLIP"):
            kind.from_pretrained(tmp_path / "clip")


def test_a_published_checkpoint_loads_without_a_warning(folder, caplog):
    QLIPModel.from_pretrained(folder)
    QLIPVisionModel.from_pretrained(folder)
    assert not caplog.records


@pytest.mark.parametrize("attention", ["eager", "flash_attention_2"])
def test_other_attention_is_refused(folder, attention):
    with pytest.raises(InputError, match=f"attn_implementation='{attention}': QLIP computes attention by 'sdpa'"):
        QLIPVisionModel.from_pretrained(folder, attn_implementation=attention)
    assert (
        QLIPVisionModel.from_pretrained(folder, attn_implementation="sdpa").config._attn_implementation == "sdpa"
    )


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
@torch.no_grad()
def test_device_map(small_model, folder, pixels, device_map):
    pytest.importorskip("accelerate")
    model = QLIPModel.from_pretrained(folder, device_map=device_map)
    assert torch.equal(model.encode(pixels), small_model.encode(pixels))


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # logit_scale is in no submodule
@torch.no_grad()
def test_blocks_apart(small_model, folder, pixels, tmp_path):
    """Blocks that accelerate brings from the disk when their turn comes."""
    pytest.importorskip("accelerate")
    away = ("vision_model.encoder", "vision_model.quant_embed", "vision_decoder")
    stay = ("embeddings", "rope", "post_layernorm", "quant_embed_post")
    stay = ("text_model", "text_projection", "visual_projection", *(f"vision_model.{name}" for name in stay))
    device_map = dict.fromkeys(stay, "cpu") | dict.fromkeys(away, "disk") | {"logit_scale": "cpu"}
    model = QLIPModel.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert next(model.vision_decoder.parameters()).is_meta
    codes = model.quantize(model.encode(pixels))
    assert torch.equal(model.decode(codes), small_model.decode(small_model.quantize(small_model.encode(pixels))))


def test_gradient_checkpointing(folder, pixels):
    gradients = []
    model = QLIPVisionModel.from_pretrained(folder)
    for checkpointing in (False, True):
        switch(model, checkpointing)
        assert model.vision_model.encoder.recompute == model.gradient_checkpointing == checkpointing
        model.zero_grad()
        model(pixels).last_hidden_state.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 20 and all(map(torch.equal, *gradients))


def switch(model, checkpointing):
    with warnings.catch_warnings():  # newer versions have another name for it
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable() if checkpointing else model.gradient_checkpointing_disable()


# Pictures and words


def test_pixels_are_ours_bit_for_bit(small_model, folder, photos, tmp_path):
    processor, ours = QLIPImageProcessor.from_pretrained(folder), small_model.image_processor
    rng = np.random.default_rng(0)
    pictures = [Image.open(photos[0]), str(photos[1]), rng.integers(0, 256, (40, 70, 3), dtype=np.uint8)]
    pictures += [Image.fromarray(rng.integers(0, 256, (50, 30, 4), dtype=np.uint8)), torch.rand(3, 90, 33)]
    expected = ours(pictures)
    assert torch.equal(processor(images=pictures, return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(processor([[picture] for picture in pictures])["pixel_values"], expected)
    assert torch.equal(processor(pictures[0])["pixel_values"], expected[:1])
    assert np.array_equal(processor(pictures, return_tensors="np")["pixel_values"], expected.numpy())
    larger = processor(pictures, size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    assert torch.equal(larger["pixel_values"], ours.at_size((48, 48))(pictures))
    processor.save_pretrained(tmp_path / "saved")
    again = AutoImageProcessor.from_pretrained(tmp_path / "saved")
    assert type(again) is QLIPImageProcessor and torch.equal(again(pictures)["pixel_values"], expected)
    with pytest.raises(InputError, match="do_resize=false"):
        processor(pictures, do_resize=False)
    with pytest.raises(InputError, match="cannot be opened"):
        processor("nowhere.png")


@torch.no_grad()
def test_clip_pipeline_of_transformers(folder, photos):
    """What is written for CLIP takes a QLIP: zero-shot classification, unchanged."""
    model, words = QLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    eye = QLIPImageProcessor.from_pretrained(folder)
    classify = pipeline("zero-shot-image-classification", model=model, tokenizer=words, image_processor=eye)
    labels = ["red square", "blue square", "grey square"]
    found = classify(Image.open(photos[0]), candidate_labels=labels, hypothesis_template="a photo of a {}.")
    expected = qlip.load(folder).classify(photos[0], labels)[0]
    assert [f["score"] for f in sorted(found, key=lambda f: labels.index(f["label"]))] == pytest.approx(
        expected.tolist(), abs=1e-5
    )


def test_words_have_our_ids(small_model, tmp_path):
    export(small_model, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["a photo of a Red square.", "héllo  wörld", "", "grey " * 40]
    ids, mask = small_model.text_tokenizer(texts)
    theirs = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    assert torch.equal(theirs["input_ids"], ids) and torch.equal(theirs["attention_mask"], mask)


# LLaVA


@pytest.fixture
def llava(small_model, folder):
    """A random LLaVA that sees with the small tokenizer, and its processor."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    config = LlavaConfig(
        vision_config=QLIPVisionConfig.from_pretrained(folder, quantized_features=True),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(QLIPVisionModel.from_pretrained(folder).state_dict())
    processor = LlavaProcessor(
        QLIPImageProcessor.from_pretrained(folder), tokenizer, 8, "default", num_additional_image_tokens=1
    )
    return model, processor


@torch.no_grad()
def test_llava(small_model, llava, photos, tmp_path):
    model, processor = llava
    inputs = processor(images=Image.open(photos[0]), text="<image> a red square", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_index).sum() == 16
    seen = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits = model(**inputs).logits
    model(**inputs, vision_feature_layer=-2)
    expected = small_model(small_model.image_processor(photos[0]))
    assert torch.equal(seen[0], expected.quantized_features) and torch.equal(seen[1], expected.features)
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2

    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    again, reader = (c.from_pretrained(tmp_path / "llava") for c in (LlavaForConditionalGeneration, AutoProcessor))
    inputs = reader(images=Image.open(photos[0]), text="<image> a red square", return_tensors="pt")
    assert torch.equal(again(**inputs).logits, logits)
    switch(again, True)
    assert again.model.vision_tower.vision_model.encoder.recompute
    if "vision_tower.vision_model.post_layernorm.bias" in load_file(tmp_path / "llava" / "model.safetensors"):
        eye = load_whole(QLIPVisionModel, tmp_path / "llava")  # transformers 5.4 had other names
        assert torch.equal(eye(inputs["pixel_values"]).last_hidden_state[:, 1:], expected.quantized_features)
        eye.save_pretrained(tmp_path / "eye")
        assert all(key.startswith("vision_model.") for key in load_file(tmp_path / "eye" / "model.safetensors"))


# Folders that transformers loads


@torch.no_grad()
def test_export(small_model, tmp_path, pixels):
    export(small_model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "qlip"
    model = load_whole(AutoModel, tmp_path / "out")
    assert type(model) is QLIPModel and torch.equal(model.encode(pixels), small_model.encode(pixels))
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "out")) is QLIPImageProcessor
    again = qlip.load(tmp_path / "out")
    assert again.config == small_model.config and again.image_processor == small_model.image_processor
    small_model.image_processor = small_model.text_tokenizer = None
    export(small_model, tmp_path / "out")
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()


REMOTE = """
import importlib.util, sys
assert all(importlib.util.find_spec(name) is None for name in ("qlip", "pyarrow", "tyro", "accelerate"))
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

folder, photo, out = sys.argv[1:]
for place in (folder, out):
    model = AutoModel.from_pretrained(place, trust_remote_code=True)
    processor = AutoImageProcessor.from_pretrained(place, trust_remote_code=True)
    model.save_pretrained(out), processor.save_pretrained(out)
words = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = words(["a red square", "a blue square"], padding="max_length", return_tensors="pt")["input_ids"]
pixels = processor(photo, return_tensors="pt")["pixel_values"]
with torch.no_grad():
    output = model(ids, pixels)
    latents = model.encode(pixels)
found = {"pixels": pixels, "logits": output.logits_per_image, "latents": latents}
save_file({key: value.contiguous() for key, value in found.items()}, out + "/found.safetensors")
model.qlip.save(out + "/ours")
"""


@torch.no_grad()
def test_remote_code_where_open_qlip_is_not_installed(small_model, photos, tmp_path):
    export(small_model, tmp_path / "out")
    python = bare_venv(tmp_path / "venv", ["torch", "transformers", "pillow"])
    command = [python, "-I", "-c", REMOTE, tmp_path / "out", photos[0], tmp_path / "saved"]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    found = load_file(tmp_path / "saved" / "found.safetensors")
    pixels = small_model.image_processor(photos[0])
    ids, _ = small_model.text_tokenizer(["a red square", "a blue square"])
    output = small_model(pixels, ids)
    assert torch.equal(found["pixels"], pixels) and torch.equal(found["latents"], output.latents)
    close(found["logits"], output.logits_per_image, PIXELS)
    assert qlip.load(tmp_path / "saved" / "ours").id_hash() == small_model.id_hash()


def bare_venv(folder: Path, names: list[str]) -> Path:
    """A virtual environment of these installed libraries and what they need, and nothing else; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    found, todo = set(), list(names)
    while todo:
        distribution = importlib.metadata.distribution(todo.pop())
        if distribution.name not in found:
            found.add(distribution.name)
            for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
                if not (site / top).exists():
                    (site / top).symlink_to(distribution.locate_file(top))
            needs = map(Requirement, distribution.requires or [])
            todo += [need.name for need in needs if not need.marker or need.marker.evaluate({"extra": ""})]
    return folder / "bin" / "python"


# Versions


def test_what_is_missing_is_named(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(integration, "version", missing)
    with pytest.raises(
        InputError, match=r"needs the library `transformers`: pip install 'open-qlip\[transformers\]'"
    ):
        integration.check_version()


@pytest.mark.parametrize("installed", ["4.57.6", "6.0.0"])
def test_other_major_versions_are_refused(monkeypatch, installed):
    monkeypatch.setattr(integration, "version", lambda name: installed)
    with pytest.raises(InputError, match=rf"transformers {installed} is installed, .* 5\.x: pip install"):
        integration.check_version()
