"""Commands that train a tokenizer, and what becomes of a run."""

import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qlip.cli.options import ImageSize, did_you_mean, print_json, say, track
from qlip.errors import InputError


def train(*arguments: str) -> int:
    """Train a tokenizer or a model on its tokens: `qlip train RECIPE --out DIR [--resume] [any field of it]`."""
    from qlip.recipes.names import T2I, UM3, tokenizers

    known = {
        "Recipes": tokenizers(),
        "Text to image, docs/t2i.md": T2I,
        "Text and images in one model, docs/um3-training.md": UM3,
    }
    args = parse_recipe("train", train.__doc__, TRAIN, known, _load_any, arguments, {"replay": REPLAY})
    if isinstance(args, int):
        return args
    from qlip.recipes import run, t2i, um3
    from qlip.t2i.config import CLASSES

    model = "MODEL" if args.out is None else str(args.out / "model")
    home: Any = run
    left = f"the tokenizer is in {model}; try: qlip verify {model}"
    if isinstance(args.recipe, t2i.T2IRecipe):
        home = t2i
        prompt = "0" if args.recipe.condition == CLASSES else '"a dog"'  # labels are the prompts of such a model
        left = f"the model is in {model}; try: qlip generate {prompt} --model {model} --out pictures"
    elif isinstance(args.recipe, um3.UM3Recipe):
        home = um3
        left = f'the model is in {model}; try: qlip um3 draw "a dog" --model {model} --out pictures'
    if args.replay:
        print_json(home.do_again(args.recipe, args.replay))
        return 0
    if args.out is None:
        raise InputError("--out is missing: name the folder of the run")
    finished = home.run(args.recipe, args.out, args.resume)
    say(left if finished else stopped(args.out))
    return 0


def calibrate(*arguments: str) -> int:
    """Weigh the losses by the paper's rule: `qlip calibrate RECIPE --out DIR [any field of the recipe]`."""
    from qlip.recipes import load_recipe
    from qlip.recipes.names import tokenizers

    known = {"Recipes": tokenizers()}
    args = parse_recipe("calibrate", calibrate.__doc__, CALIBRATE, known, load_recipe, arguments, {})
    if isinstance(args, int):
        return args
    from qlip.recipes.calibrate import calibrate as run_calibrate

    if args.out is None:
        raise InputError("--out is missing: name the folder of the runs")
    ratio = run_calibrate(args.recipe, args.out, args.resume)
    if ratio is None:
        say(stopped(args.out))
    else:
        written = args.out / "calibration.json"
        say(f"α_r/α_a = {ratio:.4g}; train with: --balance calibrated --calibration {written}")
    return 0


def publish(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
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

    print_json(run_publish(run, name, out, val, classes, attribution, dtype, license, track("measuring")))
    return 0


def export(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    /,
    *,
    out: Path,
    format: Literal["qlip", "transformers", "onnx", "torch-export"] = "qlip",
    checkpoint: Literal["latest", "best"] = "latest",
    best: str | None = None,
    revision: str | None = None,
    image_size: ImageSize = None,
    text_only: bool = False,
) -> int:
    """Write a tokenizer, or that of a run's checkpoint, finished or not, or a UM3 for others to read.

    Args:
        model: Folder of `qlip train`, or a tokenizer: a bundled name, a folder, a hub id; or a UM3.
        out: The new folder.
        format: qlip: as `qlip.load` reads it; transformers: as Hugging Face's library reads it without this
            package; onnx, torch-export: as programs, see docs/export.md.
        checkpoint: Which one of a run.
        best: The evaluation's number that decides which is best; by default the run's own.
        revision: branch, tag or commit on the hub.
        text_only: Of a UM3, leave the rows of pictures out: a language model as any other.
    """
    from qlip.recipes.export import export as run_export
    from qlip.recipes.export import export_um3, open_tokenizer
    from qlip.um3.checkpoint import is_um3

    if is_um3(model):
        if (checkpoint, revision, image_size) != ("latest", None, None):
            raise InputError(f"{model!r} is a UM3: leave out --checkpoint, --revision and --image-size")
        export_um3(model, out, format, text_only)
        say(f"the {'language model' if text_only else 'model'} is in {out}")
        return 0
    if text_only:
        raise InputError(f"--text-only: {model!r} is no UM3, leave it out")
    tokenizer, step = open_tokenizer(model, checkpoint, best, revision, image_size)
    agreement = run_export(tokenizer, out, format)
    if agreement is not None:
        say(f"checked against PyTorch: {agreement.describe()}")
    say(f"the tokenizer{'' if step is None else f' of step {step}'} is in {out}")
    return 0


def push(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    repo: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")],
    /,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "",
) -> int:
    """Put a checkpoint folder and its model card into a repository of the Hugging Face hub.

    Args:
        model: A bundled name, or a folder as `qlip publish` makes it.
        repo: Its name there, owner/name; made if need be.
        private: Let only its owner see it.
        revision: Branch to write to, made if need be; the main one by default.
        message: Of the commit; by default, what is uploaded.
    """
    from qlip.jobs.push import push as run_push

    print(run_push(model, repo, private, revision, message))
    return 0


def stopped(out: Path) -> str:
    """What to say of a run that a signal stopped: where it is, and the command that resumes it."""
    again = sys.argv[1:] if "--resume" in sys.argv else [*sys.argv[1:], "--resume"]
    start = ["qlip"]
    if processes := os.environ.get("LOCAL_WORLD_SIZE"):
        start = ["torchrun", "--nproc-per-node", processes, "-m", "qlip.cli"]
    return f"stopped with a checkpoint in {out}; this resumes it: {shlex.join([*start, *again])}"


def _load_any(name: str) -> Any:
    """A recipe of any model that `train` trains."""
    from qlip.recipes import load_recipe, t2i, um3

    kind = next((kind for kind in (t2i, um3) if kind.is_recipe(name)), None)
    return kind.load_recipe(name) if kind else load_recipe(name)


def parse_recipe(
    command: str,
    description: str | None,
    usage: str,
    known: Mapping[str, Mapping[str, str]],
    load_recipe: Callable[[str], Any],
    arguments: tuple[str, ...],
    more: dict[str, tuple[Any, Any, str]],
) -> Any:
    """Options that come from the recipe that the first argument names; or an exit code.

    Args:
        command: what stands between `qlip` and the recipe.
        description: of the command.
        usage: what is said where no recipe is named, before the list of them.
        known: under headings, names of recipes and what each is.
        load_recipe: from its name, or from a file.
        arguments: what stands after the command.
        more: further options, each with type, default and help.

    Returns:
        an object with `recipe`, `out`, `resume` and those of `more`.
    """
    if not arguments or arguments[0].startswith("-"):
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(usage + _list(known), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    name, *rest = arguments
    names = [name for recipes in known.values() for name in recipes]
    if name not in names and not Path(name).is_file():
        hint = did_you_mean(name, names)
        raise InputError(f"no recipe {name!r}{hint} qlip {command} --help lists them; a run's recipe.json is one")
    recipe = load_recipe(name)
    fields: list[Any] = [
        ("recipe", Annotated[type(recipe), tyro.conf.arg(name="")]),
        ("out", Annotated[Path | None, tyro.conf.arg(help="Folder of the run.")], None),
        ("resume", Annotated[bool, tyro.conf.arg(help="Go on from the run's latest checkpoint.")], False),
    ]
    fields += [
        (key, Annotated[kind, tyro.conf.arg(help=text)], value) for key, (kind, value, text) in more.items()
    ]
    options = make_dataclass(command.split()[-1], fields, frozen=True)
    return tyro.cli(
        options,
        args=rest,
        default=options(recipe),
        prog=f"qlip {command} {name}",
        description=description,
    )


def _list(known: Mapping[str, Mapping[str, str]]) -> str:
    width = max(len(name) for recipes in known.values() for name in recipes) + 2
    lists = (
        "\n".join([f"{heading}:", *(f"  {name:<{width}}{about}" for name, about in recipes.items())])
        for heading, recipes in known.items()
    )
    return "\n\n".join(lists)


REPLAY = (
    Path | None,
    None,
    "Instead of training, do the step again that a run left in its nonfinite/ folder, and print its values.",
)

TRAIN = """\
usage: qlip train RECIPE --out DIR [--resume] [OPTIONS]
       torchrun --nproc-per-node N -m qlip.cli train RECIPE --out DIR [--resume] [OPTIONS]

Train a tokenizer, or a model on its tokens. RECIPE is one of the names below, or the recipe.json of a run; every
field of it is an option: `qlip train RECIPE --help` lists them. With --resume an interrupted run goes on from its
latest checkpoint.

"""

CALIBRATE = """\
usage: qlip calibrate RECIPE --out DIR [--resume] [OPTIONS]

Train with each of stage 1's two losses alone, and weigh them by where they end. RECIPE and OPTIONS are those of
`qlip train`.

"""
