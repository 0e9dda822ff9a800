"""Many pictures in, one result each: what a person named, what could be read, what could not."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from PIL import Image

from qlip.data.walk import walk
from qlip.errors import InputError
from qlip.eval.batches import Track
from qlip.image_files import is_image_file, is_pipe

logger = logging.getLogger("qlip")
_PARTS = {
    "cropped": "of %s the middle is used: --resize squash uses all of them",
    "first_frame": "of %s that are animations, or have pages, the first one is used",
}


@dataclass
class Pictures:
    """Pictures of several paths, read one batch after the other; those that fail are noted and passed over.

    Attributes:
        paths: the files.
        read: from a path to a picture; raises InputError.
        batch_size: how many at once.
        failures: one line for each file that could not be read, filled while iterating.
        partly: how many images are not seen whole, by what is seen of them, filled likewise.
    """

    paths: Sequence[Path]
    read: Callable[[Path], Image.Image]
    batch_size: int = 32
    failures: list[str] = field(default_factory=list)
    partly: Counter[str] = field(default_factory=Counter)

    def batches(self, track: Track = iter) -> Iterator[tuple[list[Path], list[Image.Image]]]:
        """Batches of paths and their pictures, never empty."""
        paths: list[Path] = []
        pictures: list[Image.Image] = []
        for path in track(self.paths):
            try:
                pictures.append(self.read(path))
            except InputError as error:
                self.failures.append(str(error))
                continue
            self.partly.update(parts_of(pictures[-1]))
            paths.append(path)
            if len(paths) == self.batch_size:
                yield paths, pictures
                paths, pictures = [], []
        if paths:
            yield paths, pictures
        say_partly(self.partly)


def parts_of(image: Image.Image) -> set[str]:
    """What is seen of an image that `ImageProcessor.preprocess` gave, if not all of it."""
    return _PARTS.keys() & getattr(image, "info", {}).keys()


def say_partly(partly: Mapping[str, int]) -> None:
    """Log, once, how many images are not seen whole."""
    for name, count in sorted(partly.items()):
        logger.info(_PARTS[name], f"{count:,} image{'s' * (count != 1)}")


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """Files as they are named, and in folders every image, however deep; each once.

    Raises:
        InputError: nothing to read.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            files = (path / name for name in sorted(walk(path)))
            inside = [p for p in files if not is_pipe(p) and is_image_file(p)]
            if not inside:
                raise InputError(f"{path}: no pictures in this folder")
            found += inside
        else:
            found.append(path)
    if not found:
        raise InputError("no pictures: name at least one file or folder")
    return list(dict.fromkeys(found))


def output_names(keys: Sequence[str]) -> list[PurePath]:
    """A relative .png path for each key, all different, in the folders that the keys do not share.

    Keys come from files of other people, too: nothing leads out of the output folder.
    """
    parts = [
        [_file_name(p) for p in PurePath(key).parts if p not in ("..", PurePath(key).anchor)] or ["picture"]
        for key in keys
    ]
    shared = 0
    while parts and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    names = [PurePath(*p[shared:]) for p in parts]
    short = [name.with_suffix(".png") for name in names]
    uses = Counter(short)
    unique = [s if uses[s] == 1 else n.with_name(n.name + ".png") for n, s in zip(names, short, strict=True)]
    if len(set(unique)) < len(unique):  # a key twice, or "a" beside "a.png"
        return [name.with_name(f"{i:05d}-{name.name}.png") for i, name in enumerate(names)]
    return unique


def _file_name(part: str) -> str:
    """A name that file systems take: no NUL, and short of 255 bytes by what is put around it."""
    return part.replace("\0", "_").encode("utf-8", "replace")[:200].decode("utf-8", "ignore")
