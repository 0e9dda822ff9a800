"""Prompts from files and pipes."""

import os
import threading

import pytest

from qlip.errors import InputError
from qlip.jobs.generate import read_prompts


def test_prompts_are_lines_without_a_byte_order_mark(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa cat\r\n\n a dog\u2028a hen \n".encode())
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "a dog\u2028a hen"]


@pytest.mark.parametrize("contents", [b"", b"\n \n", "a cat".encode("utf-16"), b"caf\xe9"])
def test_files_without_prompts_are_named(tmp_path, contents):
    (tmp_path / "p.txt").write_bytes(contents)
    with pytest.raises(InputError, match=r"p\.txt (holds no prompts|cannot be read \(is )"):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of POSIX")
def test_prompts_through_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("a cat\n"))
    writer.start()
    assert read_prompts(tmp_path / "pipe") == ["a cat"]
    writer.join()
