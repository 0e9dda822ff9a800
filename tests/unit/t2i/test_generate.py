"""Pictures from words: the same bytes for the same seed, whatever else is drawn; and what cannot be drawn."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tests.unit.t2i.conftest import CLASSES, written

import qlip
from qlip.errors import InputError
from qlip.jobs.generate import grid, read_prompts
from qlip.lm.generate import Sampling


@pytest.fixture(scope="module")
def tokenizer():
    return qlip.load("qlip-tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    return written(tmp_path_factory.mktemp("model"), tokenizer)


@pytest.fixture(scope="module")
def model(folder):
    return qlip.load_t2i(folder)


def test_a_picture_is_what_its_tokens_rebuild(model, tokenizer):
    picture = model.generate("a red mug", cfg=2.0, seed=3)[0]
    (features,) = model.reader(["a red mug"])
    tokens = model.model.generate([features], Sampling(guidance_scale=2.0, top_k=1000), [3])
    expected = tokenizer.detokenize(tokens)[0].mul(255).round().permute(1, 2, 0).numpy()
    assert picture.size == (64, 64) and np.array_equal(np.asarray(picture), expected)
    assert torch.equal(tokenizer.sub_tokens_to_tokens(tokenizer.tokens_to_sub_tokens(tokens, 14), 14), tokens)


def test_a_seed_gives_the_same_picture_in_any_company(model):
    several = model.generate(["a red mug", "two dogs on a beach"], 2, seed=5, batch_size=3)
    wanted = [(prompt, seed) for prompt in ("a red mug", "two dogs on a beach") for seed in (5, 6)]
    for picture, (prompt, seed) in zip(several, wanted, strict=True):
        assert picture.tobytes() == model.generate(prompt, seed=seed)[0].tobytes()
    assert len({picture.tobytes() for picture in several}) == 4


def test_what_cannot_be_drawn_is_said(model, tmp_path, folder):
    for message, prompt, options in (
        ("a prompt is empty", "  ", {}),
        ("has 22 tokens, this model reads 12: shorten", "dog " * 20, {}),
        ("cfg is 0.5: use 1", "dog", {"cfg": 0.5}),
        ("cfg is nan", "dog", {"cfg": float("nan")}),
        ("num is 0", "dog", {"num": 0}),
        ("seed is -1", "dog", {"seed": -1}),
        ("there are no prompts", [], {}),
        ("top_p is 0", "dog", {"top_p": 0.0}),
    ):
        with pytest.raises(InputError, match=message):
            model.generate(prompt, **options)
    with pytest.raises(InputError, match="not a text-to-image model"):
        qlip.load_t2i(tmp_path)


def test_a_tokenizer_of_other_ids_is_refused(folder, small_model):
    with pytest.raises(InputError, match="of 'qlip-tiny', but 'small' makes .*: name the tokenizer"):
        qlip.load_t2i(folder, tokenizer=small_model)


def test_classes_are_drawn_by_number(tmp_path, tokenizer):
    model = qlip.load_t2i(written(tmp_path, tokenizer, **CLASSES))
    by_number, by_word = model.generate([3], cfg=1.5), model.generate(["3"], cfg=1.5)
    assert by_number[0].tobytes() == by_word[0].tobytes()
    for prompt in ("dog", 7, -1):
        with pytest.raises(InputError, match="use a number from 0 to 6"):
            model.generate([prompt])


def test_the_command_writes_the_same_bytes_again(folder, tmp_path, run):
    (tmp_path / "prompts.txt").write_text("a red mug\n\n  Zwei Hunde, am Strand! \n", encoding="utf-8")
    options = ["--model", folder, "--num", "2", "--seed", "1", "--device", "cpu"]
    code, stdout, err = run("generate", "a red mug", *options, "--out", tmp_path / "one", "--json")
    assert code == 0, err
    found = json.loads(stdout)
    assert [entry["seed"] for entry in found] == [1, 2] and found[0]["prompt"] == "a red mug"
    names = {"000-a-red-mug-0.png", "000-a-red-mug-1.png", "grid.png"}
    assert {path.name for path in (tmp_path / "one").iterdir()} == names
    assert Image.open(tmp_path / "one" / "grid.png").size == (64 + 4 + 64, 64)
    more = ["--prompt-file", tmp_path / "prompts.txt", "--out", tmp_path / "two"]
    code, stdout, err = run("generate", *options, *more)
    assert code == 0 and stdout == "" and "4 pictures in" in err
    for name in names - {"grid.png"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "two" / "001-zwei-hunde-am-strand-1.png").exists()


def test_the_command_says_what_is_missing(folder, tmp_path, run):
    options = ["--model", folder, "--out", tmp_path / "out"]
    for message, arguments in (
        ("there is no prompt", []),
        ("cfg is 0.0: use 1", ["dog", "--cfg", "0"]),
        ("cannot be read", ["--prompt-file", tmp_path / "none.txt"]),
    ):
        code, _, err = run("generate", *arguments, *options)
        assert code == 1 and message in err and not (tmp_path / "out").exists()
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match="holds no prompts"):
        read_prompts(tmp_path / "empty.txt")


def test_a_grid_has_a_row_for_each_prompt():
    shades = [Image.new("RGB", (3, 2), (shade, 0, 0)) for shade in range(6)]
    sheet = grid(shades, 3)
    assert sheet.size == (3 * 7 - 4, 2 * 6 - 4)
    assert [sheet.getpixel((x, y))[0] for y in (0, 6) for x in (0, 7, 14)] == list(range(6))
    assert sheet.getpixel((4, 0)) == (255, 255, 255)
