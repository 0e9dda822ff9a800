"""Many pictures as files, for benchmarks: each says how it was drawn, and what is there is not drawn again."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from qlip.errors import InputError
from qlip.eval.batches import Track
from qlip.files import whole_file
from qlip.guarded import parse_json
from qlip.jobs.generate import grid
from qlip.t2i.pipeline import TextToImage, load_t2i
from qlip.train.distributed import on_all_ranks, rank, world_size
from qlip.um3.checkpoint import is_um3
from qlip.um3.pipeline import UnifiedModel, load_um3

ABOUT = "qlip"  # the PNG's text that says how it was drawn
COLUMNS = 2

Draw = Callable[[Sequence[tuple[str, int]]], Iterator[Image.Image]]
"""From prompts with their seeds to a picture of each, in order."""

Painter = TextToImage | UnifiedModel


@dataclass(frozen=True)
class Sheet:
    """A file: a picture, or several of one prompt in two columns, edge to edge.

    Attributes:
        path: the PNG.
        prompt: what is drawn.
        seeds: one for each picture.
    """

    path: Path
    prompt: str
    seeds: tuple[int, ...]


def draw_sheets(sheets: Sequence[Sheet], draw: Draw, about: Mapping[str, Any], track: Track = iter) -> None:
    """Draw what is not there; of several processes each draws its share.

    Args:
        sheets: the files.
        draw: such as `TextToImage.draw_rows` with its settings.
        about: model and settings, written into each file.
        track: shows progress.

    Raises:
        InputError: a file is there that was drawn otherwise, a prompt cannot be drawn, or no file can be written.
    """

    def share() -> None:
        missing = [sheet for sheet in sheets[rank() :: world_size()] if not _is_there(sheet, about)]
        pictures = draw([(sheet.prompt, seed) for sheet in missing for seed in sheet.seeds])
        for sheet in (track if rank() == 0 else iter)(missing):
            several = list(islice(pictures, len(sheet.seeds)))
            text = PngInfo()
            text.add_text(ABOUT, json.dumps(_about(sheet, about)))
            with whole_file(sheet.path) as unfinished:
                grid(several, min(COLUMNS, len(several)), gap=0).save(unfinished, "PNG", pnginfo=text)

    on_all_ranks(share)


def load_painter(name: str, **options: Any) -> Painter:
    """A text-to-image model or a UM3, for benchmarks.

    Args:
        name: a bundled one, or a folder, such as RUN/model.
        options: tokenizer, device and dtype; see `load_t2i`.

    Raises:
        InputError: see `load_t2i` and `load_um3`.
    """
    return load_um3(name, **options) if is_um3(name) else load_t2i(name, **options)


def fingerprint(model: Painter) -> str:
    """A hash of all weights that draw, the tokenizer's too: 16 hexadecimal digits."""
    digest = hashlib.sha256(repr(model.model.config).encode())
    for module in (model.model, model.tokenizer):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _about(sheet: Sheet, about: Mapping[str, Any]) -> dict[str, Any]:
    return {**about, "prompt": sheet.prompt, "seeds": list(sheet.seeds)}


def _is_there(sheet: Sheet, about: Mapping[str, Any]) -> bool:
    try:
        with Image.open(sheet.path) as picture:
            found = parse_json(picture.info.get(ABOUT, "{}"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        found = {}
    wanted = _about(sheet, about)
    if others := [name for name, value in wanted.items() if found.get(name) != value]:
        was = ", ".join(f"{name} {found.get(name, 'unknown')!r}" for name in others)
        raise InputError(f"{sheet.path} was drawn otherwise ({was}): name another --out, or delete it")
    return True
