"""The text tokenizer against `transformers.CLIPTokenizer`, on CLIP's own table."""

import gzip
import json
import random
import string
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from qlip.errors import InputError
from qlip.model.text import TextTokenizer

MERGES = Path(__file__).parents[2] / "data" / "clip_merges.txt.gz"
SPECIALS = ["<|startoftext|>", "<|endoftext|>"]

TEXTS = [
    *["", " ", "\n\t \r\n", "a", "A photo of a CAT.", "  two   spaces\tand tabs  ", "trailing space "],
    *["it's we're I'm they'll he'd we've can't DON'T", "rock'n'roll 'quoted' 's", "o'clock’s curly"],
    *["0123456789 3.14 1,000 v2.0", "½ ² Ⅷ ٣ १२", "$5 €10 50% #1 @home a_b-c/d\\e", "!!! ... ??? --- ***"],
    *["café CAFÉ cafe\u0301 ÀÉÎÕÜ ñ ç ß ẞ ﬁ Ω Å Å", "İstanbul ı ǅ", "naïve façade déjà-vu Zürich"],
    *[
        "猫の写真",
        "中文字符,标点。",
        "한국어 텍스트",
        "русский ТЕКСТ",
        "ελληνικά ΣΊΣΥΦΟΣ",
        "عربي",
        "עברית",
        "हिन्दी",
    ],
    *[
        "😀",
        "👩‍👩‍👧‍👦 family",
        "🇩🇪 flag",
        "❤️ ♥",
        "a😀b",
        "x\u200by",
        "\ufeffbom",
        "soft\u00adhyphen",
        "\u00a0nbsp\u3000",
    ],
    *[
        "&amp; <b>bold</b> &lt;p&gt;",
        "<div class='x'>",
        "http://a.b/c?d=e&f=g",
        "me@x.org",
        "\x00\x01\x7f\x85\x1c",
    ],
    *[
        "<|endoftext|>",
        "a <|startoftext|> b",
        "<|endoftext|>tail",
        "<|ENDOFTEXT|>",
        "<|endoftext|",
        "</w> x</w>",
    ],
    *[
        "word " * 200,
        "x" * 5000,
        "é" * 300,
        "😀" * 100,
        "antidisestablishmentarianism " * 20,
        "a" * 75,
        "a " * 75,
    ],
]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """CLIP's vocab.json and merges.txt, as its checkpoints on the hub have them."""
    folder = tmp_path_factory.mktemp("clip")
    lines = gzip.decompress(MERGES.read_bytes()).decode().split("\n")[1:-1]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(c + "</w>" for c in letters), *(line.replace(" ", "") for line in lines), *SPECIALS]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def clip(clip_folder):
    return TextTokenizer.find(clip_folder, 77)


@pytest.fixture(scope="session")
def reference(clip_folder):
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPTokenizer.from_pretrained(clip_folder)


@pytest.fixture(scope="session")
def small():
    return TextTokenizer.train(["a photo of a cat", "a photo of two cats", "the red car"] * 3, 560, 16)


def assert_agrees(tokenizer, reference, texts):
    input_ids, attention_mask = tokenizer(texts)
    length = tokenizer.context_length
    options = dict(padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    for text, ids, mask in zip(texts, input_ids, attention_mask, strict=True):
        expected = reference(text, **options)
        assert torch.equal(ids[None], expected["input_ids"]), repr(text)
        assert torch.equal(mask[None], expected["attention_mask"]), repr(text)


def test_agrees_with_transformers(clip, reference):
    assert_agrees(clip, reference, TEXTS)


def test_agrees_on_random_strings(clip, reference):
    rng = random.Random(0)
    pools = [
        string.printable,
        "abc '.,!?0 1é",
        "".join(map(chr, range(0x80, 0x600))),
        "猫写 真😀\u0301\u200d ａＢ<|>",
    ]
    texts = ["".join(rng.choices(rng.choice(pools), k=rng.randrange(60))) for _ in range(400)]
    texts += ["".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(9))]
    assert_agrees(clip, reference, texts)


def test_agrees_at_other_context_lengths(clip_folder, reference):
    for length in (2, 3, 16):
        assert_agrees(TextTokenizer.find(clip_folder, length), reference, ["", "a", "one two three four " * 9])


def test_known_ids(clip):
    """What OpenAI's own tokenizer gives, from CLIP's documentation."""
    assert (clip.vocab_size, clip.bos_token_id, clip.eos_token_id, clip.pad_token_id) == (
        49408,
        49406,
        49407,
        49407,
    )
    assert clip("hello world!")[0][0, :6].tolist() == [49406, 3306, 1002, 256, 49407, 49407]


def test_layout(clip):
    ids, mask = clip(["a cat", "a cat " * 100])
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.shape == mask.shape == (2, 77)
    assert mask.sum(1).tolist() == [4, 77]
    assert ids[1, -1] == clip.eos_token_id
    assert clip("a cat")[0].shape == (1, 77)
    assert clip([])[0].shape == clip([])[1].shape == (0, 77)
    assert torch.equal(clip(("a cat", "x"))[0], clip(["a cat", "x"])[0])


def test_decode(clip, reference):
    for text in ["A photo of a cat.", "Müller's 猫 😀", "", "it's 3.14"]:
        ids, _ = clip(text)
        assert clip.decode(ids[0]) == reference.decode(ids[0], skip_special_tokens=True)
    assert clip.decode([320, 2368]) == "a cat"
    with pytest.raises(InputError, match="one row"):
        clip.decode(clip(["a", "b"])[0])
    for ids in ([49408], [-1], [2**40]):
        with pytest.raises(InputError, match="another vocabulary"):
            clip.decode(ids)


@pytest.mark.parametrize("texts", [3, None, ["a", 3], [b"a"], ["a", "\ud800"]])
def test_not_a_text(clip, texts):
    with pytest.raises(InputError, match="text") as error:
        clip(texts)
    assert "\n" not in str(error.value)


def test_saved_folder_reads_the_same(clip, reference, small, tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, tokenizer in {"clip": clip, "small": small}.items():
        folder = tmp_path / "ünï" / name
        tokenizer.save(folder)
        again = TextTokenizer.find(folder, tokenizer.context_length)
        assert torch.equal(again(TEXTS)[0], tokenizer(TEXTS)[0])
        assert vars(again).keys() == vars(tokenizer).keys()
        assert again.pad_token_id == tokenizer.pad_token_id
        loaded = transformers.AutoTokenizer.from_pretrained(folder)
        assert_agrees(tokenizer, loaded, TEXTS)
        assert loaded.decode(tokenizer("a cat")[0][0], skip_special_tokens=True) == "a cat"


def test_hub_tokenizer_json(clip, reference, tmp_path):
    """What `transformers` saves reads the same; truncation and padding kept in the file do not matter."""
    reference(["a", "b c"], padding="max_length", max_length=5, truncation=True)
    reference.save_pretrained(tmp_path)
    assert torch.equal(TextTokenizer.find(tmp_path, 77)(TEXTS)[0], clip(TEXTS)[0])


def test_special_tokens_that_the_folder_names(clip, clip_folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<|endoftext|>", "bos_token": null}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "!", "lstrip": false}}')
    tokenizer = TextTokenizer.find(tmp_path, 8)
    ids, mask = tokenizer("a cat")
    assert ids.tolist() == [[49406, 320, 2368, 49407, 0, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]
    tokenizer.save(tmp_path / "saved")
    assert TextTokenizer.find(tmp_path / "saved", 8).pad_token_id == 0
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    with pytest.raises(InputError, match=r"\[PAD\]"):
        TextTokenizer.find(tmp_path, 8)


def test_nothing_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert TextTokenizer.find(tmp_path, 77) is None
    assert TextTokenizer.find(tmp_path / "missing", 77) is None


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"tokenizer.json": ""}, "tokenizer.json"),
        ({"tokenizer.json": '{"model": '}, "tokenizer.json"),
        ({"tokenizer.json": "{}"}, "tokenizer.json"),
        ({"tokenizer.json": "\udcff"}, "tokenizer.json"),
        ({"vocab.json": "CLIP"}, "merges.txt"),
        ({"merges.txt": "CLIP"}, "vocab.json"),
        ({"vocab.json": "[]", "merges.txt": "CLIP"}, "vocab.json"),
        ({"vocab.json": '{"a": "b"}', "merges.txt": "CLIP"}, "vocab.json"),
        ({"vocab.json": '{"a": -1}', "merges.txt": "CLIP"}, "vocab.json"),
        ({"vocab.json": '{"a": 0, "<|startoftext|>": 1}', "merges.txt": "CLIP"}, "vocab.json.*endoftext"),
        ({"vocab.json": "CLIP", "merges.txt": "#version: 0.2\ni n\nth\n"}, "merges.txt.*line 3"),
        ({"vocab.json": "CLIP", "merges.txt": "no such\n"}, "merges.txt"),
        (
            {"vocab.json": "CLIP", "merges.txt": "CLIP", "tokenizer_config.json": "[]"},
            "tokenizer_config.json",
        ),
        (
            {"vocab.json": "CLIP", "merges.txt": "CLIP", "special_tokens_map.json": "{"},
            "special_tokens_map.json",
        ),
    ],
)
def test_broken_files_are_named(clip_folder, tmp_path, files, named):
    for name, text in files.items():
        data = (clip_folder / name).read_bytes() if text == "CLIP" else text.encode(errors="surrogateescape")
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=named) as error:
        TextTokenizer.find(tmp_path, 77)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_tokenizer_json(small, tmp_path):
    """A file cut or changed anywhere reads or is an InputError; never another exception."""
    small.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = file.read_bytes()
    rng = random.Random(0)
    for cut in range(0, len(whole) - 1, 301):
        file.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"tokenizer\.json"):
            TextTokenizer.find(tmp_path, 77)
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 3])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(data)
        try:
            TextTokenizer.find(tmp_path, 77)
        except InputError as error:
            assert "\n" not in str(error)


def test_context_too_short(clip_folder):
    with pytest.raises(InputError, match="context_length=1"):
        TextTokenizer.find(clip_folder, 1)


def test_trained_vocabulary(small):
    assert 514 < small.vocab_size <= 560
    assert (small.bos_token_id, small.eos_token_id) == (small.vocab_size - 2, small.vocab_size - 1)
    ids, mask = small("A photo of a cat")
    assert mask.sum() < len("a photo of a cat")  # the merges are used
    assert small.decode(ids[0]) == "a photo of a cat"
    assert ids.max() == small.eos_token_id
    assert small("a")[0][0, 1] == 320  # CLIP's own id: bytes come first, in CLIP's order


def test_training_is_deterministic_and_respects_its_size():
    rng = random.Random(0)
    texts = [" ".join("".join(rng.choices("abcde", k=rng.randint(1, 6))) for _ in range(8)) for _ in range(200)]
    first, second = (TextTokenizer.train(iter(texts), 700) for _ in range(2))
    assert first.backend.to_str() == second.backend.to_str()
    assert first.context_length == 77
    assert first.vocab_size == 700
    assert TextTokenizer.train(texts, 514).vocab_size == 514
    assert TextTokenizer.train([], 600).vocab_size == 514
    with pytest.raises(InputError, match="vocab_size=513"):
        TextTokenizer.train(texts, 513)
    with pytest.raises(InputError, match="not a string"):
        TextTokenizer.train([None], 600)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
def test_a_trained_vocabulary_spells_any_string(small, text):
    """Nothing is unknown: what comes back is the text in lower case, but for spaces."""
    small.context_length, context = 400, small.context_length
    ids, mask = small(text)
    small.context_length = context
    normal = small.backend.normalizer.normalize_str(text)
    assert "".join(small.decode(ids[0]).split()) == "".join(normal.split())
    assert (ids[0, : mask.sum()] == small.eos_token_id).sum() == 1
