"""The three uses, in Python and as commands: the same for the same seed, whatever is beside it; clear errors."""

import json
from html import unescape
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import qlip
from qlip.demo.drawings import unified_section
from qlip.demo.drawn import NUM, PROMPTS, use_unified
from qlip.demo.report import read_photos
from qlip.errors import InputError
from qlip.lm.generate import Sampling
from qlip.um3 import checkpoint as um3_checkpoint
from qlip.um3.pipeline import UnifiedModel


@pytest.fixture(scope="module")
def model(tiny_folder) -> UnifiedModel:
    return qlip.load_um3(tiny_folder)


def test_a_picture_is_what_its_tokens_rebuild(model):
    (picture,) = model.draw("a red mug", cfg=2.0, seed=3)
    ids = model.words.encode("a red mug", add_special_tokens=False).ids
    tokens = model.model.draw([ids], Sampling(guidance_scale=2.0, top_p=0.95), [3])
    expected = model.tokenizer.detokenize(tokens)[0].mul(255).round().permute(1, 2, 0).numpy()
    assert picture.size == (64, 64) and np.array_equal(np.asarray(picture), expected)


def test_a_seed_gives_the_same_in_any_company(model):
    prompts = ["a red mug", "once upon a time there was"]
    several = model.draw(prompts, 2, seed=5, batch_size=3)
    texts = model.complete(prompts, 2, seed=5, max_tokens=12, batch_size=3)
    wanted = [(prompt, seed) for prompt in prompts for seed in (5, 6)]
    for picture, text, (prompt, seed) in list(zip(several, texts, wanted, strict=True))[1:3]:
        assert picture.tobytes() == model.draw(prompt, seed=seed)[0].tobytes()
        assert [text] == model.complete(prompt, seed=seed, max_tokens=12)
        assert text.startswith(prompt)
    assert len({picture.tobytes() for picture in several}) == len(set(texts)) == 4


def test_rows_for_benchmarks_are_the_same_pictures(model):
    rows = [("a red mug", 4), ("once upon a time", 7), ("xyzw" * 40, 0)]
    drawn = list(model.draw_rows(rows, cfg=2.0, batch_size=2))
    for picture, (prompt, seed) in list(zip(drawn, rows, strict=True))[:2]:
        assert picture.tobytes() == model.draw(prompt, cfg=2.0, seed=seed)[0].tobytes()
    words = model.words.decode(model.words.encode(rows[2][0]).ids[:63])  # what leaves room
    assert drawn[2].tobytes() == model.draw(words, cfg=2.0, seed=0)[0].tobytes()
    with pytest.raises(InputError, match="batch_size is 0"):
        list(model.draw_rows(rows, batch_size=0))


def test_captions_are_of_each_picture(model, photos):
    together = model.caption(photos[:3], max_tokens=12, batch_size=2)
    assert together == [model.caption(photo, max_tokens=12)[0] for photo in photos[:3]]
    tokens = model.tokenizer.tokenize(photos[0])
    assert together[0] == model.words.decode(model.model.caption(tokens, max_tokens=12)[0]).strip()
    drawn = model.caption(photos[0], max_tokens=12, temperature=1.0, seed=1)
    assert drawn == model.caption(photos[0], max_tokens=12, temperature=1.0, seed=1) != together[:1]


def test_what_cannot_be_done_is_said(model, tmp_path, small_model, tiny_folder, photos):
    for message, prompt, options in (
        ("a prompt is empty: say what", "  ", {}),
        ("there are no prompts", [], {}),
        ("not a string", [7], {}),
        ("has .* ids, and 128 of a picture are to come.*shorten it to 63", "xyzw" * 40, {}),
        ("cfg is 0.5: use 1", "dog", {"cfg": 0.5}),
        ("num is 0", "dog", {"num": 0}),
        ("seed is -1", "dog", {"seed": -1}),
        ("top_p is 0", "dog", {"top_p": 0.0}),
    ):
        with pytest.raises(InputError, match=message):
            model.draw(prompt, **options)
    with pytest.raises(InputError, match="a prompt is empty: give it a beginning"):
        model.complete(["dog", ""])
    with pytest.raises(InputError, match="has 201 ids, all that this model reads"):
        model.complete("é" * 100)
    with pytest.raises(InputError, match="max_tokens is 0"):
        model.caption(photos[0], max_tokens=0)
    with pytest.raises(InputError, match="not a model of text and images"):
        qlip.load_um3(tmp_path)
    with pytest.raises(InputError, match="of 'qlip-tiny', but 'small' makes .*: name the tokenizer"):
        qlip.load_um3(tiny_folder, tokenizer=small_model)
    with pytest.raises(InputError, match=r"makes \(16, 16\) tokens .* reads \(8, 8\)"):
        qlip.load_um3(tiny_folder, tokenizer=qlip.load("qlip-tiny", image_size=128))


def test_the_commands(tiny_folder, tmp_path, run, photos, model):
    options = ["--model", tiny_folder, "--device", "cpu"]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    code, out, err = run("um3", "caption", photos[0], broken, *options, "--max-tokens", "8", "--json")
    found = json.loads(out)
    assert code == 0 and "1 failed" in err and len(found["failed"]) == 1
    assert found["pictures"] == [{"path": str(photos[0]), "caption": model.caption(photos[0], max_tokens=8)[0]}]
    code, out, err = run("um3", "caption", photos[0], *options, "--max-tokens", "8")
    assert code == 0 and str(photos[0]) in out

    code, out, err = run(
        "um3", "draw", "a red mug", *options, "--num", "2", "--seed", "1", "--out", tmp_path / "out"
    )
    assert code == 0 and out == "" and "2 pictures in" in err, err
    written = Image.open(tmp_path / "out" / "000-a-red-mug-1.png")
    assert written.tobytes() == model.draw("a red mug", seed=2)[0].tobytes()
    code, _, err = run("um3", "draw", *options, "--out", tmp_path / "out")
    assert code == 1 and "there is no prompt" in err

    more = ["--max-tokens", "5", "--seed", "3"]
    code, out, err = run("um3", "complete", "a red", *options, *more, "--num", "2", "--json")
    assert code == 0, err
    expected = model.complete("a red", 2, max_tokens=5, seed=3)
    assert [(entry["seed"], entry["text"]) for entry in json.loads(out)] == [(3, expected[0]), (4, expected[1])]
    code, out, err = run("um3", "complete", "a red", *options, *more)
    assert code == 0 and out == expected[0] + "\n"


def test_half_precision_draws_too(tiny_folder):
    (picture,) = qlip.load_um3(tiny_folder, dtype=torch.bfloat16).draw("a red mug")
    assert picture.size == (64, 64)


def test_the_demo_shows_what_a_bundled_model_makes(tiny_folder, monkeypatch):
    tokenizer, photos = qlip.load("qlip-tiny"), read_photos()[:2]
    monkeypatch.setattr(um3_checkpoint, "bundled", lambda: [str(tiny_folder)])
    found = use_unified(tokenizer, [file for _, file in photos])
    assert list(found.captions) == qlip.load_um3(tiny_folder).caption([file for _, file in photos])
    assert len(found.writer.rows) == len(PROMPTS) and all(len(row.files) == NUM for row in found.writer.rows)
    examples = tuple(SimpleNamespace(photo=photo, original=file) for photo, file in photos)
    page = unescape(unified_section(found, examples))
    assert all(said in page for said in (*found.captions, found.beginning + "</b>" + found.story, *PROMPTS))
    monkeypatch.setattr(um3_checkpoint, "bundled", lambda: [])
    assert use_unified(tokenizer, []) is None


def test_bytes_that_make_no_character_are_left_out():
    model = qlip.load_um3("um3-tiny")
    ids = model.words.encode("Lily 🐱", add_special_tokens=False).ids
    cat, partial = "🐱".encode(), "日".encode()[:2]
    more = [model.words.token_to_id(f"<0x{byte:02X}>") for byte in cat + partial]
    model.model.complete = lambda beginnings, *rest: [more for _ in beginnings]  # what it says is chance
    assert model.complete("Lily 🐱") == ["Lily 🐱🐱"]
    assert model._read(ids) == "Lily 🐱"
