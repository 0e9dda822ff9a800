"""What a figure leaves: `NAME.json`, and `NAME.png` drawn from it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlip.environment import command, environment
from qlip.files import whole_file
from qlip.train.plot import save_figure

if TYPE_CHECKING:
    from qlip.train.plot import Axes, Figure

OURS, THEIRS = "#1f5fa8", "#c9682a"
"""Colours: what we measured, and what the paper prints."""


def write_figure(
    out: Path, name: str, numbers: dict[str, Any], draw: Callable[[dict[str, Any], Path], "Figure"], device: str
) -> Path:
    """Write the numbers with what they were measured on and the command, and draw them.

    Args:
        out: folder.
        name: of the figure.
        numbers: for JSON.
        draw: what makes a figure of the numbers; it may look for pictures in the folder.
        device: on which they were measured.

    Returns:
        the JSON file.
    """
    path = out / f"{name}.json"
    record = {"figure": name, **numbers, "environment": environment(device), "command": command()}
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    redraw(path, draw)
    return path


def redraw(path: Path, draw: Callable[[dict[str, Any], Path], "Figure"]) -> None:
    """Draw the numbers of a JSON file into the PNG beside it."""
    save_figure(draw(json.loads(path.read_text(encoding="utf-8")), path.parent), path.with_suffix(".png"))


def plain(axis: "Axes", title: str, x: str, y: str) -> None:
    """A light frame with a title and named axes."""
    axis.set_title(title, fontsize=11, loc="left")
    axis.set_xlabel(x, fontsize=10)
    axis.set_ylabel(y, fontsize=10)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)
