"""Prompts to files: a PNG for each picture, and a grid of all."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qlip.data.values import lines, read_text
from qlip.errors import InputError, one_line
from qlip.eval.batches import Track
from qlip.jobs.tokens import save_png

GRID, GAP = "grid.png", 4
MOST_ROWS = 64  # of the grid, which is for looking at


@dataclass(frozen=True)
class Drawn:
    """One picture.

    Attributes:
        prompt: what it was drawn after.
        seed: that draws it again.
        path: the file.
    """

    prompt: str
    seed: int
    path: Path


def generate_files(
    draw: Callable[..., Sequence[Image.Image]],
    prompts: Sequence[str],
    out: Path,
    num: int = 1,
    seed: int = 0,
    track: Track = iter,
    **options,
) -> list[Drawn]:
    """Draw pictures and write them; the same prompts, settings and seed give the same bytes on one machine.

    Args:
        draw: what draws: `TextToImage.generate`, or `UnifiedModel.draw`.
        prompts: what.
        out: folder for `000-a-red-mug-0.png` and so on, and `grid.png`, a row for each of the first 64 prompts.
        num: pictures of each prompt.
        seed: of the first picture of each prompt.
        track: shows progress.
        options: see there.

    Returns:
        what was written, in order.

    Raises:
        InputError: see there; or a file cannot be written.
    """
    pictures = draw(prompts, num, seed=seed, track=track, **options)
    drawn = []
    for i, picture in enumerate(pictures):
        number, k = divmod(i, num)
        path = out / f"{number:03d}-{_slug(prompts[number])}-{k}.png"
        save_png(picture, path)
        drawn.append(Drawn(prompts[number], seed + k, path))
    save_png(grid(pictures[: num * MOST_ROWS], num), out / GRID)
    return drawn


def read_prompts(path: Path) -> list[str]:
    """A prompt a line; empty lines do not count.

    Raises:
        InputError: the file cannot be read, or holds none.
    """
    try:
        prompts = lines(read_text(path))
    except (OSError, InputError) as error:
        raise InputError(
            f"{path} cannot be read ({one_line(error)}): name a text file, a prompt a line"
        ) from error
    if not prompts:
        raise InputError(f"{path} holds no prompts: write one a line")
    return prompts


def grid(pictures: Sequence[Image.Image], columns: int, gap: int = GAP) -> Image.Image:
    """Pictures of one size in rows, with white between them."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def _slug(prompt: str) -> str:
    """What of a prompt makes a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "picture"
