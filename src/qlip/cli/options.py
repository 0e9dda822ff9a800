"""What the commands share: the options that several have, and how they speak.

Results go to stdout, messages to stderr; of several processes only the first says anything.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import track as rich_track
from rich.table import Table

if TYPE_CHECKING:
    from qlip.model import QLIP

DEFAULT_MODEL = "qlip-tiny"

err = Console(stderr=True)

Paths = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH…")]
Model = Annotated[str, tyro.conf.arg(help="A bundled name, a folder, or a hub id such as nvidia/QLIP-B-16-256.")]
Device = Annotated[
    Literal["auto", "cpu", "cuda", "mps"],
    tyro.conf.arg(help="Where to compute; auto takes a GPU if there is one."),
]
ImageSize = Annotated[
    int | tuple[int, int] | None,
    tyro.conf.arg(
        metavar="SIDE|HEIGHT WIDTH", help="Pixels of the pictures, in whole patches; default: the model's."
    ),
]
HowToResize = Annotated[
    Literal["crop", "squash"],
    tyro.conf.arg(help="crop: the middle of each image; squash: all of it, whatever its aspect."),
]
Json = Annotated[bool, tyro.conf.arg(help="Print JSON instead of a table.")]
Strict = Annotated[bool, tyro.conf.arg(help="Exit with 1 if any picture failed, not only if all did.")]
CONFIG = (tyro.conf.FlagCreatePairsOff,)


def rank() -> str:
    """Of this process among those that torchrun started; known before torch is imported."""
    return os.environ.get("RANK", "0")


def load(name: str, device: str, revision: str | None = None, image_size: ImageSize = None) -> "QLIP":
    """The model that a command names."""
    import qlip

    return qlip.load(name, device=device, revision=revision, image_size=image_size)


def track(what: str) -> Callable[[Iterable], Iterable]:
    """A progress bar on stderr, if a person is watching."""
    return lambda items: rich_track(items, what, console=err, transient=True, disable=not err.is_terminal)


def finish(num_done: int, failures: list[str], strict: bool) -> int:
    """List what failed; the exit code."""
    if failures:
        err.print(f"[red]{len(failures)} failed:", highlight=False)
    for line in failures:
        err.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    return 1 if num_done == 0 or (strict and failures) else 0


def say(message: str) -> None:
    """A message for a person."""
    if rank() == "0":
        err.print(message, highlight=False, markup=False, soft_wrap=True)


def count_pictures(count: int) -> str:
    """As "1 picture" or "2 pictures"."""
    return f"{count:,} picture{'s' * (count != 1)}"


def and_more(paths: list[Path]) -> str:
    """A list of files, shortened."""
    return str(paths[0]) if len(paths) == 1 else f"{len(paths)} files, {paths[0]} to {paths[-1].name}"


def print_table(table: Table) -> None:
    """A table on stdout, as wide as its reader allows."""
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def print_json(value: Any) -> None:
    """A result on stdout for a program."""
    print(json.dumps(value, indent=2, default=str, ensure_ascii=False))
