"""Features: those of the tower and of transformers' own encoders, whatever company a text is in."""

import pytest
import torch

import qlip
from qlip.errors import InputError
from qlip.t2i.condition import FeatureFiles, TowerReader, open_reader, write_features

TEXTS = ["a red mug", "dog", "a photo of a dog on a beach, with a red ball."]


@pytest.fixture(scope="module")
def tokenizer():
    return qlip.load("qlip-tiny")


@pytest.fixture(scope="module")
def reader(tokenizer):
    return TowerReader(tokenizer, 20)


def test_the_end_tokens_state_is_what_the_tower_pools(tokenizer, reader):
    """Causal: with the padding and the mask of `encode_text` the states are the same."""
    pooled = tokenizer.text_model(*tokenizer.text_tokenizer(TEXTS))
    for row, expected, text in zip(reader(TEXTS, whole=True), pooled, TEXTS, strict=True):
        assert row.shape == (len(tokenizer.text_tokenizer.backend.encode(text).ids), reader.width)
        torch.testing.assert_close(row[-1], expected, rtol=0, atol=2e-6)


def test_a_text_is_the_same_alone_and_cut(tokenizer, reader):
    together = reader(TEXTS)
    for text, row in zip(TEXTS, together, strict=True):
        torch.testing.assert_close(reader([text])[0], row, rtol=0, atol=2e-6)
        torch.testing.assert_close(TowerReader(tokenizer, 4)([text])[0], row[:4], rtol=0, atol=2e-6)


def test_a_prompt_that_does_not_fit_is_refused(reader):
    long = "dog " * 30
    assert len(reader([long])[0]) == min(20, reader.vocabulary.context_length)
    with pytest.raises(InputError, match="has 32 tokens, this model reads"):
        reader([long], whole=True)


@pytest.mark.parametrize("kind", ["T5", "Bert", "CLIP"])
def test_encoders_are_those_of_transformers(tmp_path, tokenizer, kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vocabulary = tokenizer.text_tokenizer
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
    small = {
        "T5": {"d_model": 24, "d_kv": 8, "num_heads": 3, "num_layers": 2, "d_ff": 32, "is_gated_act": True},
        "Bert": size,
        "CLIP": {"text_config": {**size, "vocab_size": vocabulary.vocab_size}, "vision_config": size},
    }[kind]
    if kind != "CLIP":
        small["vocab_size"] = vocabulary.vocab_size
    config = getattr(transformers, f"{kind}Config")(**small)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(tmp_path)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary.backend, pad_token="<|endoftext|>", model_max_length=64
    )
    fast.save_pretrained(tmp_path)
    reader = open_reader(str(tmp_path), None, 12, "cpu")
    assert (reader.width, reader.num_text_tokens) == (24, 12)
    encoder = {"T5": lambda: model.encoder, "Bert": lambda: model, "CLIP": lambda: model.text_model}[kind]()
    for text, row in zip(TEXTS, reader(TEXTS), strict=True):
        ids = fast(text, return_tensors="pt", truncation=True, max_length=12)["input_ids"]
        expected = encoder(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="this model reads 12"):
        reader(["dog " * 30], whole=True)


def test_features_of_a_file_are_those_of_its_reader(tmp_path, reader):
    path, rest = tmp_path / "features.safetensors", tmp_path / "rest.safetensors"
    assert write_features(path, reader, [*TEXTS[:2], TEXTS[0]], torch.float32) == 2
    assert write_features(rest, reader, TEXTS[2:]) == 1
    files = FeatureFiles([path, rest])
    assert (files.name, files.width, files.num_text_tokens) == ("qlip", reader.width, reader.num_text_tokens)
    for found, expected, tolerance in zip(files(TEXTS), reader(TEXTS), (2e-6, 2e-6, 5e-3), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    with pytest.raises(InputError, match="no feature file holds the text 'a cat'"):
        files(["a cat"])


def test_files_of_something_else_are_refused(tmp_path, tokenizer, reader):
    write_features(tmp_path / "a.safetensors", reader, TEXTS)
    write_features(tmp_path / "b.safetensors", TowerReader(tokenizer, 5), TEXTS)
    with pytest.raises(InputError, match="of several readers"):
        FeatureFiles([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    (tmp_path / "c.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="holds no features"):
        FeatureFiles([tmp_path / "c.safetensors"])
    with pytest.raises(InputError, match="no texts to read"):
        write_features(tmp_path / "d.safetensors", reader, [])
    with pytest.raises(InputError, match="no encoder of transformers"):
        pytest.importorskip("transformers")
        open_reader(str(tmp_path), None, 5, "cpu")
