import errno
from pathlib import PurePath

import pytest
from PIL import Image

from qlip.errors import InputError
from qlip.files import place_in, whole_file


def test_the_file_appears_when_the_block_ends_well(tmp_path):
    with whole_file(tmp_path / "a/b/c.txt") as unfinished:
        unfinished.write_text("whole")
        assert not (tmp_path / "a/b/c.txt").exists()
    assert [p.name for p in (tmp_path / "a/b").iterdir()] == ["c.txt"]


def test_what_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file/c.txt", tmp_path / "file/b/c.txt", tmp_path / "folder", tmp_path / ("x" * 255)):
        with pytest.raises(InputError, match="cannot be written"), whole_file(path) as unfinished:
            unfinished.touch()
    with pytest.raises(InputError, match="cannot be written .No space"), whole_file(tmp_path / "c"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_errors_of_other_files_pass_through(tmp_path):
    (tmp_path / "cut.bmp").write_bytes(b"BM")
    with pytest.raises(FileNotFoundError, match="input"), whole_file(tmp_path / "c"):
        (tmp_path / "input").read_text()
    with pytest.raises(Image.UnidentifiedImageError), whole_file(tmp_path / "c"):
        Image.open(tmp_path / "cut.bmp")
    assert [p.name for p in tmp_path.iterdir()] == ["cut.bmp"]


def test_a_link_that_somebody_laid_is_not_followed(tmp_path):
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    out.mkdir()
    (outside / "a.txt").write_text("theirs")
    (out / ".a.txt.unfinished").symlink_to(outside / "a.txt")
    with whole_file(out / "a.txt") as unfinished:
        unfinished.write_text("ours")
    assert (out / "a.txt").read_text() == "ours"
    (out / "sub").symlink_to(outside)
    (out / "b.txt").symlink_to(outside / "a.txt")
    for name in ("sub/a.txt", "b.txt"):
        with pytest.raises(InputError, match="is a link, or lies behind one"):
            place_in(out, PurePath(name))
    assert (outside / "a.txt").read_text() == "theirs"
    (tmp_path / "linked").symlink_to(out)
    assert place_in(tmp_path / "linked", PurePath("new/a.txt")) == tmp_path / "linked/new/a.txt"
