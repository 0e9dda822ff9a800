"""Files of the features that a vision model, the teacher, has of images; `qlip features --vision` writes them.

An image is found by a hash of its encoded bytes, so features stay valid when a data set is renamed, reordered or
packed. A file is safetensors: `hashes` (N,) int64, `pooled` (N, C) float16 and, where it was asked for, `grid`
(N, H, W, C') float16. It has its full length from the beginning, and rows are filled in one batch after the other:
a hash of 0 marks a row that is still empty. So a file can be read, and its computation resumed, at any time.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlip.errors import InputError, one_line
from qlip.files import whole_file
from qlip.guarded import parse_json, typed

_BYTES = {"I64": 8, "F16": 2}


@dataclass(frozen=True)
class Teacher:
    """What a file says of its teacher; files of one training must agree in all of it.

    Attributes:
        model: folder or hub id.
        model_hash: of the weights.
        image_size: height and width in pixels of what the teacher sees.
        width: C, of the pooled feature.
        grid: rows and columns of the grid; (0, 0): the file has none.
        grid_width: C', of the features of the grid.
    """

    model: str
    model_hash: str
    image_size: tuple[int, int]
    width: int
    grid: tuple[int, int] = (0, 0)
    grid_width: int = 0

    def to_metadata(self) -> dict[str, str]:
        """For the header of a file."""
        return {"teacher": json.dumps(self.__dict__)}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> "Teacher":
        """The inverse of `to_metadata`."""
        return typed(cls, parse_json(metadata["teacher"]))

    def tensors(self, count: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of each tensor of a file with `count` rows."""
        found = {"hashes": ("I64", (count,)), "pooled": ("F16", (count, self.width))}
        if self.grid_width:
            found["grid"] = ("F16", (count, *self.grid, self.grid_width))
        return found


def hash_image(image: bytes) -> int:
    """63 bits of a hash of an encoded image, never 0."""
    return int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "big") >> 1 or 1


def create_teacher_file(path: Path, teacher: Teacher, count: int) -> None:
    """Write a file of empty rows.

    Raises:
        InputError: it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": teacher.to_metadata()}
    end = 0
    for name, (kind, shape) in teacher.tensors(count).items():
        start, end = end, end + _BYTES[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


class TeacherWriter:
    """Fills in the rows of a file of `create_teacher_file`."""

    def __init__(self, path: Path):
        """Open the file.

        Raises:
            InputError: it is something else.
        """
        opened = TeacherFile(path)
        self.path, self.teacher, self.hashes = path, opened.teacher, opened.hashes
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = parse_json(file.read(length))
        self._starts = {
            name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name[0] != "_"
        }

    def write(self, rows: Sequence[int], hashes: Sequence[int], features: dict[str, Tensor]) -> None:
        """Fill in rows; their hashes come last, so a row that has one is complete.

        Args:
            rows: their numbers.
            hashes: of the images; see `hash_image`.
            features: by the tensor's name, (rows, …), finite and in the range of float16.

        Raises:
            InputError: the file cannot be written.
        """
        try:
            with self.path.open("r+b", buffering=0) as file:
                for name, values in features.items():
                    self._put(file, name, rows, values.to("cpu", torch.float16).numpy())
                os.fsync(file.fileno())
                self._put(file, "hashes", rows, np.array(hashes, np.int64))
        except OSError as error:
            raise InputError(f"{self.path} cannot be written ({error.strerror}): make room, and resume") from error
        self.hashes[list(rows)] = hashes

    def _put(self, file: Any, name: str, rows: Sequence[int], values: np.ndarray) -> None:
        for row, value in zip(rows, values, strict=True):
            file.seek(self._starts[name] + row * value.nbytes)
            file.write(value.tobytes())


class TeacherFile:
    """One file, mapped into memory.

    Attributes:
        teacher: whose features it holds.
        hashes: (N,) of its rows.
    """

    def __init__(self, path: Path):
        """Open the file.

        Raises:
            InputError: it is missing or something else.
        """
        try:
            self._file = safe_open(path, "pt")
            self.teacher = Teacher.from_metadata(self._file.metadata() or {})
            self.hashes = self._file.get_tensor("hashes").numpy()
            names = self.teacher.tensors(len(self.hashes)).keys() - {"hashes"}
            self._slices = {name: self._file.get_slice(name) for name in names}
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"{path} holds no teacher's features ({one_line(error)}): write them with `qlip features --vision`"
            ) from error

    def read(self, row: int) -> dict[str, Tensor]:
        """The features of a row by the tensor's name, float16."""
        return {name: part[row] for name, part in self._slices.items()}


class TeacherFiles:
    """Features of images, by the images' bytes, from one file or several. Pickles as its paths.

    Attributes:
        teacher: whose features they are.
    """

    def __init__(self, paths: Sequence[Path]):
        """Open the files; rows that are filled in later are not seen.

        Raises:
            InputError: one is no such file, or they are of different teachers.
        """
        self._paths = list(paths)
        self._files = [TeacherFile(path) for path in paths]
        self.teacher = self._files[0].teacher
        for path, file in zip(paths, self._files, strict=True):
            if file.teacher != self.teacher:
                raise InputError(f"{paths[0]} and {path} are of different teachers: give files of one")
        hashes = np.concatenate([file.hashes for file in self._files])
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        self._ends = np.cumsum([len(file.hashes) for file in self._files])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._paths,)

    def __len__(self) -> int:
        """Number of rows that are filled in."""
        return int((self._hashes != 0).sum())

    def __contains__(self, image: bytes) -> bool:
        return self._row(image) is not None

    def find(self, image: bytes) -> dict[str, Tensor]:
        """The features of an image, float16.

        Args:
            image: encoded.

        Returns:
            `teacher/pooled` (C,) and, where the files have it, `teacher/grid` (H, W, C'); all 0 if the files do
            not have the image.
        """
        row = self._row(image)
        if row is None:
            shapes = {name: shape[1:] for name, (_, shape) in self.teacher.tensors(1).items() if name != "hashes"}
            found = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
        else:
            number = int(np.searchsorted(self._ends, row, "right"))
            start = int(self._ends[number - 1]) if number else 0
            found = self._files[number].read(row - start)
        return {f"teacher/{name}": value for name, value in found.items()}

    def _row(self, image: bytes) -> int | None:
        wanted = hash_image(image)
        place = int(np.searchsorted(self._hashes, wanted))
        if place == len(self._hashes) or self._hashes[place] != wanted:
            return None
        return int(self._order[place])
