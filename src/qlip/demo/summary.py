"""What the demo found."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qlip.model.config import QLIPConfig


@dataclass(frozen=True)
class Photo:
    """An entry of `photos.json`."""

    file: str
    title: str
    label: str
    author: str
    license: str
    source: str


@dataclass(frozen=True)
class Rendition:
    """A photo after one way of making it small.

    Attributes:
        method: "QLIP", "JPEG", "WebP" or "AVIF".
        num_bytes: what was kept.
        file: what a browser shows: the very file, or of ours a lossless copy of what the tokens gave.
        psnr: in dB.
        ssim: at most 1.
    """

    method: str
    num_bytes: int
    file: bytes
    psnr: float
    ssim: float


@dataclass(frozen=True)
class Example:
    """All about one photo.

    Attributes:
        photo: title, label and author.
        original: what the model saw, a lossless WebP file.
        tokens: (N,) int64.
        colors: (N, 3) uint8, of the tokens in their map.
        token_map: a lossless WebP file.
        renditions: ours, then those of `CODECS`, near our size.
        header_free: the same, but those of `CODECS` at our size plus their header's.
        guesses: every label with its probability, likeliest first; empty if the model reads no words.
    """

    photo: Photo
    original: bytes
    tokens: Tensor
    colors: Tensor
    token_map: bytes
    renditions: tuple[Rendition, ...]
    header_free: tuple[Rendition, ...]
    guesses: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Row:
    """One method, its means over the photos.

    Attributes:
        method: as in `Rendition`.
        num_bytes, bits_per_pixel, psnr, ssim: of what was kept.
        smallest: the least of all bytes, not a mean.
        header: bytes of a plain grey picture; 0 for ours.
        header_free_psnr: had the header cost nothing.
    """

    method: str
    num_bytes: float
    smallest: int
    bits_per_pixel: float
    psnr: float
    ssim: float
    header: int
    header_free_psnr: float


@dataclass(frozen=True)
class Drawing:
    """What a model drew after a prompt: lossless WebP files."""

    prompt: str
    files: tuple[bytes, ...]


@dataclass(frozen=True)
class Writer:
    """A model that writes tokens, and what it drew.

    Attributes:
        name: of the model.
        size: its parameters.
        cfg: how strongly the prompts counted.
        rows: of each prompt its pictures.
    """

    name: str
    size: int
    cfg: float
    rows: tuple[Drawing, ...]


@dataclass(frozen=True)
class Unified:
    """What a model of text and images made.

    Attributes:
        writer: what it is, and what it drew.
        captions: what it says of each photo.
        beginning, story: a text, and how it went on.
    """

    writer: Writer
    captions: tuple[str, ...]
    beginning: str
    story: str


@dataclass(frozen=True)
class Summary:
    """What the demo found.

    Attributes:
        name, id_hash, config: of the tokenizer.
        decoder_size: parameters that turn tokens into a picture.
        rows: one for each method, ours first.
        examples: one for each photo.
        held_out: what was measured of a bundled tokenizer when it was published; empty for others.
        path: of the page.
        drawings: of a text-to-image model; None without one.
        unified: what a model of text and images made; None without one.
    """

    name: str
    id_hash: str
    config: QLIPConfig
    decoder_size: int
    rows: tuple[Row, ...]
    examples: tuple[Example, ...]
    held_out: str
    path: Path
    drawings: Writer | None = None
    unified: Unified | None = None

    @property
    def num_right(self) -> int | None:
        """Photos whose likeliest label is theirs; None if the model reads no words."""
        right = [e.guesses[0][0] == e.photo.label for e in self.examples if e.guesses]
        return sum(right) if right else None
