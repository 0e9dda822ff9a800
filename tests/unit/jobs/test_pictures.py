from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qlip.errors import InputError
from qlip.jobs.pictures import Pictures, find_pictures, output_names
from qlip.model.image import ImageProcessor

PART = st.text("ab./ü", min_size=1, max_size=4)


def test_folders_are_searched_and_files_taken_as_named(tmp_path):
    for name in (
        "b.JPG",
        "a.png",
        "i.jfif",
        "j.HEIC",
        "notes.txt",
        "sub/c.webp",
        "d.pdf",
        "e.mpg",
        "f.h5",
        "g.eps",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_pictures([tmp_path / "notes.txt", tmp_path, tmp_path / "a.png"])
    assert [str(p.relative_to(tmp_path)) for p in found] == [
        "notes.txt",
        "a.png",
        "b.JPG",
        "i.jfif",
        "j.HEIC",
        "sub/c.webp",
    ]
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="none: no pictures"):
        find_pictures([tmp_path / "none"])
    with pytest.raises(InputError, match="no pictures: name"):
        find_pictures([])


def test_batches_pass_over_what_fails():
    def read(path):
        if path.name.startswith("bad"):
            raise InputError(f"{path} is bad")
        return path.name

    paths = [Path(f"{'bad' if i % 3 == 0 else 'good'}{i}") for i in range(10)]
    pictures = Pictures(paths, read, batch_size=4)
    batches = list(pictures.batches())
    assert [len(names) for names, _ in batches] == [4, 2]
    assert [p for _, found in batches for p in found] == [p.name for p in paths if p.name.startswith("good")]
    assert pictures.failures == [f"bad{i} is bad" for i in (0, 3, 6, 9)]


@pytest.mark.parametrize(
    ("keys", "names"),
    (
        (["a/b/cat.jpg", "a/b/dog.jpg"], ["cat.png", "dog.png"]),
        (["a/x/cat.jpg", "a/y/cat.jpg"], ["x/cat.png", "y/cat.png"]),
        (["cat.jpg", "cat.webp", "dog"], ["cat.jpg.png", "cat.webp.png", "dog.png"]),
        ([], []),
        (["/etc/cat.jpg"], ["cat.png"]),
        (["../../etc/cat.jpg", "a.jpg"], ["etc/cat.png", "a.png"]),
        (["same.jpg", "same.jpg"], ["00000-same.jpg.png", "00001-same.jpg.png"]),
        (["val.parquet:3"], ["val.png"]),
        (["a\0b.jpg", "c\udcff.jpg"], ["a_b.png", "c?.png"]),
        (["x" * 300 + "/a.jpg", "y/ü" + "z" * 300], ["x" * 200 + "/a.png", "y/ü" + "z" * 198 + ".png"]),
        (["x" * 300 + "1", "x" * 300 + "2"], [f"0000{i}-{'x' * 200}.png" for i in (0, 1)]),
    ),
)
def test_names_of_outputs(keys, names):
    assert [str(name) for name in output_names(keys)] == names


@given(st.lists(PART, min_size=1, max_size=6))
def test_outputs_are_all_different_and_inside_the_folder(keys):
    names = output_names(keys)
    assert len(set(names)) == len(keys)
    for name in names:
        assert not name.is_absolute() and ".." not in name.parts and name.suffix == ".png"


def test_what_is_not_seen_whole_is_said_once(tmp_path, caplog):
    read = ImageProcessor(16, 16).preprocess
    for i, size in enumerate([(30, 20), (20, 30), (20, 20)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    frames = [Image.new("L", (20, 20), i) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with caplog.at_level("INFO", "qlip"):
        assert len(list(Pictures(find_pictures([tmp_path]), read, 1).batches())) == 4
    assert [record.getMessage() for record in caplog.records] == [
        "of 2 images the middle is used: --resize squash uses all of them",
        "of 1 image that are animations, or have pages, the first one is used",
    ]
