"""Commands of LLaVA with QLIP as its eye: train one, ask it, score answers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from qlip.cli.options import Device, Group, Json, print_json, say
from qlip.cli.training import REPLAY, parse_recipe, stopped
from qlip.errors import InputError

if TYPE_CHECKING:
    from qlip.recipes.llava import LlavaRecipe


def train(*arguments: str) -> int:
    """Train a stage: `qlip llava train RECIPE --out DIR [--resume] [any field of the recipe]`."""
    from qlip.recipes.names import LLAVA

    known = {"Recipes": LLAVA}
    args = parse_recipe("llava train", train.__doc__, USAGE, known, _load, arguments, {"replay": REPLAY})
    if isinstance(args, int):
        return args
    from qlip.recipes.llava import do_again, run

    if args.replay:
        print_json(do_again(args.recipe, args.replay))
        return 0
    if args.out is None:
        raise InputError("--out is missing: name the folder of the run")
    if run(args.recipe, args.out, args.resume):
        say(
            f'the model is in {args.out / "model"}; try: qlip llava ask {args.out / "model"} IMAGE "What is this?"'
        )
    else:
        say(stopped(args.out))
    return 0


def ask(
    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")],
    question: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="QUESTION")],
    /,
    *,
    max_new_tokens: int = 128,
    device: Device = "auto",
) -> int:
    """Ask a question about a picture.

    Args:
        model: Folder that a training left.
        image: The picture.
        question: In plain words.
        max_new_tokens: Of the answer.
    """
    from qlip.llava.answers import ask as run_ask
    from qlip.llava.model import load

    print(run_ask(*load(model, device), [image], [question], max_new_tokens)[0])
    return 0


def score(
    benchmark: Annotated[Literal["pope", "vqa", "gqa"], tyro.conf.Positional],
    answers: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ANSWERS")],
    /,
    *,
    labels: Path,
    json: Json = False,
) -> int:
    """Score a file of answers by the rules of POPE, VQAv2 (also for TextVQA) or GQA.

    Args:
        benchmark: Whose rules.
        answers: JSON lines with question_id and text, or JSON with question_id and answer.
        labels: The benchmark's own file.
    """
    from qlip.llava.score import score as run_score

    found = run_score(benchmark, answers, labels)
    if json:
        print_json(found)
    else:
        for name, value in found.items():
            print(f"{name:<14}{value:,}" if isinstance(value, int) else f"{name:<14}{value:.4f}")
    return 0


llava = Group(
    "Train a LLaVA with a tokenizer as its eye, ask it, score answers.",
    {"train": train, "ask": ask, "score": score},
    own_options=("train",),
)


def _load(name: str) -> "LlavaRecipe":
    from qlip.recipes.llava import load_recipe

    return load_recipe(name)


USAGE = """\
usage: qlip llava train RECIPE --out DIR [--resume] [OPTIONS]
       torchrun --nproc-per-node N -m qlip.cli llava train RECIPE --out DIR [--resume] [OPTIONS]

Train a stage of LLaVA-1.5. RECIPE is one of the names below, or the recipe.json of a run; every field of it is an
option: `qlip llava train RECIPE --help` lists them. With --resume an interrupted run goes on from its latest
checkpoint.

"""
