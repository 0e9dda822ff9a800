"""What is measured of drawn pictures, with judges whose answers are known."""

import json
from dataclasses import dataclass

import pytest
import torch
from tests.conftest import LABELS, encoded

from qlip.errors import InputError
from qlip.eval import labels
from qlip.eval.batches import Pictures
from qlip.eval.drawings import Judges, Words, judge
from qlip.eval.frechet import frechet_distance
from qlip.eval.labels import Classes, find_classes, imagenet_outputs
from qlip.model.image import ImageProcessor

COLORS = Classes(LABELS, (0, 1, 2, 3), "here")
OUTPUTS = [900, 20, 500, 7]  # of red, green, blue, grey among a thousand


@dataclass
class Eye:
    """Features are the mean colour; the classifier knows four colours, and a fifth class, seen everywhere."""

    name = metric = "eye"
    num_features = 3
    looks: int = 0

    def __call__(self, pictures):
        self.looks += 1
        return pictures.float().mean((2, 3))

    def logits(self, features):
        found = torch.zeros(len(features), 1000)
        wanted = torch.tensor([[200, 40, 40], [40, 200, 40], [40, 40, 200], [128, 128, 128]]).float()
        found[:, OUTPUTS] = -torch.cdist(features, wanted)
        found[:, 1] = 1e3
        return found


class Matcher:
    name, metric = "a matcher", "clip_score"

    def __call__(self, pictures, texts):
        self.texts = texts
        return torch.linspace(-1, 1, len(texts))


def squares(*labels, **more):
    return [
        {"image": encoded(i % 4, n), "key": str(n), "label": label, **more}
        for n, (i, label) in enumerate(zip(range(len(labels)), labels, strict=True))
    ]


def batches(samples, size=4):
    return Pictures(samples, ImageProcessor(32, 32), batch_size=size).batches()


def test_the_right_class_among_those_of_the_set():
    """The fifth class, which always wins, is none of the set's; the last two labels are wrong."""
    eye, matcher = Eye(), Matcher()
    judges = Judges([eye], [matcher], eye, OUTPUTS)
    samples = squares(0, 1, 2, 3, 0, 1, 3, 2)
    columns, statistics = judge(batches(samples), judges, Words(COLORS), COLORS.index)
    assert columns["class_accuracy"].tolist() == [True] * 6 + [False] * 2
    assert eye.looks == 2 and statistics["eye"].count == 8  # once a batch, for both
    assert columns["clip_score"].tolist() == pytest.approx([0, 0, 1 / 3, 1] * 2)
    assert matcher.texts[0] == "a photo of a red square."


def test_the_distance_of_a_set_to_itself_is_none():
    samples = squares(*[0, 1, 2, 3] * 4)
    (_, one), (_, same) = (judge(batches(samples, size), Judges([Eye()]), Words(None)) for size in (4, 5))
    assert frechet_distance(one["eye"], same["eye"]) == pytest.approx(0, abs=1e-6)
    _, other = judge(batches(samples[:12:4] * 2), Judges([Eye()]), Words(None))
    assert frechet_distance(one["eye"], other["eye"]) > 1000


def test_words_are_captions_or_sentences_of_classes():
    assert Words(None)({"captions": ["first", "second"]}) == "first"
    assert Words(COLORS)({"caption": "its own", "label": 1}) == "its own"
    assert Words(COLORS)({"label": 1}) == "a photo of a green square."
    assert Words(COLORS, "an icon of {}")({"caption": "its own", "label": 1}) == "an icon of green square"
    with pytest.raises(InputError, match="x: no caption, and no names of classes: give --classes"):
        Words(None)({"key": "x", "label": 1})


def test_classes_are_found_among_imagenets(tmp_path, monkeypatch):
    """By synset id, of a file or of folders, else by name; numbers as every list of the 1,000 has them."""
    expected = [1, 0, 207, 999]  # goldfish, tench, golden retriever, toilet paper
    wnids = ["n01443537", "n01440764", "n02099601", "n15075141"]
    (tmp_path / "c.json").write_text(json.dumps([{"wnid": wnid, "names": ["x"]} for wnid in wnids]))
    assert imagenet_outputs(find_classes(str(tmp_path / "c.json"))) == expected
    assert imagenet_outputs(find_classes(None, wnids)) == expected
    names = [f"class {i}" for i in range(1000)]
    names[207], names[3] = "golden retriever", "great white shark"
    monkeypatch.setattr(labels, "imagenet_names", lambda: names)
    assert imagenet_outputs(find_classes(None, ["golden_retriever", "n01443537"])) == [207, 1]
    (tmp_path / "d.json").write_text('[["carcharias", "great white shark"], "golden retriever"]')
    assert imagenet_outputs(find_classes(str(tmp_path / "d.json"))) == [3, 207]
    for several in (["red square", "golden retriever"], ["n01443537", "n01443537"]):
        with pytest.raises(InputError, match="is not one of ImageNet's .*--classifier none"):
            imagenet_outputs(find_classes(None, several))
