"""Image files: which files are images, and opening one without paying more for it than an image costs.

A file is an image if its content begins as one, or if its name says so (`is_image_file`): a photograph without a
suffix is read, and one of a format that we cannot read (HEIC) fails by its name and is not passed over.

What reading one image may cost has limits, each of which an environment variable raises:

| variable | default | limit of |
| --- | --- | --- |
| `QLIP_MAX_PIXELS` | Pillow's 89,478,485 | width × height, and a 16th of width × height × passes |
| `QLIP_MAX_IMAGE_BYTES` | 536,870,912 | the file |
| `QLIP_MAX_IMAGE_PARTS` | 2,000 | reads before the pixels: an ordinary file of hundreds of chunks stays below it |

Passes over the pixels are the scans of a progressive JPEG, and 1,000 for what Pillow decodes in Python (QOI, plain
PPM, BMP with RLE).
"""

import io
import os
import re
import stat
import struct
import sys

from PIL import ExifTags, Image

from qlip.errors import InputError, one_line

# Formats that have a signature and that PIL decodes itself: EPS would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "QOI")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


READ_SUFFIXES = _words(
    "jpg jpeg jpe jfif jif mpo png apng webp gif bmp dib tif tiff ppm pgm pbm pnm pfm avif avifs jp2 "
    "j2k j2c jpc jpf jpx ico qoi"
)
# Images, too, though we cannot read them: they fail by their names instead of being passed over.
OTHER_SUFFIXES = _words(
    "heic heif hif jxl psd tga pcx exr hdr svg dng cr2 cr3 crw nef nrw arw srf sr2 orf rw2 raf pef"
)
IMAGE_SUFFIXES = READ_SUFFIXES | OTHER_SUFFIXES
# Never opened to see whether they hold an image: what lies beside images, and what is left of them.
_NO_IMAGES = _words(
    "txt cls json jsonl csv tsv parquet arrow tar index md html xml yaml yml npy npz safetensors py "
    "log bak tmp temp part partial crdownload download orig swp swo old unfinished"
)
_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|GIF8[79]a|BM....\0\0\0\0|II\*\0|MM\0\*|II\+\0|MM\0\+"
    rb"|P[1-6fF]\s|....ftyp(?:avi[fs]|heic|heix|mif1|msf1)|\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n"
    rb"|\x00\x00\x01\x00[^\0]\x00|qoif|\0\0\0\x0cJXL \r\n\x87\n|8BPS\x00\x01",
    re.DOTALL,
)
_SIGNATURE_BYTES = 16

_PYTHON_PASSES = 1000  # what Pillow decodes in Python takes about so long as so many scans of a JPEG
_MOST_PASSES = 16  # a usual progressive JPEG has 10 scans
_HEADER_BYTES = 8 << 20  # profiles, metadata and offsets before the pixels
_EXIF_BYTES = 1 << 20
_MOST_READS = 5_000_000
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")


def is_image_name(name: str) -> bool:
    """Whether a file's name says that it is an image."""
    return os.path.splitext(name)[1][1:].lower() in IMAGE_SUFFIXES


def is_image_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an image: by its name, or else by the first bytes of a regular file."""
    name = os.path.basename(os.fspath(path))
    if is_image_name(name):
        return True
    if name.startswith(".") or name.endswith("~") or os.path.splitext(name)[1][1:].lower() in _NO_IMAGES:
        return False
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return is_image(file.read(_SIGNATURE_BYTES))
    except (OSError, ValueError):
        return False


def is_image(content: bytes) -> bool:
    """Whether a file's content begins as an image does."""
    return bool(_SIGNATURES.match(content))


def is_pipe(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a pipe, as /dev/stdin and `<(…)` are: it can be read once, and only by one process."""
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def read_file(path: str | os.PathLike[str], pipes: bool = False) -> bytes:
    """The bytes of an image file.

    Args:
        path: a regular file. Devices and sockets could hang or never end.
        pipes: whether a pipe will do, too: only if a person named it.

    Raises:
        InputError: it is not there, no such file, or larger than `QLIP_MAX_IMAGE_BYTES`; the reason alone.
    """
    limit = max_bytes()
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise InputError("is a directory")
        if not stat.S_ISREG(mode) and not (pipes and stat.S_ISFIFO(mode)):
            raise InputError("no regular file" + " and no pipe" * pipes)
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise InputError(one_line(error)) from error
    if len(content) > limit:
        raise InputError(f"more than {limit:,} bytes: raise QLIP_MAX_IMAGE_BYTES if you trust it")
    return content


def is_inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Whether a path leads to a place in a folder, links followed."""
    try:
        inside, outside = os.path.realpath(path), os.path.realpath(folder)
        return os.path.commonpath([inside, outside]) == outside
    except (OSError, ValueError):
        return False


def allows_outside() -> bool:
    """Whether rows of data may name files outside of their own folder (`QLIP_ALLOW_OUTSIDE`)."""
    return os.environ.get("QLIP_ALLOW_OUTSIDE", "0") not in ("", "0")


def allow_outside() -> None:
    """Let rows name files outside of their own folder, in this process and those that it starts."""
    os.environ["QLIP_ALLOW_OUTSIDE"] = "1"


def max_bytes() -> int:
    """Bytes that the file of an image may have."""
    return _limit("QLIP_MAX_IMAGE_BYTES", 1 << 29)


def max_pixels() -> int:
    """Pixels that an image may have."""
    return _limit("QLIP_MAX_PIXELS", Image.MAX_IMAGE_PIXELS or sys.maxsize)


def set_max_pixels(number: int | None) -> None:
    """Change `max_pixels` for this process and those that it starts; None leaves it.

    Raises:
        InputError: the number is below 1.
    """
    if number is not None:
        if number < 1:
            raise InputError(f"max_pixels is {number}: use 1 or more")
        os.environ["QLIP_MAX_PIXELS"] = str(number)


def open_image(content: bytes) -> Image.Image:
    """Read an image's header: `Image.open` but for the formats, and with our limits.

    Args:
        content: of the file.

    Returns:
        the image, whose pixels are decoded on `load()`.

    Raises:
        InputError: it is no image, or costs more than it may; the reason alone. Decoders raise other things, too.
    """
    most = max_pixels()
    if "QLIP_MAX_PIXELS" in os.environ and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, most)  # some decoders check it themselves
    file = _Metered(content)
    image = _open(file)
    width, height = image.size
    if width * height > most:
        raise TooLarge(f"{width}x{height}", most)
    if len(image.info.get("exif") or b"") > _EXIF_BYTES:
        raise InputError(f"its EXIF block is larger than {_EXIF_BYTES:,} bytes")
    passes = _passes(image, content)
    if passes > 1 and width * height * passes > most * _MOST_PASSES:
        raise InputError(
            f"decoding its {width}x{height} pixels takes {passes} passes: raise QLIP_MAX_PIXELS if you trust it"
        )
    file.allow(width * height)
    return image


def image_size(content: bytes) -> tuple[int, int]:
    """Height and width of an encoded image once it is upright, from its header alone.

    Raises:
        InputError: it is no image. Decoders raise other things, too.
    """
    image = open_image(content)
    width, height = image.size
    turned = image.format != "TIFF" and orientation_of(image) in (5, 6, 7, 8)  # PIL turns TIFF itself
    return (width, height) if turned else (height, width)


def orientation_of(image: Image.Image) -> int | None:
    """The EXIF orientation of an image, 1 to 8, where it says one."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # an unreadable EXIF block says nothing; the image beside it is good
        return None


class TooLarge(InputError):
    """An image of more pixels than it may have."""

    def __init__(self, pixels: str, most: int):
        super().__init__(
            f"has {pixels} pixels, over the limit of {most}: "
            "shrink it, or raise the limit if you trust it (--max-pixels, or QLIP_MAX_PIXELS)"
        )


class _Metered(io.BytesIO):
    """A file that counts what a decoder reads of it.

    Decoders read chunks, segments, directories and comments by small reads in Python. Their number and length is
    what an image costs beside its pixels, in every format.
    """

    def __init__(self, content: bytes):
        super().__init__(content)
        self._reads = _limit("QLIP_MAX_IMAGE_PARTS", 2000)
        self._bytes = _HEADER_BYTES

    def allow(self, num_pixels: int) -> None:
        """From now on as much as pixels take."""
        self._reads += min(8 * num_pixels, _MOST_READS)
        self._bytes = sys.maxsize

    def read(self, size: int | None = -1, /) -> bytes:
        """Read, and count it."""
        found = super().read(size)
        self._reads -= 1
        if size is not None and size >= 0:  # else a decoder takes the whole file at once
            self._bytes -= len(found)
        if self._reads < 0 or self._bytes < 0:
            raise TooManyParts
        return found


class TooManyParts(Exception):
    """A file of more chunks, comments or directories than an image has. No ValueError: decoders catch that."""

    def __str__(self) -> str:
        return "too many chunks, comments or directories: raise QLIP_MAX_IMAGE_PARTS if you trust it"


def _open(file: _Metered) -> Image.Image:
    """`Image.open` but for its check of the size, which `open_image` makes.

    Up to twice the limit PIL only warns, and to silence that would change the warnings of every thread.
    """
    Image.init()
    prefix = file.read(16)
    for factory, accept in (Image.OPEN[format] for format in FORMATS if format in Image.OPEN):
        try:
            if not accept or accept(prefix) is True:
                file.seek(0)
                return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # not of this format after all
            continue
    raise InputError(f"damaged, or not one of {', '.join(FORMATS)}")


def _passes(image: Image.Image, content: bytes) -> int:
    """How often decoding goes over the pixels, roughly."""
    if image.format in ("JPEG", "MPO"):
        return _num_scans(content)
    tiles = getattr(image, "tile", None)
    return _PYTHON_PASSES if tiles and tiles[0][0] in Image.DECODERS else 1


def _num_scans(content: bytes) -> int:
    """The scans of the first image of a JPEG file."""
    if content.count(b"\xff\xda") <= _MOST_PASSES:
        return 1
    scans, at = 0, 2
    while found := _MARKER.search(content, at):  # within a scan FF stands before 00 or a restart
        at, marker = found.end(), found[1][0]
        if marker == 0xD9:
            break
        if marker != 0xD8 and at + 2 <= len(content):
            scans += marker == 0xDA
            at += int.from_bytes(content[at : at + 2], "big")
    return scans


def _limit(name: str, default: int) -> int:
    value = os.environ.get(name)
    if value is None:
        return default
    if not value.isascii() or not value.isdecimal() or not int(value):
        raise InputError(f"{name}={value!r}: use a number of 1 or more")
    return int(value)
