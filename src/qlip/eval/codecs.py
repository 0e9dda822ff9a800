"""Image files for comparison: of every format the file whose size is nearest to a given one."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from PIL import Image, features

from qlip.errors import InputError

Encode = Callable[[int], bytes]


@dataclass(frozen=True)
class Codec:
    """A file format, with the settings that make its smallest files.

    Attributes:
        name: of the format, as Pillow knows it.
        lowest, highest: the range of its quality.
        nearby: qualities looked at on both sides of one, since sizes do not rise strictly with quality.
        variants: options of Pillow's writer; of several, the one that gives the smaller file is used.
    """

    name: str
    lowest: int
    highest: int
    variants: tuple[dict[str, Any], ...] = field(repr=False)
    nearby: int = 4

    def encode(self, picture: Image.Image, quality: int) -> bytes:
        """Write a file, in the variant that makes it smallest."""
        return min((write(picture, self.name, quality=quality, **v) for v in self.variants), key=len)

    def header_size(self, size: tuple[int, int]) -> int:
        """Bytes of a plain grey picture: what the format takes before it tells anything."""
        return len(self.encode(Image.new("RGB", size, "grey"), self.lowest))

    def encoder(self, picture: Image.Image) -> Encode:
        """Encode a picture at a quality, each once."""
        return cache(lambda quality: self.encode(picture, quality))

    def nearest(self, encode: Encode, *targets: int, known: Sequence[int] = ()) -> list[bytes]:
        """The file nearest in size to each target; of two as near, the one of higher quality.

        Args:
            encode: of `encoder`.
            targets: bytes.
            known: qualities that are encoded anyway, between which the search begins.
        """
        return [self._nearest(encode, target, known) for target in targets]

    def _nearest(self, encode: Encode, target: int, known: Sequence[int]) -> bytes:
        small = [quality for quality in known if len(encode(quality)) < target]
        large = [quality for quality in known if len(encode(quality)) >= target]
        low, high = max(small, default=self.lowest - 1) + 1, min(large, default=self.highest)
        while low < high:  # the least quality whose file reaches the target
            middle = (low + high) // 2
            low, high = (low, middle) if len(encode(middle)) >= target else (middle + 1, high)
        near = range(min(low + self.nearby, self.highest), max(low - self.nearby, self.lowest) - 1, -1)
        return min(map(encode, near), key=lambda file: abs(len(file) - target))


CODECS = (
    Codec(
        "JPEG",
        lowest=1,
        highest=95,
        variants=tuple({"optimize": True, "subsampling": "4:2:0", "progressive": p} for p in (False, True)),
    ),
    Codec("WebP", lowest=0, highest=100, variants=({"method": 6},)),
    # Speed 0 takes thrice as long for files no better. One thread: more could give other bytes.
    # A file takes a second, and sizes rise almost strictly.
    Codec("AVIF", 0, 100, ({"speed": 1, "subsampling": "4:2:0", "max_threads": 1},), nearby=1),
)


def write(picture: Image.Image, format: str, **options: Any) -> bytes:
    """Encode a picture.

    Raises:
        InputError: this Pillow was built without the format.
    """
    Image.init()
    if format.upper() not in Image.SAVE:
        raise InputError(
            f"this Pillow writes no {format}: install its wheel, `pip install --force-reinstall pillow`"
        )
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def write_lossless(picture: Image.Image) -> bytes:
    """Encode a picture so that every pixel comes back."""
    return write(picture, "WebP", lossless=True)


def read(file: bytes) -> Image.Image:
    """Decode a picture to 8-bit RGB."""
    return Image.open(io.BytesIO(file)).convert("RGB")


def versions() -> str:
    """Of the libraries that wrote the files."""
    names = {"libjpeg_turbo": "libjpeg-turbo", "webp": "libwebp", "avif": "libavif"}
    return ", ".join(f"{name} {features.version(key)}" for key, name in names.items() if features.check(key))
