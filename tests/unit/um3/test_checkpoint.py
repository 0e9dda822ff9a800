"""The folder is a stock Qwen3 to transformers: logits, words, greedy texts and pictures are the same there."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.unit.um3.conftest import small_um3, small_words

from qlip.errors import InputError
from qlip.jobs.um3_text import text_view
from qlip.lm import checkpoint as lm
from qlip.lm.generate import GREEDY
from qlip.model import checkpoint as tokenizer_checkpoint
from qlip.t2i import checkpoint as t2i_checkpoint
from qlip.um3 import checkpoint as um3_checkpoint
from qlip.um3.checkpoint import (
    add_image_specials,
    find,
    load,
    open_tokenizer,
    read_config,
    save,
    stored_dtype,
)
from qlip.um3.layout import image_tokens, text_to_image, visual_ids


def test_a_folder_is_read_again_to_the_bit(tiny_folder, tmp_path):
    model, words = load(tiny_folder), open_tokenizer(tiny_folder)
    assert {path.name for path in tiny_folder.iterdir()} == {
        "config.json", "model.safetensors", "um3.json", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert model.config.lm.qk_norm and model.config.num_visual == 2 * 2**14
    save(model, tmp_path, words, dtype=torch.bfloat16)
    assert stored_dtype(tmp_path) is torch.bfloat16 and stored_dtype(tiny_folder) is torch.float32
    again = load(tmp_path)
    assert again.config == model.config and again.dtype is torch.float32
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.bfloat16().float()), name
    assert open_tokenizer(tmp_path).to_str() == words.to_str()


def test_a_failure_leaves_what_was_there(tiny_folder, tmp_path, monkeypatch):
    model, words = load(tiny_folder), open_tokenizer(tiny_folder)
    save(model, tmp_path, words)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lm, "save_tensors", full)
    with pytest.raises(InputError, match="No space left on device"):
        save(load(tiny_folder), tmp_path, words, dtype=torch.bfloat16)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_bundled_name_comes_first_and_is_no_tokenizer(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "um3-small").symlink_to(tiny_folder)
    for module in (um3_checkpoint, tokenizer_checkpoint, t2i_checkpoint):
        monkeypatch.setattr(module, "BUNDLED", tmp_path)
    assert tokenizer_checkpoint.bundled() == t2i_checkpoint.bundled() == []
    assert um3_checkpoint.bundled() == ["um3-small"]
    assert find("um3-small") == tmp_path / "um3-small"
    with pytest.raises(InputError, match="'um3-large' is not a model of text and images: use a bundled one"):
        find("um3-large")


def test_what_does_not_fit_is_said(tiny_folder, tmp_path):
    model = load(tiny_folder)
    with pytest.raises(InputError, match=r"<\|boi\|> and <\|eoi\|> are ids \[None, None\] of the tokenizer"):
        save(model, tmp_path, small_words())
    with pytest.raises(InputError, match="is not a model of text and images: use a bundled one"):
        find(tmp_path)
    with pytest.raises(InputError, match=r"not a model of text and images \(um3.json"):
        load(tmp_path)
    shutil.copytree(tiny_folder, tmp_path / "copy")
    values = json.loads((tmp_path / "copy" / "um3.json").read_text())
    (tmp_path / "copy" / "um3.json").write_text(json.dumps(values | {"bits": 7}))
    with pytest.raises(InputError, match=r"lm.vocab_size is \d+, but these ids need"):
        read_config(tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="it belongs beside the model"):
        open_tokenizer(tmp_path / "copy")


def test_a_text_cannot_begin_a_picture(tiny_folder):
    words = open_tokenizer(tiny_folder)
    ids = words.encode("a <|boi|> mug </s>", add_special_tokens=False).ids
    assert not {1, 2, *add_image_specials(words)} & set(ids)
    assert words.decode(ids) == "a <|boi|> mug </s>"


@torch.no_grad()
def test_transformers_runs_what_is_exported(tiny_folder, tmp_path, run):
    """Logits up to 10: no difference in float32, as in tests/unit/lm; the tolerance is for other versions."""
    transformers = pytest.importorskip("transformers")
    from qlip.integrations.transformers.um3_logits import UM3LogitsProcessor

    code, _, err = run("export", tiny_folder, "--format", "transformers", "--out", tmp_path)
    assert code == 0, err
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs) is transformers.Qwen3ForCausalLM and not any(report.values())
    drawing = theirs.generation_config  # of itself it would draw from the 50 likeliest
    assert (drawing.do_sample, drawing.temperature, drawing.top_p, drawing.top_k) == (True, 1.0, 0.95, 0)
    ours, words = load(tiny_folder), open_tokenizer(tiny_folder)
    config = ours.config
    tokens = torch.randint(0, 2**28, (1, 64), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([text_to_image(words.encode("a red mug").ids, tokens[0], config)])
    torch.testing.assert_close(theirs(ids).logits, ours.lm.logits(ours.lm(ids)), rtol=0, atol=1e-5)

    names = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert names("a red mug <|boi|>", add_special_tokens=False).input_ids[-1] == config.boi
    prompt = names("<s>a red mug<|boi|>", add_special_tokens=False, return_tensors="pt").input_ids
    dynamic = transformers.dynamic_module_utils.get_class_from_dynamic_module
    shipped = dynamic("um3_logits.UM3LogitsProcessor", str(tmp_path))  # as without this package
    for kind in (UM3LogitsProcessor, shipped):
        rule = [kind(tmp_path)]
        drawn = theirs.generate(prompt, max_new_tokens=131, do_sample=False, logits_processor=rule)[
            0, prompt.shape[1] :
        ]
        expected = ours.draw([words.encode("a red mug").ids], GREEDY)
        assert torch.equal(image_tokens(drawn[None, :128], config), expected) and drawn[128] == config.eoi
    seen = torch.tensor([[config.bos, config.boi, *visual_ids(tokens[0], config), config.eoi]])
    said = theirs.generate(seen, max_new_tokens=20, do_sample=False, logits_processor=rule)[0, seen.shape[1] :]
    caption = ours.caption(tokens, max_tokens=20)[0]
    assert said.tolist()[: len(caption)] == caption
    with pytest.raises(InputError, match=r"is no UM3 \(um3.json"):
        UM3LogitsProcessor(tmp_path / "nothing")


@torch.no_grad()
def test_the_text_view_is_a_language_model(tiny_folder, tmp_path, run):
    transformers = pytest.importorskip("transformers")
    save(load(tiny_folder), tmp_path, open_tokenizer(tiny_folder))
    code, _, err = run("export", tiny_folder, "--text-only", "--out", tmp_path)
    assert code == 0 and "the language model is in" in err
    assert not (tmp_path / "um3.json").exists()
    ours, theirs = load(tiny_folder), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    first = ours.config.num_text
    assert theirs.config.vocab_size == first
    ids = torch.randint(3, 99, (2, 30))
    expected = ours.lm.logits(ours.lm(ids))[..., :first]
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=0, atol=1e-5)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == first
    with text_view(str(tiny_folder)) as view:  # what `qlip eval um3-text` gives to lm-eval
        assert (Path(view) / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_without_qk_norm_it_is_a_llama(tmp_path):
    words = small_words()
    language = {"vocab_size": words.get_vocab_size(), "tie_word_embeddings": True}
    boi, eoi = add_image_specials(words)
    model = small_um3(language=language, qk_norm=False, boi=boi, eoi=eoi)
    save(model, tmp_path, words)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert load(tmp_path).config == replace(model.config, lm=lm.read_config(tmp_path))


def test_export_refuses_what_is_for_tokenizers(tiny_folder, tmp_path, run):
    for message, arguments in (
        ("written as qlip or transformers", [tiny_folder, "--format", "onnx"]),
        ("is a UM3: leave out --checkpoint", [tiny_folder, "--image-size", "64"]),
        ("is no UM3, leave it out", ["qlip-tiny", "--text-only"]),
    ):
        code, _, err = run("export", *arguments, "--out", tmp_path / "out")
        assert code == 1 and message in err
    code, _, err = run("export", tiny_folder, "--out", tiny_folder)
    assert code == 1 and "holds the model itself" in err
