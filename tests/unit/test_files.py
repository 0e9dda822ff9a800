import errno

import pytest
from PIL import Image

from qlip.errors import InputError
from qlip.files import whole_file


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
