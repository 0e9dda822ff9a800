import json
import sys

import pytest

from qlip.errors import InputError
from qlip.eval.labels import Classes, find_classes, imagenet_names, imagenet_templates


@pytest.fixture
def file(tmp_path):
    entries = [
        {"wnid": "n01", "names": ["tench", "Tinca"]},
        {"wnid": "n02", "names": ["gold fish"]},
        ["cock", "rooster"],
    ]
    (tmp_path / "classes.json").write_text(json.dumps(entries))
    return str(tmp_path / "classes.json")


@pytest.mark.parametrize(
    ("folders", "place"),
    [
        ((), (0, 1, 2)),
        (("n02", "n01"), (1, 0)),  # some of the classes, by synset
        (("Gold_Fish", "rooster", "tench"), (1, 2, 0)),  # by any name
        (("a", "b", "c"), (0, 1, 2)),  # by number
    ],
)
def test_labels_find_their_names(file, folders, place):
    found = find_classes(file, folders)
    assert found.names == ("tench", "gold fish", "cock") and found.place == place
    assert [found.index({"label": i}) for i in range(len(place))] == list(place)


def test_the_datas_own_names():
    found = find_classes(None, ("grey_cat", "red square"))
    assert found.names == ("grey cat", "red square") and found.place == (0, 1)


def test_names_that_do_not_fit_are_refused(file):
    with pytest.raises(InputError, match="class folder 'horse' is not in classes.json"):
        find_classes(file, ("n01", "horse", "n02"))
    with pytest.raises(InputError, match=r"the data has 2 classes \(a, …\), classes.json 3"):
        find_classes(file, ("a", "b"))
    with pytest.raises(InputError, match="give the names with --classes"):
        find_classes(None)
    with pytest.raises(InputError, match="nothing to tell apart"):
        find_classes(None, ("alone",))


def test_labels_that_do_not_match_are_named():
    classes = Classes(("a", "b"), (0, 1), "classes.json")
    for label, words in {2: "label 2, but classes.json has 2 names", -1: "label -1", None: "no label"}.items():
        with pytest.raises(InputError, match=f"x.png: {words}"):
            classes.index({"key": "x.png", "label": label})


def test_imagenets_words_are_read_and_not_imported(tmp_path, monkeypatch):
    (tmp_path / "open_clip").mkdir()
    (tmp_path / "open_clip" / "__init__.py").write_text("raise ImportError('torchvision')")
    (tmp_path / "open_clip" / "zero_shot_metadata.py").write_text(
        "OPENAI_IMAGENET_TEMPLATES = (\n    lambda c: f'a bad photo of a {c}.',\n    lambda c: f'{c}, drawn',\n)\n"
        "IMAGENET_CLASSNAMES = ['tench', \"potter's wheel\"]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert imagenet_templates() == ["a bad photo of a {}.", "{}, drawn"]
    assert imagenet_names() == ["tench", "potter's wheel"] and "open_clip" not in sys.modules
    assert find_classes("imagenet").names == ("tench", "potter's wheel")


def test_without_open_clip_the_remedy_is_said(monkeypatch):
    monkeypatch.setattr("qlip.eval.labels.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps open-clip-torch"):
        imagenet_names()
