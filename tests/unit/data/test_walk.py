"""What other programs leave beside images is not looked at, links are followed, and loops of them end."""

import os

import pytest
from tests.conftest import encoded

from qlip.data.sources import open_samples
from qlip.data.walk import is_in_left, walk
from qlip.errors import InputError
from qlip.jobs.pictures import find_pictures

LEFT = (
    ".DS_Store", "._cat", "cat/._1.png", "__MACOSX/cat/._1.png", "__MACOSX/1.png", ".ipynb_checkpoints/1.png",
    "cat/.ipynb_checkpoints/1-checkpoint.png", "Thumbs.db", "dog/desktop.ini", "cat/1.png~", ".git/x.png",
    ".Trash-1000/files/1.png", "@eaDir/1.png", "dog/.1.txt.swp", "._a.parquet", "._a.tar", ".hidden.csv",
)  # fmt: skip


def put(path, contents=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(0, 0) if contents is None else contents)


@pytest.fixture
def classes(tmp_path):
    for name in ("cat/1.png", "dog/1.png"):
        put(tmp_path / "p" / name)
    return tmp_path / "p"


def test_what_is_left_beside_images_does_not_move_classes(classes):
    for name in LEFT:
        put(classes / name)
    assert sorted(walk(classes)) == ["cat/1.png", "dog/1.png"]
    samples = open_samples([classes])
    assert samples.class_names == ("cat", "dog") and [s["key"] for s in samples] == ["cat/1.png", "dog/1.png"]
    assert find_pictures([classes]) == [classes / "cat/1.png", classes / "dog/1.png"]


def test_what_is_left_beside_tables(tmp_path):
    for name in ("._a.csv", "a.csv"):
        put(tmp_path / name, b"image\n1.png\n" if name == "a.csv" else b"\0\5\26\7")
    put(tmp_path / "1.png")
    assert len(open_samples([f"{tmp_path}/*.csv"])) == 1


@pytest.mark.parametrize("name", ["C#", "#sunset.jpg", "a.b.png", "~", "__x__.png", "git"])
def test_ordinary_names_are_data(tmp_path, name):
    put(tmp_path / name / "1.png") if name != "~" else put(tmp_path / "a~b.png")
    assert len(list(walk(tmp_path))) == 1


def test_paths_of_others_may_lead_through_hidden_folders():
    assert not is_in_left("/home/me/.cache/a.png") and not is_in_left("../a.png") and not is_in_left("./a.png")
    assert is_in_left("./._a.png") and is_in_left("__MACOSX/a.png") and is_in_left("a\\Thumbs.db")


@pytest.mark.parametrize("name", ["README.txt", "cat/cat_boxes.txt", "dog/LICENSE.TXT", "cat/.1.txt"])
def test_a_text_of_no_image_leaves_the_classes(classes, name):
    put(classes / name, b"about them")
    assert open_samples([classes]).class_names == ("cat", "dog")


@pytest.mark.parametrize("name", ["1.txt", "1.TXT"])
def test_a_text_of_an_image_is_its_caption_and_the_log_says_so(classes, caplog, name):
    put(classes / "cat" / name, b"a cat")
    with caplog.at_level("INFO", "qlip"):
        samples = open_samples([classes])
    assert samples.class_names == () and samples[0]["caption"] == "a cat"
    assert list(samples.captions()) == ["a cat"] and "not taken for classes: cat/1.txt" in caplog.text


def test_an_image_beside_the_classes_turns_them_off_and_the_log_says_so(classes, caplog):
    put(classes / "all.png")
    with caplog.at_level("INFO", "qlip"):
        assert open_samples([classes]).class_names == ()
    assert "all.png lies in none" in caplog.text


def test_links_to_folders_and_files(tmp_path):
    put(tmp_path / "store/x/1.png")
    place = tmp_path / "p"
    (place / "owl").mkdir(parents=True)
    (place / "cat").symlink_to(tmp_path / "store/x")
    (place / "dog").symlink_to(tmp_path / "store/x")  # two classes may be the same folder
    (place / "owl/1.png").symlink_to(tmp_path / "store/x/1.png")
    (place / "owl/2.png").symlink_to(tmp_path / "nowhere.png")
    samples = open_samples([place])
    assert samples.class_names == ("cat", "dog", "owl") and len(samples) == 4
    assert len({s["image"] for s in samples[:3]}) == 1
    with pytest.raises(InputError, match=r"owl/2\.png: .*cannot be read"):
        samples[3]


def test_loops_of_links_end(tmp_path):
    for name in ("a/1.png", "b/1.png"):
        put(tmp_path / name)
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "a/itself").symlink_to(tmp_path / "a")
    (tmp_path / "a/other").symlink_to(tmp_path / "b")
    (tmp_path / "b/other").symlink_to(tmp_path / "a")
    assert sorted(walk(tmp_path)) == ["a/1.png", "a/other/1.png", "b/1.png", "b/other/1.png"]


@pytest.mark.skipif(os.name == "nt", reason="file names are UTF-16")
def test_folders_whose_names_are_not_utf8(tmp_path):
    for name in (b"caf\xe9", b"dog"):
        put(tmp_path / os.fsdecode(name) / "1.png")
    samples = open_samples([tmp_path])
    assert [s["label"] for s in samples] == [0, 1] and samples.class_names == ("caf\\udce9", "dog")
    assert samples[0]["key"] == "caf\\udce9/1.png"
