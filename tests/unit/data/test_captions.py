import json
from collections import Counter

import numpy as np
import pytest

from qlip.data.captions import Captioner, class_sentences, read_class_names, read_classes
from qlip.errors import InputError


def test_captions_use_every_name_and_template_the_usual_name_most():
    captioner = Captioner([["dog"], ["cat", "felis", "puss"]], ["a {}.", "{}"])
    rng = np.random.default_rng(0)
    seen = Counter(captioner({"label": 1, "key": "k"}, rng) for _ in range(3000))
    assert set(seen) == {f"a {n}." for n in ("cat", "felis", "puss")} | {"cat", "felis", "puss"}
    usual = (seen["cat"] + seen["a cat."]) / 3000
    assert usual == pytest.approx(1 / 2 + 1 / 6, abs=0.03)
    assert captioner({"caption": "its own", "label": 1, "key": "k"}, rng) == "its own"


def test_sentences_begin_with_the_usual_name(tmp_path):
    """All that the captioner may say, and of a file in our templates."""
    assert Captioner([["cat", "puss"], ["dog"]], ("a {}.", "{}")).sentences == [
        ["a cat.", "cat", "a puss.", "puss"],
        ["a dog.", "dog"],
    ]
    (tmp_path / "c.json").write_text(json.dumps([["cat", "puss"]]))
    found = class_sentences(tmp_path / "c.json")
    assert found[0][0] == "a photo of a cat." and len(found[0]) == 14 and class_sentences(None) == []


def test_a_sample_without_words_is_named():
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="row 7: label 2 has no name: .* at least 3 names"):
        Captioner([["dog"]])({"label": 2, "key": "row 7"}, rng)
    with pytest.raises(InputError, match="label -1 has no name: leave it out"):
        Captioner([["dog"]])({"label": -1, "key": "row 7"}, rng)
    with pytest.raises(InputError, match="row 7: neither"):
        Captioner([["dog"]])({"key": "row 7"}, rng)
    with pytest.raises(InputError, match="row 7: label 'dog' is no number"):
        Captioner([["dog"]])({"key": "row 7", "label": "dog"}, rng)


@pytest.mark.parametrize("entries", (["dog", "cat"], [["dog"], ["cat"]], [{"names": ["dog"]}, {"names": ["cat"]}]))
def test_class_names_in_three_forms(tmp_path, entries):
    (tmp_path / "c.json").write_text(json.dumps(entries))
    assert read_class_names(tmp_path / "c.json") == [["dog"], ["cat"]]


@pytest.mark.parametrize(
    "text", ("not json", "[1, 2]", "[[]]", '[" "]', '["\\ud800"]', "[" * 100_000, '{"a": 1}', "null", "7")
)
def test_broken_class_names_are_named(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match=r"c\.json"):
        read_class_names(tmp_path / "c.json")


def test_class_names_with_a_byte_order_mark_and_their_synsets(tmp_path):
    (tmp_path / "c.json").write_text('[{"names": ["cat"], "wnid": "n1"}, "dog"]', encoding="utf-8-sig")
    assert read_classes(tmp_path / "c.json") == [(["cat"], "n1"), (["dog"], None)]
