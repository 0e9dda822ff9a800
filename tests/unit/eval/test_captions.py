"""Scores of captions on cases that a person can check, and whether a caption names a class."""

import json
import math
import shutil
import sys
from importlib.util import find_spec

import pytest

from qlip.errors import InputError
from qlip.eval import captions
from qlip.eval.captions import (
    caption_scores,
    evaluate_captions,
    named_classes,
    names_class,
    plain_tokens,
    read_predictions,
    read_references,
)

SAID = {1: "A man riding a horse.", 2: "Two dogs play with a red ball!", 3: "A cat sleeps on my bed"}
ALIKE = {image: [caption] for image, caption in SAID.items()}


needs_scorer = pytest.mark.skipif(find_spec("pycocoevalcap") is None, reason="needs pycocoevalcap")


@needs_scorer
def test_scores_of_equal_captions_are_the_highest():
    found = caption_scores(SAID, ALIKE, has_java=False)
    assert found["bleu4"].value == pytest.approx(1, abs=1e-9) and found["cider"].value == pytest.approx(10)
    assert "meteor" not in found


@needs_scorer
def test_scores_of_other_captions_are_zero():
    found = caption_scores({1: "x y z w v", 2: "q r s t u"}, {1: ["a b c d e"], 2: ["f g h i j"]}, has_java=False)
    assert found["bleu4"].value == pytest.approx(0, abs=1e-6) and found["cider"].value == 0


@needs_scorer
def test_bleu_scores_as_by_hand():
    said = {1: "the cat sat on the red mat"}
    wanted = {1: ["the cat sat on the mat", "there is a cat on the red mat today"]}
    # Every word is right (7 of 7), every pair (6 of 6) and triple (5 of 5), and of the four fours all but
    # "sat on the red". The nearest reference has 6 words: no penalty.
    found = caption_scores(said, wanted, has_java=False)
    assert found["bleu4"].value == pytest.approx((3 / 4) ** 0.25, abs=1e-8)
    short = caption_scores({1: "the cat sat on"}, {1: ["the cat sat on the mat"]}, has_java=False)
    assert short["bleu4"].value == pytest.approx(math.exp(1 - 6 / 4), abs=1e-8)


@needs_scorer
def test_cider_scores_as_by_hand():
    """Each word is in one of two pictures, so that all weigh log 2: the cosine is 1/2 of words, 0 of pairs."""
    found = caption_scores({1: "red cup", 2: "old door"}, {1: ["red pen"], 2: ["old door"]}, has_java=False)
    perfect = 10 * (1 + 1) / 4  # words and pairs of four orders, of which two words have but two
    half = 10 * (1 / 2 + 0) / 4
    assert found["cider"].value == pytest.approx((perfect + half) / 2)
    assert (found["cider"].low, found["cider"].high) == (pytest.approx(half), pytest.approx(perfect))


@needs_scorer
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_scores_with_java(tmp_path):
    predictions, references = write(
        tmp_path, {**SAID, 4: ""}, {**ALIKE, 4: ["a ||| b\u2028c", "it's a dog's ball"]}
    )
    found = evaluate_captions(predictions, references, tmp_path / "out")
    assert found["settings"]["tokenization"].startswith("Penn Treebank") and found["settings"]["meteor"] == "1.5"
    numbers = found["results"]["mine"]
    assert numbers["cider"]["value"] == pytest.approx(7.5) and 0.7 < numbers["meteor"]["value"] < 1
    alike = caption_scores(SAID, ALIKE, has_java=True)
    assert alike["meteor"].value == pytest.approx(1) and alike["bleu4"].value == pytest.approx(1, abs=1e-9)


def write(folder, said, wanted):
    predictions, references = folder / "mine.json", folder / "val.json"
    predictions.write_text(json.dumps([{"image_id": i, "caption": caption} for i, caption in said.items()]))
    rows = [{"image_id": i, "id": 7, "caption": caption} for i, group in wanted.items() for caption in group]
    references.write_text(json.dumps({"images": [], "annotations": rows}))
    return predictions, references


@needs_scorer
def test_scores_without_java_say_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(captions.shutil, "which", lambda _: None)
    predictions, references = write(tmp_path, SAID, {**ALIKE, 9: ["left out", "this too"]})
    found = evaluate_captions(predictions, references, tmp_path / "out")
    assert "no Java" in caplog.text
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["results"] == found["results"] and saved["results"]["mine"]["cider"]["value"] == pytest.approx(10)
    assert saved["settings"]["meteor"] == "left out: there is no Java"
    assert saved["settings"]["tokenization"].startswith("plain, since there is no Java")
    assert saved["data"]["num_samples"] == 3 and saved["data"]["without_prediction"] == 1


def test_files_that_do_not_fit(tmp_path):
    predictions, references = write(tmp_path, SAID, {1: ["a"], 2: ["b"]})
    with pytest.raises(InputError, match=r"no caption for 1 of 3 pictures, as image_id 3"):
        evaluate_captions(predictions, references)
    with pytest.raises(InputError, match="expected COCO's captions, a list"):
        read_predictions(references)
    with pytest.raises(InputError, match='expected COCO\'s captions, {"annotations"'):
        read_references(predictions)
    predictions.write_text('[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]')
    with pytest.raises(InputError, match="two captions for image_id 1"):
        read_predictions(predictions)
    predictions.write_text("[{")
    with pytest.raises(InputError, match="cannot be read"):
        read_predictions(predictions)


def test_pycocoevalcap_is_asked_for_by_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(InputError, match=r"pip install 'open-qlip\[captions\]'"):
        caption_scores(SAID, ALIKE, has_java=False)


def test_plain_tokens_are_words():
    assert plain_tokens("It's a  Dog's (red) T-shirt, no. 12!") == "it's a dog's red t shirt no 12"


@pytest.mark.parametrize(
    ("caption", "names", "wanted"),
    [
        ("A goldfish in a bowl.", ["goldfish", "Carassius auratus"], True),
        ("two GOLDFISHES", ["goldfish"], True),
        ("carassius auratus, from above", ["goldfish", "Carassius auratus"], True),
        ("a gold fish", ["goldfish"], False),
        ("a category of cattle", ["cat"], False),
        ("cats on a mat", ["cat"], True),
        ("a bus", ["buses"], True),
        ("three school buses", ["school bus"], True),
        ("a bus at a school", ["school bus"], False),
        ("butterflies", ["monarch butterfly", "butterfly"], True),
        ("wolves and wooden shelves", ["bookshelf", "wolf"], True),
        ("a knife", ["knives"], True),
        ("two mice", ["mouse"], True),
        ("potatoes", ["potato"], True),
        ("a glass", ["glas"], False),
        ("a dog's bowl", ["dog"], False),
        ("a go-kart", ["go kart"], True),
        ("", ["cat"], False),
        ("anything", [""], False),
    ],
)
def test_a_caption_names_a_class(caption, names, wanted):
    assert names_class(caption, names) is wanted


def test_of_several_classes_the_longest_name_is_meant():
    classes = [["lion"], ["mountain lion", "puma"], ["beach wagon", "wagon"], ["police van", "wagon"]]
    said = ["a photo of a mountain lion.", "two lions", "a puma", "a wagon", "the beach wagon", "nothing"]
    assert [named_classes(caption, classes) for caption in said] == [[1], [0], [1], [2, 3], [2], []]
