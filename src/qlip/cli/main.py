"""From the arguments to a command and its exit code."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

import qlip
from qlip.cli import data, eval, figures, llava, t2i, tokenizer, tokens, training, um3
from qlip.cli.options import Group, as_typed, did_you_mean, err, prepare_streams, rank, visible
from qlip.errors import InputError, SharedError
from qlip.machine import set_up_threads

COMMANDS: dict[str, Callable[..., int] | Group] = {
    "info": tokenizer.info,
    "verify": tokenizer.verify,
    "tokenize": tokenizer.tokenize,
    "detokenize": tokenizer.detokenize,
    "reconstruct": tokenizer.reconstruct,
    "classify": tokenizer.classify,
    "train": training.train,
    "calibrate": training.calibrate,
    "llava": llava.llava,
    "generate": t2i.generate,
    "features": t2i.features,
    "um3": um3.um3,
    "export": training.export,
    "publish": training.publish,
    "push": training.push,
    "data": data.data,
    "tokens": tokens.tokens,
    "eval": eval.eval,
    "figures": figures.figures,
    "demo": tokenizer.demo,
}

PLAIN: Any = {"highlight": False, "markup": False, "soft_wrap": True}

QLIP = Group(
    "Text-aligned visual tokens: pictures to a few binary tokens and back, and to words.\n\n"
    "Every command that reads images takes --max-pixels N (for images larger than 89 megapixels) and\n"
    "--allow-outside (rows of data may name files outside of their own folder).",
    COMMANDS,
    own_options=("train", "calibrate"),
)


def main() -> None:
    """Run the command line and exit with its code."""
    logger = logging.getLogger("qlip")
    logger.setLevel("INFO")
    logger.handlers = [_log_handler()]
    if rank() != "0":  # of the processes that torchrun starts the first one speaks
        logger.setLevel("ERROR")
    set_up_threads()
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # or each of its retries says so; the last error suffices
    prepare_streams()
    try:
        code = _dispatch(sys.argv[1:])
        sys.stdout.flush()
    except InputError as error:
        code = _fail(error)
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of stdout went away, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        elif error.errno is None:
            raise
        else:
            code = _fail(error)
    except KeyboardInterrupt:
        err.print("interrupted")
        code = 130
    if code and "LOCAL_RANK" in os.environ:  # taking gloo down beside processes that fail too can hang for ever
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _log_handler() -> logging.Handler:
    """For a person with colours; in a file a message is one line, so that it can be searched."""
    if err.is_terminal:
        return RichHandler(console=err, show_path=False, show_time=False)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)-8s %(message)s"))
    return handler


def _dispatch(argv: list[str]) -> int:
    argv = _set_image_options(argv)
    if argv == ["--version"]:
        print(f"qlip {qlip.__version__}")
        return 0
    return _run(QLIP, "qlip", argv)


def _run(group: Group, called: str, argv: list[str]) -> int:
    """Run the command that the first words name; of a group alone print the help."""
    if not argv or argv[0] in ("-h", "--help"):
        _print_help(called, group)
        return 0
    name, *argv = argv
    command = group.commands.get(name)
    if command is None:
        what = "option" if name.startswith("-") else "command"
        hint = did_you_mean(name, group.commands)
        err.print(visible(f"{called}: no {what} {name!r}{hint} {called} --help lists them"), **PLAIN)
        return 2
    called = f"{called} {name}"
    if isinstance(command, Group):
        return _run(command, called, argv)
    return _call(command, called, argv, name in group.own_options)


def _call(command: Callable[..., int], called: str, argv: list[str], has_own_options: bool) -> int:
    if has_own_options:  # they come from the recipe that it names
        return command(*argv)
    if any(not arg or (arg.startswith("--") and arg.endswith("=")) for arg in argv):
        raise InputError("an argument is empty: is a variable of the shell not set?")
    return tyro.cli(command, args=argv, prog=called)


def _print_help(called: str, group: Group) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, command in group.commands.items():
        about = command.about if isinstance(command, Group) else command.__doc__ or ""
        table.add_row(name, escape(about.splitlines()[0]))
    console = Console(emoji=False)
    console.print(f"usage: {called} COMMAND …\n\n{group.about}\n\ncommands:", **PLAIN)
    console.print(table, highlight=False)
    console.print(f"\n{called} COMMAND --help says more of one.", **PLAIN)


def _set_image_options(argv: list[str]) -> list[str]:
    """Take the options of all commands that read images; what is left is the command's."""
    parser = argparse.ArgumentParser(prog="qlip", add_help=False, allow_abbrev=False)
    parser.add_argument("--max-pixels", type=int)
    parser.add_argument("--allow-outside", action="store_true")
    options, rest = parser.parse_known_args(argv)
    if options.max_pixels is not None or options.allow_outside:
        from qlip.image_files import allow_outside, set_max_pixels

        set_max_pixels(options.max_pixels)
        if options.allow_outside:
            allow_outside()
    return rest


def _fail(error: Exception) -> int:
    if rank() != "0" and isinstance(error, SharedError):  # the first process says it
        return 1
    who = "qlip" if rank() == "0" else f"qlip, rank {rank()}"
    message = as_typed(str(error), sys.argv[1:])
    err.print(visible(f"{who}: {message}"), style="red", **PLAIN)
    return 1
