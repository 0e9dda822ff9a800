"""Files that appear whole or not at all, and what their bytes sum to."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

from qlip.errors import InputError, one_line
from qlip.guarded import parse_json


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file beside its name, and give it the name when the block ends well.

    Args:
        path: the file; its folder is made if need be, and a file that is there is replaced.

    Yields:
        where to write; if the block fails, what was written is deleted.

    Raises:
        InputError: the folder cannot be written to, or the disk is full. Other errors of the block pass
            through, an OSError of another file too.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if unfinished.is_symlink():  # somebody laid it there: what is written must not follow it
            unfinished.unlink()
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        ours = error.filename is None or str(error.filename) in map(str, (unfinished, *unfinished.parents))
        if not (ours and error.errno):  # a full disk has a number and no name, a damaged picture neither
            raise
        raise InputError(f"{path} cannot be written ({error.strerror or error}): choose another place") from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def place_in(folder: Path, name: PurePath) -> Path:
    """Where a file goes whose name comes from data: in `folder`, and nowhere else.

    Args:
        folder: the folder; it may be a link itself.
        name: relative, without "..".

    Raises:
        InputError: a link in the folder leads out of it, or stands where the file would be.
    """
    path = folder / name
    if path.is_symlink() or not path.parent.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{path} is a link, or lies behind one: remove it, or choose another --out")
    return path


def json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str, Any]]:
    """The values of a file with a JSON value a line; blank lines are left out.

    Yields:
        the number of a line, from 1, the line, and its value.

    Raises:
        OSError: the file cannot be read.
        InputError: a line is not JSON; names it.
    """
    with open(path, "rb") as lines:  # as bytes: only a line feed ends a line
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, text, parse_json(text)
            except (UnicodeDecodeError, InputError) as error:
                raise InputError(f"line {number:,} is not JSON ({one_line(error)}): fix it") from error


def save_tensors(tensors: dict[str, Any], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of any other new file; the library lets nobody else read it.

    Args:
        tensors: contiguous PyTorch tensors by name.
        path: the file.
        metadata: of the file.
    """
    from safetensors.torch import save_file  # which imports torch

    path.touch()  # with the umask's permissions, which the library then replaces
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON, whole or not at all: NaN and infinities are null, halves of surrogate pairs are escaped.

    Raises:
        InputError: the file cannot be written.
    """
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with whole_file(path) as unfinished:
        unfinished.write_bytes(text.encode("utf-8", "backslashreplace"))


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as contents:
        while block := contents.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
