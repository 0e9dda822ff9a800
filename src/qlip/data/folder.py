"""Pictures in a folder, however deep, with their words beside them.

`cat.jpg` has its captions in `cat.txt`, one a line. A folder without any such file whose pictures all lie in
sub-folders is taken to be sorted by class, as ImageNet is: a picture's label is the number of its outermost
sub-folder in their sorted order, and `class_names` has their names. Else the pictures have no words.
"""

import bisect
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from qlip.data.samples import BadSample, Samples, captions_of, lines_of, read_picture
from qlip.errors import InputError
from qlip.image_files import is_image_file, is_pipe, read_file


class PictureFiles(Samples):
    """Pictures that were named themselves, each once; the names are their keys."""

    def __init__(self, paths: Iterable[str]):
        """Hold the names, and what comes through pipes: it can be read but once.

        Raises:
            InputError: a pipe gives more than an image may have.
        """
        self._paths = list(dict.fromkeys(paths))
        self._piped = {path: read_file(path, pipes=True) for path in self._paths if is_pipe(path)}

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> dict[str, Any]:
        """Picture `index`."""
        path = self._paths[index]
        key = os.fsencode(path).decode("utf-8", "backslashreplace")
        return {"image": self._piped.get(path) or read_picture(Path(path), key), "key": key}

    def captions(self) -> Iterator[str]:
        """None: nobody says anything about them."""
        return iter(())


class FolderSamples(Samples):
    """The pictures of a folder, in the sorted order of their paths, which are their keys."""

    def __init__(self, folder: Path):
        """List the files.

        Raises:
            InputError: no pictures there.
        """
        paths, texts = [], False
        for place, _, names in os.walk(folder):
            for name in names:
                texts |= os.path.splitext(name)[1].lower() == ".txt"
                if is_image_file(os.path.join(place, name)):
                    paths.append(os.path.relpath(os.path.join(place, name), folder))
        if not paths:
            raise InputError(f"{folder}: no pictures in this folder, no Parquet files and no shards")
        self._folder = folder
        self._paths = pa.array(map(os.fsencode, sorted(paths)), pa.binary())  # a tenth of the memory of a list
        self._sidecars = texts
        if not texts and all(os.sep in path for path in paths):
            self.class_names = tuple(sorted({path.split(os.sep)[0] for path in paths}))

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> dict[str, Any]:
        """Picture `index`."""
        path = self._path(index)
        key = path.as_posix().encode("utf-8", "backslashreplace").decode()
        sample = {"image": read_picture(self._folder / path, key), "key": key}
        if self.class_names:
            return sample | {"label": bisect.bisect_left(self.class_names, path.parts[0])}
        return sample | self._words(path, key)

    def captions(self) -> Iterator[str]:
        """The lines of all `.txt` files beside pictures."""
        if self._sidecars:
            paths = (self._path(i) for i in range(len(self)))
            yield from captions_of(self._words(path, str(path)) for path in paths)

    def _path(self, index: int) -> Path:
        return Path(os.fsdecode(self._paths[index].as_py()))

    def _words(self, path: Path, key: str) -> dict[str, Any]:
        try:
            return lines_of((self._folder / path.with_suffix(".txt")).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise BadSample(key, f"its captions cannot be read ({error})") from error
