"""What the commands share: the options that several have, and how they speak.

Results go to stdout, messages to stderr; of several processes only the first says anything.
"""

import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import track as rich_track
from rich.table import Table

if TYPE_CHECKING:
    from qlip.model import QLIP

DEFAULT_MODEL = "qlip-tiny"

err = Console(stderr=True, emoji=False)

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
_SURROGATE = re.compile("[\ud800-\udfff]")

AT_LEAST_ONE = "(at least one)"  # instead of "(default: )", which tyro says of all tuples
Paths = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH…", help_behavior_hint=AT_LEAST_ONE)
]
_MODEL = "A bundled name, a folder, or a hub id such as nvidia/QLIP-B-16-256."
Model = Annotated[str, tyro.conf.arg(help=_MODEL)]
PositionalModel = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL", help=_MODEL)]
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


@dataclass(frozen=True)
class Group:
    """Commands below a name, or those of `qlip` itself.

    Args:
        about: a sentence for its help.
        commands: by name, functions or further groups.
        own_options: names of those functions that take the words after them and parse them by themselves.
    """

    about: str
    commands: "Mapping[str, Callable[..., int] | Group]"
    own_options: tuple[str, ...] = ()


def rank() -> str:
    """Of this process among those that torchrun started; known before torch is imported."""
    return os.environ.get("RANK", "0")


def prepare_streams() -> None:
    """Escape on stdout and stderr what their encoding lacks; a stream that is closed takes everything."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # for the whole process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def visible(text: str) -> str:
    """With control characters as escapes: names of files may hold what a terminal obeys."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def cell(value: object) -> str:
    """A value for a table, letter for letter."""
    return escape(visible(str(value)).replace("\n", "\\n"))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What follows a name that is unknown: a question about the known one that is most like it, if any is."""
    close = difflib.get_close_matches(name, known, 1)
    return f": did you mean {close[0]!r}?" if close else ";"


def as_typed(message: str, arguments: Sequence[str]) -> str:
    """An error with the options that a person typed in place of the parameters of Python.

    Args:
        message: for example "batch_size is 0: use 1 or more".
        arguments: the command line, such as "--batch-size 0".
    """
    for option in {word.partition("=")[0] for word in arguments if word.startswith("--")}:
        name = option[2:].replace("-", "_")
        for parameter in {name, name.rpartition(".")[2]}:
            place = r"(?<![\w.'/-]){}(?![\w/'-]|\.\w)" if re.search("[_.]", parameter) else "^{}(?= is )"
            message = re.sub(place.format(re.escape(parameter)), option, message)  # one word can be an English one
    return message


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
        err.print(visible(f"  {line}"), highlight=False, markup=False, soft_wrap=True)
    return 1 if num_done == 0 or (strict and failures) else 0


def say(message: str) -> None:
    """A message for a person."""
    if rank() == "0":
        err.print(visible(message), highlight=False, markup=False, soft_wrap=True)


def count_pictures(count: int) -> str:
    """As "1 picture" or "2 pictures"."""
    return f"{count:,} picture{'s' * (count != 1)}"


def and_more(paths: list[Path]) -> str:
    """A list of files, shortened."""
    return str(paths[0]) if len(paths) == 1 else f"{len(paths)} files, {paths[0]} to {paths[-1].name}"


def print_table(table: Table) -> None:
    """A table on stdout, as wide as its reader allows."""
    Console(width=None if sys.stdout.isatty() else 200, emoji=False).print(table)


def print_json(value: Any) -> None:
    """A result on stdout for a program: strict JSON in ASCII, with null for NaN and infinities."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    text = _SURROGATE.sub(lambda half: f"\\\\u{ord(half[0]):04x}", text)  # of names that are not UTF-8
    print(json.dumps(json.loads(text, parse_constant=lambda name: None), indent=2))
