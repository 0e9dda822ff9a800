"""A smaller vocabulary: what it keeps is as it was, and everything else still comes back."""

import json
from pathlib import Path

import pytest
import torch
from tests.unit.um3.conftest import base
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qlip.errors import InputError
from qlip.lm import checkpoint as lm
from qlip.um3.prune import prune

CORPUS = [
    "Once upon a time there was a red dog. He liked to play with his red ball in the garden.",
    "The parliament discussed extraordinary measures; nevertheless, everybody disagreed about everything.",
    "A very long conversation about philosophy, biology, thermodynamics and architecture followed.",
] * 3
USED = ["Once upon a time there was a red dog.", "He liked to play in the garden."]
STRANGE = ["Ünïcode 日本 🎉\n\n  twice ", "parliamentary thermodynamics", "", "x"]


def over_bytes(specials: list[str]) -> Tokenizer:
    """As Llama-3's: bytes as characters, words cut beforehand, special tokens last."""
    words = Tokenizer(models.BPE(ignore_merges=True))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=520, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    words.train_from_iterator(CORPUS, trainer)
    words.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    begin = words.token_to_id(specials[0])
    template = processors.TemplateProcessing(f"{specials[0]} $A", None, [(specials[0], begin)])
    words.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return words


def with_fallback(specials: list[str]) -> Tokenizer:
    """As Llama-2's: whole texts, `▁` for blanks, bytes for characters that it does not know."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=260, show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", *specials, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(pair) for pair in learnt["merges"]]
    words = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    words.normalizer = trained.normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    words.decoder = decoders.Sequence(steps)
    words.post_processor = processors.TemplateProcessing(f"{specials[0]} $A", None, [(specials[0], 1)])
    words.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", *specials)])
    return words


def write(folder: Path, words: Tokenizer, **changes) -> Path:
    begin, end = (words.token_to_id(token) for token in ("<s>", "</s>"))
    shape = {"vocab_size": words.get_vocab_size() + 3, "bos_token_id": begin, "eos_token_id": (end, begin)}
    lm.save(base(**shape | changes), folder)
    words.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    settings["added_tokens_decoder"] = {str(begin): {"content": "<s>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [over_bytes, with_fallback])
def test_kept_tokens_are_as_they_were_and_all_else_comes_back(tmp_path, kind, tied):
    transformers = pytest.importorskip("transformers")
    words = kind(["<s>", "</s>"])
    folder = write(tmp_path / "whole", words, tie_word_embeddings=tied)
    count = 340
    assert prune(folder, USED * 2, count, tmp_path / "pruned") == count < words.get_vocab_size()
    load = transformers.AutoModelForCausalLM.from_pretrained, transformers.AutoTokenizer.from_pretrained
    (model, old), (smaller, new) = ([of(where) for of in load] for where in (folder, tmp_path / "pruned"))
    assert smaller.config.vocab_size == count == len(new)
    rows = torch.tensor([old.convert_tokens_to_ids(new.convert_ids_to_tokens(i)) for i in range(count)])
    assert torch.equal(rows, rows.sort().values)
    kept = set(new.get_vocab())
    for text in USED:
        before, after = old(text, return_tensors="pt"), new(text, return_tensors="pt")
        assert kept >= set(old.convert_ids_to_tokens(before["input_ids"][0]))
        assert torch.equal(rows[after["input_ids"]], before["input_ids"])
        with torch.no_grad():
            one, other = (of(ids["input_ids"]).logits for of, ids in ((model, before), (smaller, after)))
        torch.testing.assert_close(other, one[..., rows], rtol=0, atol=1e-5)
    for text in [*CORPUS, *STRANGE]:
        ids = new(text)["input_ids"]
        assert ids[0] == new.bos_token_id == smaller.config.bos_token_id
        assert new.decode(ids, skip_special_tokens=True).strip() == text.strip()
        if kept >= set(old.convert_ids_to_tokens(old(text)["input_ids"])):
            assert rows[ids].tolist() == old(text)["input_ids"]
    assert smaller.config.eos_token_id == [new.eos_token_id, new.bos_token_id]


def test_every_piece_on_the_way_to_a_token_is_kept(tmp_path):
    folder = write(tmp_path / "whole", with_fallback(["<s>", "</s>"]))
    prune(folder, USED, 330, tmp_path / "pruned")
    values = json.loads((tmp_path / "pruned" / "tokenizer.json").read_text())["model"]
    assert {i for i in values["vocab"].values()} == set(range(330))
    made = {"".join(pair) for pair in values["merges"]}
    assert all({*pair} <= values["vocab"].keys() for pair in values["merges"])
    assert all(token in made for token in values["vocab"] if len(token) > 1 and not token.startswith("<"))


def test_what_cannot_be_pruned(tmp_path):
    folder = write(tmp_path / "whole", with_fallback(["<s>", "</s>"]))
    with pytest.raises(InputError, match="num_text is 258, and 259 tokens are special or bytes: keep more"):
        prune(folder, USED, 258, tmp_path / "pruned")
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    with pytest.raises(InputError, match="is no BPE tokenizer"):
        prune(folder, USED, 300, tmp_path / "pruned")
    with pytest.raises(InputError, match=r"tokenizer.json cannot be read .*: name the folder of a Llama"):
        prune(tmp_path, USED, 300, tmp_path / "pruned")
