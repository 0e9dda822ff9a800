"""Checkpoints in and out: the published layout, bit for bit, and what is wrong with a broken one."""

import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import qlip
from qlip.errors import InputError
from qlip.model import PRESETS, QLIP, QLIPConfig, checkpoint, init_from
from qlip.model.image import ImageProcessor
from qlip.model.text import TextTokenizer

TESTS = Path(__file__).parents[2]
GOLDEN = TESTS / "golden" / "cases"
MANIFESTS = {name: TESTS / "data" / "manifests" / f"{name}.json" for name in ("b16-256", "b8-256", "l14-392")}
CONFIG = QLIPConfig.from_dict(json.loads((GOLDEN / "published-settings" / "config.json").read_text()))


@pytest.fixture(scope="session")
def words():
    return TextTokenizer.train(["a photo of a cat", "the red car"], 560, CONFIG.text.max_position_embeddings)


@pytest.fixture
def model(words):
    torch.manual_seed(0)
    size = CONFIG.vision.image_size
    return QLIP(
        replace(CONFIG, text=replace(CONFIG.text, vocab_size=words.vocab_size)),
        image_processor=ImageProcessor(resize=size + 4, crop=size, mean=(0.5, 0.4, 0.3)),
        text_tokenizer=words,
    )


@pytest.fixture
def folder(model, tmp_path):
    model.save(tmp_path / "mine")
    return tmp_path / "mine"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


def edit_weights(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    tensors = {key: value.clone() for key, value in tensors.items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("case", ["published-settings", "eva-tiny", "grouped-entropy", "plain-clip"])
def test_reads_what_the_release_wrote(case):
    model = qlip.load(GOLDEN / case)
    expected = load_file(GOLDEN / case / "expected.safetensors")
    with torch.inference_mode():
        output = model(expected["pixel_values"], expected["input_ids"])
    assert torch.equal(output.codes > 0, expected["quantized"] > 0)
    torch.testing.assert_close(output.image_embeds, expected["image_embeds"], rtol=0, atol=1e-6)
    torch.testing.assert_close(output.text_embeds, expected["text_embeds"], rtol=0, atol=1e-6)
    torch.testing.assert_close(output.reconstructions, expected["reconstructions"], rtol=0, atol=1e-5)
    assert model.name == case
    assert model.image_processor is None and model.text_tokenizer is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_saved_and_loaded_is_the_same(model, tmp_path, dtype):
    model.to(dtype).save(tmp_path / "mine")
    loaded = qlip.load(str(tmp_path / "mine"), dtype=dtype)
    assert_same_weights(model, loaded)
    assert loaded.config == model.config
    assert loaded.image_processor == model.image_processor
    assert torch.equal(loaded.text_tokenizer("a red cat")[0], model.text_tokenizer("a red cat")[0])
    assert loaded.name == "mine" and not loaded.training
    assert all(p.requires_grad and isinstance(p, torch.nn.Parameter) for p in loaded.parameters())
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert loaded.id_hash() == model.id_hash()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_for_another_size(folder, model, dtype, tmp_path):
    loaded = qlip.load(folder, image_size=(48, 80), dtype=dtype)
    assert_same_weights(loaded, model.to(dtype))
    assert loaded.id_hash() == model.id_hash()
    assert loaded.config.size == loaded.image_processor.size == (48, 80)
    tokens = loaded.tokenize(torch.rand(2, 3, 100, 200))
    assert tokens.shape == (2, loaded.config.num_tokens) and loaded.detokenize(tokens).shape == (2, 3, 48, 80)
    loaded.save(tmp_path / "wide")
    again = qlip.load(tmp_path / "wide", dtype=dtype)
    assert again.config == loaded.config and again.image_processor == loaded.image_processor
    assert torch.equal(again.tokenize(torch.zeros(3, 90, 90)), loaded.tokenize(torch.zeros(3, 90, 90)))
    native = qlip.load(tmp_path / "wide", dtype=dtype, image_size=32)
    assert native.config == model.config and native.image_processor == model.image_processor
    native.save(tmp_path / "native")
    for file in ("config.json", "preprocessor_config.json"):
        assert (tmp_path / "native" / file).read_bytes() == (folder / file).read_bytes()


def test_another_size_is_that_of_a_model_built_for_it(folder, model):
    """`init_from` resizes the positions themselves, once and for all."""
    ours = qlip.load(folder, image_size=48)
    vision, decoder = (replace(tower, image_size=48) for tower in (model.config.vision, model.config.decoder))
    built = QLIP(replace(model.config, vision=vision, decoder=decoder)).eval()
    init_from(built, folder, "qlip")
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected, output = built(pixels), ours(pixels)
    for name in ("image_embeds", "latents", "reconstructions"):
        torch.testing.assert_close(getattr(output, name), getattr(expected, name), rtol=0, atol=1e-5)


@pytest.mark.parametrize("image_size", [33, (32, 20), (0, 32), (-32, 32), (32,), "64", (48.0, 32)])
def test_a_size_of_no_whole_patches_is_refused(folder, image_size):
    with pytest.raises(InputError, match="image_size"):
        qlip.load(folder, image_size=image_size)


def test_converts_when_saving_and_when_loading(model, tmp_path):
    model.save(tmp_path, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert model.dtype == torch.float32
    assert_same_weights(qlip.load(tmp_path), model.to(torch.bfloat16).float())


def test_rotary_tables_stay_in_float32(folder):
    loaded, cast = qlip.load(folder, dtype=torch.bfloat16), qlip.load(folder).to(torch.bfloat16)
    assert {b.dtype for b in (*loaded.buffers(), *cast.buffers())} == {torch.float32}
    size = loaded.config.vision.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert loaded.id_hash() == cast.id_hash()
    assert torch.equal(loaded.encode(pixels), cast.encode(pixels))


def test_saves_what_is_not_contiguous(model, tmp_path):
    weight = model.visual_projection.weight
    weight.data = weight.data.T.contiguous().T
    model.save(tmp_path)
    assert_same_weights(model, qlip.load(tmp_path))


def test_everyone_who_may_read_the_config_may_read_the_weights(folder):
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_a_loaded_model_gives_the_same_tokens(model, folder):
    picture = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(qlip.load(folder).tokenize(picture), model.eval().tokenize(picture))


# The file stays where it is


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_weights_stay_mapped_from_the_file(folder):
    model = qlip.load(folder)
    spans = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(folder / "model.safetensors"))
    ]
    for name, weight in model.named_parameters():
        assert any(start <= weight.data_ptr() < end for start, end in spans), f"{name} was copied"


def test_training_does_not_change_the_file(folder):
    before = contents(folder)
    model = qlip.load(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.train()(torch.randn(2, 3, 32, 32)).reconstructions.square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.zero_()
    assert contents(folder) == before
    assert not torch.equal(qlip.load(folder).logit_scale, model.logit_scale)


def test_saves_over_the_folder_that_it_came_from(folder):
    model = qlip.load(folder)
    with torch.no_grad():
        for parameter in list(model.parameters())[::2]:
            parameter.add_(1)
    model.save(folder)
    assert_same_weights(model, qlip.load(folder))


def test_another_model_saved_over_the_folder_does_not_change_a_loaded_one(folder, model):
    loaded = qlip.load(folder)
    other = QLIP(model.config)
    other.save(folder)
    assert_same_weights(loaded, model)
    assert_same_weights(qlip.load(folder), other)


def test_loading_draws_no_random_numbers(folder):
    state = torch.get_rng_state()
    qlip.load(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_importing_is_cheap_and_loading_does_not_import_the_compiler(folder):
    script = (
        "import sys, qlip; assert 'torch' not in sys.modules; qlip.__version__;"
        "assert 'load' in dir(qlip) and 'torch' not in sys.modules; qlip.load(sys.argv[1]);"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, folder], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qlip.nothing
    assert qlip.QLIP is QLIP and qlip.QLIPConfig is QLIPConfig


# The published layout


@pytest.mark.parametrize("layers", [False, True])
def test_stored_tables_are_ignored(model, folder, layers):
    def add_tables(tensors):
        for tower in ("vision_model", "vision_decoder"):
            places = [f"{tower}.encoder.layers.{i}.self_attn" for i in range(2)] if layers else [tower]
            for place in places:
                tensors[f"{place}.rope.freqs_cos"] = torch.zeros(16, 12)
                tensors[f"{place}.rope.freqs_sin"] = torch.zeros(16, 12)
        for tower in ("vision_model", "text_model"):
            tensors[f"{tower}.embeddings.position_ids"] = torch.arange(16)[None]

    edit_weights(folder, add_tables)
    assert_same_weights(model, qlip.load(folder))


@pytest.mark.parametrize("name", MANIFESTS)
def test_presets_have_the_published_keys_shapes_and_sizes(name):
    manifest = json.loads(MANIFESTS[name].read_text())
    config = QLIPConfig.from_dict(manifest["config"])
    assert config == PRESETS[name] == QLIPConfig.from_dict(config.to_dict())
    with torch.device("meta"):
        model = QLIP(config)
    shapes = {key: shape for key, shape in manifest["keys"].items() if ".rope." not in key}
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == shapes
    assert sum(p.numel() for p in model.parameters()) == manifest["parameters"]


@pytest.mark.parametrize("name", ["b16-256", "b8-256", pytest.param("l14-392", marks=pytest.mark.slow)])
def test_full_size_checkpoint_in_the_published_layout(name, tmp_path):
    manifest = json.loads(MANIFESTS[name].read_text())
    theirs, ours = tmp_path / f"QLIP-{name}", tmp_path / "ours"
    theirs.mkdir()
    (theirs / "config.json").write_text(json.dumps(manifest["config"]))
    tensors = {
        key: torch.randint(2**14, shape, dtype=torch.int16).view(torch.bfloat16)  # quicker than randn
        for key, shape in manifest["keys"].items()
    }
    save_file(tensors, theirs / "model.safetensors")
    model = qlip.load(theirs, dtype=torch.bfloat16)
    model.save(ours)
    loaded = qlip.load(ours, dtype=torch.bfloat16).state_dict()
    kept = {key: value for key, value in tensors.items() if ".rope." not in key}
    assert loaded.keys() == kept.keys()
    assert all(torch.equal(loaded[key], kept[key]) for key in kept)
    assert sum(value.numel() for value in loaded.values()) == manifest["parameters"]
    shutil.rmtree(theirs)
    shutil.rmtree(ours)


def test_config_spells_every_value_and_reads_back(folder, model):
    config = json.loads((folder / "config.json").read_text())
    assert QLIPConfig.from_dict(config) == model.config
    assert config["vision_config"]["quantizer_cfg"]["embed_dim"] == 28


def test_the_preprocessor_of_the_published_b8_is_mended(tmp_path, caplog):
    vision = replace(CONFIG.vision, image_size=256, patch_size=8)
    small = QLIP(replace(CONFIG, vision=vision, decoder=vision))
    small.image_processor = ImageProcessor(resize=392, crop=256)
    small.save(tmp_path)
    with caplog.at_level(logging.WARNING, "qlip"):
        loaded = qlip.load(tmp_path)
    assert loaded.image_processor == ImageProcessor(resize=256, crop=256)
    assert [r.name for r in caplog.records] == ["qlip"] and "preprocessor_config.json" in caplog.text
    caplog.clear()
    loaded.save(tmp_path)
    assert qlip.load(tmp_path).image_processor == ImageProcessor(resize=256, crop=256)
    assert not caplog.records


def test_another_resize_is_kept(folder, model, caplog):
    assert model.image_processor.resize != model.image_processor.crop
    assert qlip.load(folder).image_processor == model.image_processor
    assert not caplog.records


def test_vocabulary_takes_the_models_context(folder, model):
    edit_json(folder / "tokenizer_config.json", model_max_length=77)
    assert qlip.load(folder).text_tokenizer.context_length == model.config.text.max_position_embeddings


# Which checkpoint


def test_a_bundled_name_comes_first(folder, model, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path)
    (tmp_path / "not-one").mkdir()
    assert checkpoint.bundled() == ["mine"]
    assert qlip.load("mine").name == "mine"
    with pytest.raises(InputError, match=r"'yours' is not known: use a bundled tokenizer \(mine\), a folder, or"):
        qlip.load("yours")
    with pytest.raises(InputError, match="'mine' is not known"):
        qlip.load(Path("mine"))  # a path is never a name


def test_a_folder_is_called_by_its_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert qlip.load(".").name == qlip.load(f"{folder}/").name == "mine"


def test_a_folder_comes_before_the_hub(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    assert qlip.load(f"{folder.parent.name}/mine").name == "mine"


@pytest.mark.parametrize("name", ["nothing", "/nothing/here", "a/b/c", "./a/b", "../a", "", "a\0b"])
def test_unknown_names_list_the_possibilities(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"use a bundled tokenizer .* a folder, or |has no model.safetensors"):
        qlip.load(name)


def test_a_revision_is_for_the_hub(folder):
    with pytest.raises(InputError, match=r"revision='v1': .*mine' is no Hugging Face repository"):
        qlip.load(folder, revision="v1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.int8}, "dtype=torch.int8: weights are one of torch.float32"),
        ({"dtype": torch.float8_e4m3fn}, "dtype=torch.float8_e4m3fn"),
        ({"device": "nowhere"}, "device='nowhere' is not to be had .*: use 'cpu'"),
    ],
)
def test_wrong_options_are_named(folder, options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        qlip.load(folder, **options)


# Broken checkpoints


def without(name):
    return lambda folder: (folder / name).unlink()


def holding(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def renamed(name, to):
    return lambda folder: (folder / name).rename(folder / to)


def cut(folder):
    os.truncate(folder / "model.safetensors", 100_000)


def without_section(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["decoder_config"]
    (folder / "config.json").write_text(json.dumps(config))


def with_weights(edit):
    return lambda folder: edit_weights(folder, edit)


def drop_four(tensors):
    for key in [key for key in tensors if "q_proj.weight" in key][:4]:
        del tensors[key]


def rename_one(tensors):
    tensors["visual.proj"] = tensors.pop("logit_scale")


def reshape_one(tensors):
    tensors["visual_projection.weight"] = torch.zeros(3, 5)


def cast_one(tensors):
    tensors["logit_scale"] = torch.tensor(3, dtype=torch.int8)


def larger_crop(folder):
    edit_json(folder / "preprocessor_config.json", crop_size={"height": 64, "width": 64})


def larger_vocabulary(folder):
    TextTokenizer.train(["words that the model has never embedded at all"] * 2, 600, 16).save(folder)


WEIGHTS = "model.safetensors"
BROKEN = {
    "no config": (without("config.json"), r"config.json' is not a usable model configuration: No such file"),
    "config not JSON": (
        holding("config.json", b"{"),
        r"config.json' is not a usable model configuration: it is not valid JSON",
    ),
    "config not text": (holding("config.json", b"\xff\xfe\x00"), r"config.json' is not a usable"),
    "config a list": (holding("config.json", b"[]"), r"config.json' is not a usable .* \[\], not an object"),
    "config of another model": (holding("config.json", b"{}"), r"config.json' .* no section 'vision_config'"),
    "config without decoder": (without_section, r"config.json' .* no section 'decoder_config'"),
    "no weights": (without(WEIGHTS), r"mine' has no model.safetensors"),
    "pickle": (
        renamed(WEIGHTS, "pytorch_model.bin"),
        r"has pytorch_model.bin .* pickle can run any code, so convert",
    ),
    "ckpt": (renamed(WEIGHTS, "last.ckpt"), r"has last.ckpt and no model.safetensors: loading a pickle"),
    "pt": (renamed(WEIGHTS, "ema.pt"), r"has ema.pt and no model.safetensors: loading a pickle"),
    "shards": (
        renamed(WEIGHTS, WEIGHTS + ".index.json"),
        r"weights in shards: join them into one model.safetensors",
    ),
    "empty": (holding(WEIGHTS, b""), r"model.safetensors' is not a whole safetensors file"),
    "not safetensors": (
        holding(WEIGHTS, b"PK\x03\x04" * 100),
        r"model.safetensors' is not a whole safetensors file",
    ),
    "truncated": (cut, r"model.safetensors' is not a whole safetensors file .*: fetch it again"),
    "LFS pointer": (holding(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), r"run `git lfs pull`"),
    "missing keys": (with_weights(drop_four), r"model.safetensors' .* it lacks '\S+', '\S+', '\S+' and 1 more$"),
    "renamed key": (with_weights(rename_one), r"it lacks 'logit_scale'; it has besides 'visual.proj'$"),
    "wrong shape": (
        with_weights(reshape_one),
        r"shapes differ: 'visual_projection.weight' is \(3, 5\), not \(24, 48\)$",
    ),
    "wrong dtype": (with_weights(cast_one), r"these are no weights: 'logit_scale' is I8$"),
    "larger crop": (
        larger_crop,
        r"preprocessor_config.json' crops to 64 × 64 pixels, .* takes 32 × 32",
    ),
    "preprocessor": (holding("preprocessor_config.json", b"3"), r"preprocessor_config.json' is not a usable"),
    "larger vocabulary": (larger_vocabulary, r"vocabulary has \d+ ids, but the model embeds \d+"),
    "vocabulary": (holding("tokenizer.json", b"{}"), r"tokenizer.json' is not a usable vocabulary"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_checkpoint_is_explained_on_one_line(folder, fault):
    break_it, message = BROKEN[fault]
    break_it(folder)
    with pytest.raises(InputError) as raised:
        qlip.load(folder)
    text = str(raised.value)
    assert re.search(message, text), text
    assert "\n" not in text and str(folder) in text


def test_a_file_in_place_of_the_folder(folder):
    with pytest.raises(InputError, match=r"model.safetensors' is a file: pass the folder"):
        qlip.load(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model.pth")
    with pytest.raises(InputError, match=r"model.pth .* pickle can run any code"):
        qlip.load(folder / "model.pth")


def test_any_cut_of_the_weights_is_found(folder):
    data = (folder / "model.safetensors").read_bytes()
    for size in [*range(0, 16), 1000, len(data) // 2, len(data) - 1]:
        (folder / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(InputError, match="not a whole safetensors file"):
            qlip.load(folder)


# Saving that fails


def test_saving_replaces_what_another_model_left(folder, model):
    (folder / "special_tokens_map.json").write_text('{"eos_token": "gone"}')
    (folder / "README.md").write_text("mine")
    model.text_tokenizer = None
    model.save(folder)
    assert set(contents(folder)) == {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    assert qlip.load(folder).text_tokenizer is None


FULL = "No space left on device"


@pytest.mark.parametrize("error", [SafetensorError(f"I/O error: {FULL} (os error 28)"), OSError(28, FULL)])
def test_a_full_disk_leaves_what_was_there(folder, model, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    before = contents(folder)
    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(InputError, match=rf"mine' cannot be written \(.*{FULL}.*\): use another"):
        model.save(folder)
    assert contents(folder) == before


def test_a_file_that_may_not_grow_leaves_what_was_there(folder, model):
    before = contents(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InputError, match="cannot be written"):
            model.save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(folder) == before


def test_an_unwritable_place_is_named(model, tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(InputError, match=f"{place}' cannot be written"):
            model.save(tmp_path / place)


def test_saving_takes_floating_dtypes_only(model, tmp_path):
    with pytest.raises(InputError, match=r"dtype=torch.int32: weights are one of"):
        model.save(tmp_path / "mine", dtype=torch.int32)
    assert not (tmp_path / "mine").exists()
