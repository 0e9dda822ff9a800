"""The command `qlip`. Thin: it parses, calls a function elsewhere, and prints.

Results go to stdout, messages to stderr. Exit codes: 0 it worked, 1 it did not, 2 the arguments are wrong.
Torch is imported when a command runs, so that `--help` answers at once.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import track as rich_track
from rich.table import Table

from qlip.errors import InputError, SharedError

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
Json = Annotated[bool, tyro.conf.arg(help="Print JSON instead of a table.")]
Strict = Annotated[bool, tyro.conf.arg(help="Exit with 1 if any picture failed, not only if all did.")]


def info(
    model: Annotated[Model, tyro.conf.Positional] = DEFAULT_MODEL,
    /,
    *,
    revision: str | None = None,
    json: Json = False,
) -> int:
    """Say what a tokenizer is: sizes, tokens, bits, the name of its ids.

    Args:
        revision: branch, tag or commit on the hub.
    """
    from qlip.jobs.info import describe_model

    facts = describe_model(_load(model, "cpu", revision))
    if json:
        _print_json(facts)
    else:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in facts.items():
            text = f"{value:,}" if isinstance(value, int) else escape(value)
            table.add_row(f"[bold]{name.replace('_', ' ')}", text)
        _print(table)
    return 0


def verify(
    model: Annotated[Model, tyro.conf.Positional] = DEFAULT_MODEL,
    /,
    *,
    revision: str | None = None,
    json: Json = False,
) -> int:
    """Check that a checkpoint holds what it claims, from its keys to a rebuilt picture.

    Args:
        revision: branch, tag or commit on the hub.
    """
    from qlip.eval.verify import NOT_RUN
    from qlip.eval.verify import verify as run_checks

    checks = run_checks(model, revision=revision)
    if json:
        _print_json([asdict(check) for check in checks])
    else:
        for check in checks:
            mark = "[green]✓[/]" if check.passed else "[dim]–[/]" if check.detail == NOT_RUN else "[red]✗[/]"
            Console(soft_wrap=True).print(f"{mark} [bold]{check.name}[/]  {escape(check.detail)}", highlight=False)
    return 0 if all(check.passed for check in checks) else 1


def tokenize(
    paths: Paths, /, *, out: Path, model: Model = DEFAULT_MODEL, device: Device = "auto", strict: Strict = False
) -> int:
    """Turn pictures into tokens and write them as Parquet.

    Args:
        paths: Pictures, and folders of them.
        out: A file (tokens.parquet), or, without a suffix, a folder of shards of 10,000 rows.
    """
    from qlip.jobs.tokens import tokenize_files

    written, num_rows, failures = tokenize_files(_load(model, device), paths, out, _track("tokenizing"))
    if written:
        _say(f"{_pictures(num_rows)} in {_and_more(written)}")
    return _finish(num_rows, failures, strict)


def detokenize(paths: Paths, /, *, out: Path, model: Model = DEFAULT_MODEL, device: Device = "auto") -> int:
    """Rebuild pictures from token files.

    Args:
        paths: Token files, and folders of them.
        out: Folder for the PNGs, named as the pictures were.
    """
    from qlip.jobs.tokens import detokenize_files

    written = detokenize_files(_load(model, device), paths, out, _track("rebuilding"))
    _say(f"{_pictures(len(written))} in {out}")
    return 0


def reconstruct(
    paths: Paths,
    /,
    *,
    out: Path,
    model: Model = DEFAULT_MODEL,
    device: Device = "auto",
    strict: Strict = False,
    json: Json = False,
) -> int:
    """Rebuild pictures from their tokens, side by side with the originals, and measure.

    Args:
        paths: Pictures, and folders of them.
        out: Folder for the side-by-side PNGs: original left, rebuilt right.
    """
    from qlip.jobs.reconstruct import reconstruct_files

    results, failures = reconstruct_files(_load(model, device), paths, out, _track("rebuilding"))
    mean = {name: sum(getattr(r, name) for r in results) / max(1, len(results)) for name in ("psnr", "ssim")}
    if json:
        pictures = [asdict(r) for r in results]
        _print_json({"pictures": pictures, "mean": mean if results else None, "failed": failures})
    elif results:
        table = Table("picture", "PSNR dB", "SSIM", show_footer=True, box=None, padding=(0, 2, 0, 0))
        for r in results:
            table.add_row(escape(str(r.path)), f"{r.psnr:.2f}", f"{r.ssim:.4f}")
        footers = (f"mean of {len(results)}", f"{mean['psnr']:.2f}", f"{mean['ssim']:.4f}")
        for column, footer in zip(table.columns, footers, strict=True):
            column.footer = footer
        _print(table)
    if results:
        _say(f"{_pictures(len(results))} beside what was rebuilt, in {out}")
    return _finish(len(results), failures, strict)


def classify(
    paths: Paths,
    /,
    *,
    labels: tuple[str, ...],
    templates: tuple[str, ...] = ("a photo of a {}.",),
    top: int = 3,
    model: Model = DEFAULT_MODEL,
    device: Device = "auto",
    strict: Strict = False,
    json: Json = False,
) -> int:
    """Say which of some words fits each picture.

    Args:
        paths: Pictures, and folders of them.
        labels: The words, for example "dog" "cat".
        templates: Sentences with {} where the word goes; their embeddings are averaged.
        top: How many words to show for a picture.
    """
    from qlip.jobs.classify import classify_files

    results, failures = classify_files(_load(model, device), paths, labels, templates, _track("classifying"))
    if json:
        pictures = [{"path": path, "labels": probabilities} for path, probabilities in results]
        _print_json({"pictures": pictures, "failed": failures})
    elif results:
        table = Table("picture", "words", box=None, padding=(0, 2, 0, 0))
        for path, probabilities in results:
            best = list(probabilities.items())[:top]
            table.add_row(escape(str(path)), escape("   ".join(f"{label} {p:.0%}" for label, p in best)))
        _print(table)
    return _finish(len(results), failures, strict)


def demo(*, out: Path = Path("report"), model: Model = DEFAULT_MODEL, device: Device = "auto") -> int:
    """Show what a tokenizer does with a dozen photographs, as a page and in the terminal.

    Args:
        out: Folder for index.html.
    """
    from qlip.demo.report import build, print_summary

    summary = build(_load(model, device), out, _track("photographs"))
    print_summary(summary, Console())
    return 0


def publish(
    run: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    name: str,
    out: Path,
    val: tuple[Path, ...],
    classes: Path | None = None,
    attribution: Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    license: str = "other",
) -> int:
    """Turn a training run into a checkpoint folder with a model card, measured on held-out data.

    Args:
        run: Folder of `qlip train`.
        name: What the tokenizer is called.
        out: The new folder.
        val: Held-out Parquet files, measured whole.
        classes: JSON file of class names, if they have labels.
        attribution: Text on the training data and the weights' licence, copied into the folder and the card.
        dtype: Of the weights in the file.
        license: Of the weights, by its identifier on the hub, for example apache-2.0.
    """
    from qlip.recipes.card import publish as run_publish

    _print_json(run_publish(run, name, out, val, classes, attribution, dtype, license, _track("measuring")))
    return 0


def export(
    run: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    out: Path,
    checkpoint: Literal["latest", "best"] = "latest",
    best: str = "psnr",
) -> int:
    """Write the tokenizer of a run's checkpoint, finished or not, as `qlip.load` reads it.

    Args:
        run: Folder of `qlip train`.
        out: The new folder.
        checkpoint: Which one.
        best: The evaluation's number that decides which is best.
    """
    from qlip.recipes.export import export as run_export

    _, step = run_export(run, out, checkpoint, best)
    _say(f"the tokenizer of step {step} is in {out}")
    return 0


def train(*arguments: str) -> int:
    """Train a tokenizer: `qlip train RECIPE --out DIR [--resume] [any field of the recipe]`."""
    from qlip.recipes.run import do_again, run

    args = _parse_recipe("train", arguments, {"replay": (Path | None, None, REPLAY)})
    if isinstance(args, int):
        return args
    if args.replay:
        _print_json(do_again(args.recipe, args.replay))
    elif args.out is None:
        raise InputError("--out is missing: name the folder of the run")
    elif run(args.recipe, args.out, args.resume):
        _say(f"the tokenizer is in {args.out / 'model'}; try: qlip verify {args.out / 'model'}")
    else:
        _say(f"stopped with a checkpoint in {args.out}; the same command with --resume goes on")
    return 0


def calibrate(*arguments: str) -> int:
    """Weigh the losses by the paper's rule: `qlip calibrate RECIPE --out DIR [any field of the recipe]`."""
    from qlip.recipes.calibrate import calibrate as run_calibrate

    args = _parse_recipe("calibrate", arguments, {})
    if isinstance(args, int):
        return args
    if args.out is None:
        raise InputError("--out is missing: name the folder of the runs")
    ratio = run_calibrate(args.recipe, args.out, args.resume)
    if ratio is None:
        _say(f"stopped in {args.out}; the same command with --resume goes on")
    else:
        written = args.out / "calibration.json"
        _say(f"α_r/α_a = {ratio:.4g}; train with: --balance calibrated --calibration {written}")
    return 0


def _parse_recipe(command: str, arguments: tuple[str, ...], more: dict[str, tuple[Any, Any, str]]) -> Any:
    """The options of `train` and `calibrate`, which come from the recipe that they name; or an exit code."""
    from qlip.recipes import describe_recipes, load_recipe

    if not arguments or arguments[0].startswith("-"):
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(RECIPE_USAGE[command] + describe_recipes(), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    name, *rest = arguments
    recipe = load_recipe(name)
    fields: list[Any] = [
        ("recipe", Annotated[type(recipe), tyro.conf.arg(name="")]),
        ("out", Annotated[Path | None, tyro.conf.arg(help="Folder of the run.")], None),
        ("resume", Annotated[bool, tyro.conf.arg(help="Go on from the run's latest checkpoint.")], False),
    ]
    fields += [
        (key, Annotated[kind, tyro.conf.arg(help=text)], value) for key, (kind, value, text) in more.items()
    ]
    options = make_dataclass(command, fields, frozen=True)
    return tyro.cli(
        options,
        args=rest,
        default=options(recipe),
        prog=f"qlip {command} {name}",
        description=COMMANDS[command].__doc__,
        config=CONFIG,
    )


REPLAY = "Instead of training, do the step again that a run left in its nonfinite/ folder, and print its values."

RECIPE_USAGE = {
    "train": """\
usage: qlip train RECIPE --out DIR [--resume] [OPTIONS]
       torchrun --nproc-per-node N -m qlip.cli train RECIPE --out DIR [--resume] [OPTIONS]

Train a tokenizer. RECIPE is one of the names below, or the recipe.json of a run; every field of it is an option:
`qlip train RECIPE --help` lists them. With --resume an interrupted run goes on from its latest checkpoint.

Recipes:
""",
    "calibrate": """\
usage: qlip calibrate RECIPE --out DIR [--resume] [OPTIONS]

Train with each of stage 1's two losses alone, and weigh them by where they end. RECIPE and OPTIONS are those of
`qlip train`.

Recipes:
""",
}

CONFIG = (tyro.conf.FlagCreatePairsOff,)

COMMANDS: dict[str, Callable[..., int]] = {
    f.__name__: f
    for f in (
        info, verify, tokenize, detokenize, reconstruct, classify, train, calibrate, export, publish, demo
    )
}  # fmt: skip


def main() -> None:
    """Run the command line and exit with its code."""
    logger = logging.getLogger("qlip")
    logger.setLevel("INFO")
    logger.handlers = [RichHandler(console=err, show_path=False, show_time=False)]
    if os.environ.get("RANK", "0") != "0":  # of the processes that torchrun starts the first one speaks
        logger.setLevel("ERROR")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # or each of its retries says so; the last error suffices
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


def _dispatch(argv: list[str]) -> int:
    if argv[:1] and argv[0] in RECIPE_USAGE:  # their options come from the recipe that they name
        return COMMANDS[argv[0]](*argv[1:])
    description = "Text-aligned visual tokens: pictures to a few binary tokens and back, and to words."
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS, args=argv, prog="qlip", description=description, config=CONFIG
    )


def _load(name: str, device: str, revision: str | None = None) -> "QLIP":
    import qlip

    return qlip.load(name, device=device, revision=revision)


def _track(what: str) -> Callable[[Iterable], Iterable]:
    """A progress bar on stderr, if a person is watching."""
    return lambda items: rich_track(items, what, console=err, transient=True, disable=not err.is_terminal)


def _finish(num_done: int, failures: list[str], strict: bool) -> int:
    """List what failed; the exit code."""
    if failures:
        err.print(f"[red]{len(failures)} failed:", highlight=False)
    for line in failures:
        err.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    return 1 if num_done == 0 or (strict and failures) else 0


def _fail(error: Exception) -> int:
    rank = os.environ.get("RANK", "0")
    if rank != "0" and isinstance(error, SharedError):  # the first process says it
        return 1
    who = "qlip" if rank == "0" else f"qlip, rank {rank}"
    err.print(f"{who}: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
    return 1


def _say(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        err.print(message, highlight=False, markup=False, soft_wrap=True)


def _pictures(count: int) -> str:
    return f"{count:,} picture{'s' * (count != 1)}"


def _and_more(paths: list[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{len(paths)} files, {paths[0]} to {paths[-1].name}"


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str, ensure_ascii=False))


if __name__ == "__main__":
    main()
