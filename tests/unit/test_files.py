import errno
import os
from pathlib import PurePath

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from qlip.errors import InputError
from qlip.files import json_lines, place_in, save_tensors, whole_file


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


def test_tensors_have_the_permissions_of_any_new_file(tmp_path):
    before = os.umask(0o022)
    try:
        save_tensors({"a": torch.arange(3)}, tmp_path / "a.safetensors", {"about": "three"})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.arange(3))


def test_a_line_that_is_no_json_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\n\n[1]\n')
    assert [(number, value) for number, _, value in json_lines(file)] == [(1, {"text": "a\u2028b"}), (3, [1])]
    for broken in (b"{broken", b"\xff", b"[" * 100_000):
        file.write_bytes(b"1\n" * 1000 + broken + b"\n")
        with pytest.raises(InputError, match="^line 1,001 is not JSON"):
            list(json_lines(file))
