"""Images in a folder, however deep, with their words beside them.

`cat.jpg` has its captions in `cat.txt`, one a line. A folder of which no image has such a file, and whose images
all lie in sub-folders, is taken to be sorted by class, as ImageNet is: an image's label is the number of its
outermost sub-folder in their sorted order, and `class_names` has their names. Else the images have no words. Which
files and folders are not looked at is in `qlip.data.walk`.
"""

import bisect
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from qlip.data.samples import BadSample, Samples, captions_of, lines_of, read_picture
from qlip.data.values import printable, read_text
from qlip.data.walk import walk
from qlip.errors import InputError, one_line
from qlip.image_files import is_image_file

logger = logging.getLogger("qlip")

TEXTS = (".txt", ".TXT")


class PictureFiles(Samples):
    """Pictures that were named themselves, each once; the names are their keys."""

    def __init__(self, paths: Iterable[str], piped: Mapping[str, bytes] | None = None):
        """Hold the names.

        Args:
            paths: of the files, or pipes.
            piped: what the pipes gave: it can be read but once.
        """
        self._paths, self._piped = list(dict.fromkeys(paths)), dict(piped or {})

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> dict[str, Any]:
        """Picture `index`."""
        path = self._paths[index]
        key = printable(path)
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
        paths, texts = [], []
        try:
            for path in walk(folder):
                stem, suffix = os.path.splitext(path)
                if suffix in TEXTS:
                    texts.append(stem)
                elif is_image_file(os.path.join(folder, path)):
                    paths.append(path)
        except OSError as error:
            raise InputError(f"{error.filename}: cannot be listed ({one_line(error)})") from error
        if not paths:
            raise InputError(f"{folder}: no pictures in this folder, no Parquet files and no shards")
        self._folder = folder
        self._paths = pa.array(map(os.fsencode, sorted(paths)), pa.binary())  # a tenth of the memory of a list
        captioned = set(texts) & {os.path.splitext(path)[0] for path in paths} if texts else set()
        loose = next((path for path in paths if os.sep not in path), None)
        self._sidecars = bool(captioned)
        self._classes = sorted({path.split(os.sep)[0] for path in paths}) if not (captioned or loose) else []
        self.class_names = tuple(map(printable, self._classes))
        if len(captioned) < len(paths) and any(os.sep in path for path in paths) and not self._classes:
            because = f"{min(captioned)}.txt holds captions" if captioned else f"{loose} lies in none"
            logger.info("%s: its sub-folders are not taken for classes: %s", folder, printable(because))

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> dict[str, Any]:
        """Picture `index`."""
        path = self._path(index)
        key = printable(path.as_posix())
        sample = {"image": read_picture(self._folder / path, key), "key": key}
        if self.class_names:
            return sample | {"label": bisect.bisect_left(self._classes, path.parts[0])}
        return sample | self._words(path, key)

    def captions(self) -> Iterator[str]:
        """The lines of all `.txt` files beside images, without those that cannot be read."""
        if self._sidecars:
            for i in range(len(self)):
                with suppress(BadSample):  # `read` tells of it
                    yield from captions_of([self._words(self._path(i), "")])

    def _path(self, index: int) -> Path:
        return Path(os.fsdecode(self._paths[index].as_py()))

    def _words(self, path: Path, key: str) -> dict[str, Any]:
        for suffix in TEXTS:
            try:
                return lines_of(read_text(self._folder / path.with_suffix(suffix)), key)
            except FileNotFoundError:
                continue
            except (OSError, InputError) as error:
                reason = error.reason if isinstance(error, BadSample) else one_line(error)
                raise BadSample(key, f"its captions cannot be read ({reason})") from error
        return {}
