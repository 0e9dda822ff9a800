"""Exported to ONNX: what ONNX Runtime computes is what PyTorch computes."""

import json
import re
import shutil
import sys
from importlib.metadata import requires

import numpy as np
import pytest
import torch

import qlip
from qlip.bits import unpack
from qlip.errors import InputError
from qlip.integrations import onnx
from qlip.integrations.parts import NEAR_ZERO, read_export

runtime = pytest.importorskip("onnxruntime")


def outputs_of(folder, name, values):
    session = runtime.InferenceSession(folder / f"{name}.onnx")
    outputs = [output.name for output in session.get_outputs()]
    (given,) = session.get_inputs()
    return dict(zip(outputs, map(torch.from_numpy, session.run(None, {given.name: values.numpy()})), strict=True))


# qlip-tiny on photographs. Worst cases measured: latents 1.0e-6, embeddings 1.8e-7, images 5.4e-7.


@pytest.fixture(scope="module")
def tiny():
    return qlip.load("qlip-tiny")


@torch.no_grad()
def test_photographs_have_the_same_tokens(exported_tiny, tiny, photos):
    pixel_values = tiny.image_processor(photos)
    latents, tokens = tiny.encode(pixel_values), tiny.tokenize(photos)
    for part in (pixel_values, pixel_values[:1], pixel_values[:7]):
        found = outputs_of(exported_tiny, "encoder", part)
        count = len(part)
        differ = unpack(found["tokens"], 28) != unpack(tokens[:count], 28)
        assert not differ[latents[:count].abs() > NEAR_ZERO].any()
        assert found["tokens"].dtype == torch.int64 and found["tokens"].shape == (count, 64)
        assert (found["latents"] - latents[:count]).abs().max() < NEAR_ZERO
        assert (found["image_embeds"] - tiny.encode_image(part)).abs().max() < 1e-5
        own = unpack(found["tokens"], 28) == (found["latents"] > 0)
        assert own.all()  # integers, whatever the floats did


@torch.no_grad()
def test_photographs_are_rebuilt_the_same(exported_tiny, tiny, photos):
    tokens = tiny.tokenize(photos)
    assert tokens.max() > 2**24  # what float32 would round
    images = outputs_of(exported_tiny, "decoder", tokens)["images"]
    assert images.min() >= 0 and images.max() <= 1
    assert (images - tiny.detokenize(tokens)).abs().max() < 1e-5


@torch.no_grad()
def test_words_are_embedded_the_same_and_classify(exported_tiny, tiny, photos):
    labels = ["a tabby cat", "goldfish", "espresso", "windmill"]
    input_ids, _ = tiny.text_tokenizer([f"a photo of a {label}." for label in labels])
    text = outputs_of(exported_tiny, "text", input_ids)["text_embeds"]
    assert (text - tiny.encode_text(input_ids)).abs().max() < 1e-5
    image = outputs_of(exported_tiny, "encoder", tiny.image_processor(photos))["image_embeds"]
    scale = np.exp(read_export(exported_tiny, "onnx")["logit_scale"])
    probabilities = (scale * image @ text.T).softmax(-1)
    assert (probabilities - tiny.classify(photos, labels)).abs().max() < 1e-4


def test_the_folder_says_what_it_is(exported_tiny, tiny):
    found = read_export(exported_tiny, "onnx")
    assert found["id_hash"] == tiny.id_hash() and found["model"] == "qlip-tiny"
    assert found["versions"].keys() == {"open-qlip", "torch", "onnx", "onnxscript", "onnxruntime", "opset"}
    names = {path.name for path in exported_tiny.iterdir()}
    programs = {"encoder.onnx", "decoder.onnx", "text.onnx"}
    words = {"tokenizer.json", "tokenizer_config.json"}
    assert names == programs | words | {"config.json", "preprocessor_config.json", "export.json"}
    assert found["sha256"].keys() == programs
    with pytest.raises(InputError, match="holds an export and no model.safetensors: pass the tokenizer"):
        qlip.load(exported_tiny)


# Other models


@pytest.mark.slow
def test_other_models_as_onnx(other, tmp_path):
    agreement = onnx.export(other, tmp_path)
    assert agreement.num_bits == 4 * other.config.num_tokens * other.config.num_bits
    assert max(agreement.errors.values()) < 1e-5
    assert agreement.errors.keys() == {"latents", "image_embeds", "images", "text_embeds"}


@pytest.mark.slow
def test_large_weights_lie_beside_a_program(small_model, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "MAX_BYTES", 1000)
    onnx.export(small_model, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert read_export(tmp_path / "b", "onnx")["sha256"].keys() >= {"encoder.onnx", "encoder.onnx.data"}
    pixel_values = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = small_model.codes_to_tokens(small_model.quantize(small_model.encode(pixel_values)))
    assert onnx.OnnxEncoder.open(tmp_path / "b", "cpu").run(pixel_values).equal(expected)


# What is refused


def test_other_folders_are_refused(exported_tiny, tmp_path):
    with pytest.raises(
        InputError, match=r"'qlip-tiny' holds no export \(export.json\): make one with `qlip export"
    ):
        read_export("qlip-tiny", "onnx")
    with pytest.raises(InputError, match="holds an export for onnx, not for torch-export"):
        read_export(exported_tiny, "torch-export")
    folder = shutil.copytree(exported_tiny, tmp_path / "copy")
    (folder / "text.onnx").write_bytes(b"another")
    with pytest.raises(InputError, match=r"text\.onnx' is not the file of this export"):
        read_export(folder, "onnx")
    facts = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps(facts | {"format_version": 2}))
    with pytest.raises(InputError, match="version 2 of exports is newer than this open-qlip: upgrade"):
        read_export(folder, "onnx")
    (folder / "export.json").write_text("{}")
    with pytest.raises(InputError, match=r"export\.json' is damaged"):
        read_export(folder, "onnx")


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_or_old_library_is_named(small_model, tmp_path, monkeypatch, name):
    monkeypatch.setitem(onnx.LEAST, name, (99, 0))
    with pytest.raises(InputError, match=f"{name} is .*, ONNX needs 99.0 or later: pip install --upgrade"):
        onnx.export(small_model, tmp_path)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"ONNX needs the library `{name}`: pip install 'open-qlip\[export\]'"):
        onnx.export(small_model, tmp_path)


def test_the_least_versions_are_the_extras():
    declared = [re.match(r"(\w+)>=([\d.]+).*'?export'?", r) for r in requires("open-qlip")]
    assert {m[1]: tuple(map(int, m[2].split("."))) for m in declared if m and m[1] in onnx.LEAST} == onnx.LEAST


def test_a_device_that_is_not_there(exported_tiny, monkeypatch):
    monkeypatch.setattr(runtime, "get_available_providers", lambda: [onnx.CPU])
    for device in ("cuda", "mps"):
        with pytest.raises(
            InputError, match=f"device='{device}' is not to be had of this ONNX Runtime: use 'cpu'"
        ):
            onnx.OnnxEncoder.open(exported_tiny, device)
    monkeypatch.setattr(runtime, "get_available_providers", lambda: [onnx.CUDA, onnx.CPU])
    with pytest.raises(InputError, match="finds no GPU that it can use: pass --device cpu"):
        onnx.OnnxEncoder.open(exported_tiny, "cuda")
