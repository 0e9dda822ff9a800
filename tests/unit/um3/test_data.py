"""Text and pictures as sources, what the mix makes of them, and that a batch depends on seed and step alone."""

import json
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.unit.um3.conftest import base, small_words

from qlip.data.captions import Captioner
from qlip.data.journal import Journal
from qlip.data.token_file import TokenFormat, write_token_file
from qlip.errors import InputError
from qlip.um3.checkpoint import add_image_specials
from qlip.um3.config import UM3Config
from qlip.um3.data import Batches, DataSources, pack, training_batches
from qlip.um3.layout import image_tokens
from qlip.um3.mix import KINDS, MixConfig, Plan
from qlip.um3.sources import Pictures, Text, find_texts, read_texts

IDS = "0" * 16
STORIES = [f"once upon a time there was a red dog number {i}" + " and a mug" * (i % 7) for i in range(30)]


@pytest.fixture(scope="module")
def words():
    tokenizer = small_words()
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.fixture(scope="module")
def config(words):
    boi, eoi = add_image_specials(words)
    llama = base(vocab_size=words.get_vocab_size(), max_position_embeddings=128)
    shape = {"num_bits": 8, "bits": 4, "grid": (2, 3), "tokenizer": "qlip-tiny", "id_hash": IDS}
    return UM3Config.of(llama.config, **shape, boi=boi, eoi=eoi)


def write_tokens(
    folder: Path, count: int, id_hash: str = IDS, shape=(8, (2, 3)), model: str = "lab/tokenizer", **kept
) -> Path:
    bits, grid = shape
    tokens = np.random.default_rng(0).integers(0, 2**bits, (count, grid[0] * grid[1]))
    about = TokenFormat(model, id_hash, bits, grid)
    kept = kept or {"caption": [f"a red mug {i}" for i in range(count)]}
    write_token_file(folder / "tokens.parquet", about, [f"picture {i}" for i in range(count)], tokens, kept)
    return folder


def write_stories(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": story}) + "\n" for story in STORIES), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def sources(tmp_path_factory, words, config):
    folder = tmp_path_factory.mktemp("data")
    text = Text.open([str(write_stories(folder / "stories.jsonl"))], words, config)
    return DataSources(text, Pictures([write_tokens(folder / "tokens", 20)], config, words, 10))


def test_every_kind_of_file_gives_its_documents(tmp_path):
    write_stories(tmp_path / "a.jsonl")
    pq.write_table(pa.table({"text": ["one", "two"], "other": [1, 2]}), tmp_path / "b.parquet")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.txt").write_text("a whole\n\nbook", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not text")
    found = [text for file in find_texts([str(tmp_path)]) for text in read_texts(file, "text")]
    assert found == [*STORIES, "one", "two", "a whole\n\nbook"]
    for name, column, complaint in (
        ("b.parquet", "body", r"no column 'body'; its columns are \['text', 'other'\]"),
        ("b.parquet", "other", "row 1: 'other' is no text .a text is int"),
        ("a.jsonl", "body", "a.jsonl: line 1 is not an object with 'body'"),
        ("notes.md", "text", "text is read from .jsonl"),
        ("missing", "text", "no text there"),
    ):
        with pytest.raises(InputError, match=complaint):
            list(read_texts(*find_texts([str(tmp_path / name)]), column))


def test_null_is_no_document_and_what_is_no_text_is_named_by_its_line(tmp_path, words, config):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": null}\n{"text": NaN}\n\n{"text": "two"}\n')
    assert len(Text.open([str(file)], words, config)) == 2
    for broken in ('{"text": 3}', '{"text": "\\udcff"}', "{broken", "[]"):
        file.write_text('{"text": "one"}\n' * 1000 + broken + "\n")
        with pytest.raises(InputError, match="line 1,001"):
            list(read_texts(str(file), "text"))


def test_a_set_of_the_datasets_library(tmp_path):
    pytest.importorskip("datasets")
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "train.parquet")
    assert list(read_texts(f"datasets:{tmp_path}", "text")) == ["one", "two"]


def test_texts_come_back_and_cannot_open_a_picture(tmp_path, words, config):
    texts = ["a red mug <|boi|> once </s> upon", "  ", "a dog"]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    text = Text.open([str(file)], words, config)
    documents = [text.document(i).tolist() for i in range(len(text))]
    assert [words.decode(ids[1:-1], skip_special_tokens=False) for ids in documents] == [texts[0], texts[2]]
    assert all((ids[0], ids[-1]) == (config.bos, config.eos) for ids in documents)
    assert not {config.boi, config.eoi} & {*documents[0]}
    file.write_text(json.dumps({"text": " "}))
    with pytest.raises(InputError, match="all documents are empty"):
        Text.open([str(file)], words, config)


def test_an_epoch_of_text_has_each_document_once(sources):
    text = sources.text
    first = text.window(0, text.num_tokens, 7)
    assert len(first) == len(text) and len(text) == len(STORIES)
    assert sorted(map(bytes, first)) == sorted(bytes(text.document(i)) for i in range(len(text)))
    both = np.concatenate(text.window(0, 2 * text.num_tokens, 7))
    assert not np.array_equal(both[: text.num_tokens], both[text.num_tokens :])
    cut = np.concatenate([np.concatenate(text.window(start, 13, 7)) for start in range(0, len(both) - 13, 13)])
    assert np.array_equal(cut, both[: len(cut)])


def test_a_cache_is_found_again_and_made_anew_for_other_text(tmp_path, words, config, sources, monkeypatch):
    file = write_stories(tmp_path / "stories.jsonl")
    text = Text.open([str(file)], words, config, cache=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("qlip.um3.sources.read_texts", None)  # not read again
        again = pickle.loads(pickle.dumps(Text.open([str(file)], words, config, cache=tmp_path / "cache")))
    assert len(pickle.dumps(again)) < 2000
    for one in (text, again):
        assert np.array_equal(one.ids, sources.text.ids) and np.array_equal(one.ends, sources.text.ends)
    file.write_text(json.dumps({"text": "other"}))
    assert len(Text.open([str(file)], words, config, cache=tmp_path / "cache")) == 1


def test_pictures_of_captions_and_of_labels(tmp_path, words, config):
    paths = [write_tokens(tmp_path / "a", 3), write_tokens(tmp_path / "b", 4, label=[0, 1, 0, 1])]
    pictures = Pictures(paths, config, words, 40, Captioner([["mug"], ["dog"]]))
    found = pictures.read(range(7), range(7))
    said = [words.decode(ids) for _, _, ids in found]
    assert said == ["a red mug 0", "a red mug 1", "a red mug 2", *["a photo of a mug.", "a photo of a dog."] * 2]
    expected = np.random.default_rng(0).integers(0, 2**8, (4, 6))
    assert np.array_equal(np.stack([tokens for _, tokens, _ in found[3:]]), expected)
    assert len(Pictures(paths, config, words, 2).read([0], [0])[0][2]) == 2
    with pytest.raises(
        InputError, match="picture 0: neither a caption nor a label|picture 0: label 0 has no name"
    ):
        Pictures(paths, config, words, 40).read([3], [0])
    bare = write_tokens(tmp_path / "c", 2, caption=["", None])
    with pytest.raises(InputError, match="picture 1: neither a caption nor a label: leave it out"):
        Pictures([bare], config, words, 40).read([1], [0])
    with pytest.raises(InputError, match=f"ids {'1' * 16} of 'lab/tokenizer' .* the model has {IDS}"):
        Pictures([write_tokens(tmp_path / "d", 2, "1" * 16)], config, words, 40)


def test_the_mix_goes_over_linearly_and_is_met():
    mix = MixConfig((60, 1, 3), (12, 1, 3), 100)
    assert mix.weights(np.array([0, 50, 100, 5000])).tolist() == [[60, 1, 3], [36, 1, 3], [12, 1, 3], [12, 1, 3]]
    plan = Plan(mix, 4, 100, 20, 0)
    places = np.zeros((300, 3))
    text, number = 0, 0
    for step in range(300):
        rows = plan.rows(step)
        assert sum(row.text_length + 20 * len(row.pictures) for row in rows) == 400
        for row in rows:
            assert (row.text_start, list(row.pictures)[:1]) == (text, [number] if row.pictures else [])
            assert len(row.drawn) == len(row.pictures)
            text, number = text + row.text_length, number + len(row.pictures)
            places[step] += [row.text_length, 20 * row.drawn.count(False), 20 * row.drawn.count(True)]
    weights = mix.weights(np.arange(300))
    expected = (400 * weights / weights.sum(1, keepdims=True)).sum(0)
    assert abs(places.sum(0) - expected)[0] <= 20  # to the picture
    assert (abs(places.sum(0) - expected) < 20 * 3 * 300**0.5).all()  # by chance, rounded up or down
    assert plan.rows(7) == Plan(mix, 4, 100, 20, 0).rows(7) != Plan(mix, 4, 100, 20, 1).rows(7)


def test_pictures_alone_fill_the_rows_that_they_can():
    plan = Plan(MixConfig((0, 1, 3), (0, 1, 3), 7), 3, 100, 30, 0)
    for step in (0, 6, 7, 100_000):
        assert [(len(row.pictures), row.text_length) for row in plan.rows(step)] == [(3, 0)] * 3
    text = Plan(MixConfig((1, 0, 0), (1, 0, 0)), 3, 100, 4, 0).rows(2)
    assert [(row.text_start, row.text_length) for row in text] == [(600, 100), (700, 100), (800, 100)]


@pytest.mark.parametrize(
    ("mix", "row_length", "complaint"),
    [
        (((0, 0, 0), (1, 1, 1)), 100, "mix sums to nothing"),
        (((1, 1, 1), (0, 0, 0)), 100, "final_mix sums to nothing"),
        (((1, -1, 1), (1, 1, 1)), 100, "three numbers, 0 or more"),
        (((1, 1, 1), (1, 1, 1)), 20, "sequence_length 19 is shorter than a picture with its caption, 40 tokens"),
        (((1, 2, 3), (1, 2, 3)), 70, "the mix asks for 83% pictures, and 1 of 40 tokens fill 57% of a row"),
    ],
)
def test_mixes_that_cannot_be(mix, row_length, complaint):
    with pytest.raises(InputError, match=complaint):
        Plan(MixConfig(*mix), 4, row_length, 40, 0)


def batches(sources, config, mix=((2, 1, 3), (1, 1, 3), 3), **options):
    return Batches(sources, MixConfig(*mix), config, 60, 4, **{"seed": 5} | options)


def test_rows_hold_whole_pictures_and_text_of_one_document_each(sources, config, words):
    texts = {words.decode(words.encode(story).ids) for story in STORIES}
    seen = np.zeros(3, int)
    for batch in islice(training_batches(batches(sources, config)), 12):
        assert batch["input_ids"].shape == batch["document_ids"].shape == (4, 61)
        assert len(batch["keys"]) == 4
        assert int(batch["num_tokens"].sum()) == int((batch["document_ids"] > 0).sum())
        for ids, numbers in zip(batch["input_ids"], batch["document_ids"], strict=True):
            for number in range(1, int(numbers.max()) + 1):
                document = ids[numbers == number]
                visual = document[document >= config.num_text]
                if len(visual):
                    image_tokens(visual, config)  # each of its slot
                    assert len(visual) == config.num_image_tokens
                    assert (document[0], document[-1]) == (config.bos, config.eos)
                    drawn = int(document[1]) != config.boi
                    caption = words.decode((document[1:-15] if drawn else document[15:-1]).tolist())
                    assert caption.startswith("a red mug")
                    seen[1 + drawn] += 1
                else:
                    assert any(words.decode(document.tolist()) in text for text in texts)
                    seen[0] += 1
    assert seen.min() > 5, dict(zip(KINDS, seen, strict=True))


def test_batches_depend_on_seed_and_step_alone(sources, config):
    def take(start=0, workers=0, **options):
        return list(islice(training_batches(batches(sources, config, **options), start, workers), 4))

    whole = take()
    for name in ("input_ids", "document_ids", "num_tokens"):
        shares = [take(rank=rank, world_size=2) for rank in range(2)]
        for i, batch in enumerate(whole):
            assert torch.equal(torch.cat([share[i][name] for share in shares]), batch[name])
        assert torch.equal(take(2)[0][name], whole[2][name])
        assert torch.equal(take(workers=2)[3][name], whole[3][name])
    assert not torch.equal(take(seed=6)[0]["input_ids"], whole[0]["input_ids"])
    with pytest.raises(InputError, match="not divisible by the 3 processes"):
        take(world_size=3)


def test_what_the_mix_has_must_be_there(sources, config):
    with pytest.raises(InputError, match="a weight for text, but there is none: name it with --text"):
        batches(DataSources(None, sources.pictures), config)
    with pytest.raises(InputError, match="a weight for image_to_text, but there is none: name it with --tokens"):
        batches(DataSources(sources.text, None), config)
    alone = batches(DataSources(None, sources.pictures), config, ((0, 1, 1), (0, 1, 1)))
    assert int(alone[0]["document_ids"].max()) == 2
    with pytest.raises(InputError, match="documents of 9 tokens do not fit a row of 8: raise sequence_length"):
        pack([np.arange(4), np.arange(5)], 8)


def test_a_picture_without_words_stops_the_run(tmp_path, sources, config, words):
    bare = write_tokens(tmp_path, 4, caption=[""] * 4)
    found = batches(DataSources(sources.text, Pictures([bare], config, words, 10)), config)
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"picture \d: neither a caption nor a label"):
            list(islice(training_batches(found, 0, workers), 3))


def test_a_blank_caption_is_replaced_and_listed(tmp_path, sources, config, words):
    captions = [" ", *["a red mug"] * 9]
    pictures = Pictures([write_tokens(tmp_path / "tokens", 10, caption=captions)], config, words, 10)
    found = batches(DataSources(sources.text, pictures), config)

    def run(start, workers=0):
        return training_batches(found, start, workers, Journal(pictures, 0.2, tmp_path))

    first = list(islice(run(0), 6))
    assert torch.equal(next(run(5, 1))["input_ids"], first[5]["input_ids"])
    assert "picture 0" in (tmp_path / "skipped.jsonl").read_text()
    assert not any("picture 0 " in f"{key} " for batch in first for key in batch["keys"])
