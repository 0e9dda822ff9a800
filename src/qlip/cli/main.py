"""From the arguments to a command and its exit code."""

import argparse
import logging
import os
import sys
from collections.abc import Callable

import tyro
from rich.logging import RichHandler

from qlip.cli import data, eval, figures, llava, t2i, tokenizer, tokens, training, um3
from qlip.cli.options import CONFIG, err, prepare_streams, rank, visible
from qlip.errors import InputError, SharedError
from qlip.machine import set_up_threads

FROM_RECIPE: dict[str, Callable[..., int]] = {
    "train": training.train,
    "calibrate": training.calibrate,
    "llava": llava.llava,
}

COMMANDS: dict[str, Callable[..., int]] = {
    "info": tokenizer.info,
    "verify": tokenizer.verify,
    "tokenize": tokenizer.tokenize,
    "detokenize": tokenizer.detokenize,
    "reconstruct": tokenizer.reconstruct,
    "classify": tokenizer.classify,
    **FROM_RECIPE,
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
    if argv and argv[0] in FROM_RECIPE:  # their options come from the recipe that they name
        return FROM_RECIPE[argv[0]](*argv[1:])
    if any(not arg or (arg.startswith("--") and arg.endswith("=")) for arg in argv):
        raise InputError("an argument is empty: is a variable of the shell not set?")
    description = (
        "Text-aligned visual tokens: pictures to a few binary tokens and back, and to words.\n\n"
        "Every command that reads images takes --max-pixels N (for images larger than 89 megapixels) and "
        "--allow-outside (rows of data may name files outside of their own folder)."
    )
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS, args=argv, prog="qlip", description=description, config=CONFIG
    )


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
    err.print(visible(f"{who}: {error}"), style="red", highlight=False, markup=False, soft_wrap=True)
    return 1
