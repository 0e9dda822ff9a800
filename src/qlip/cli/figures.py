"""The paper's figures, measured on our models. Each command writes NAME.json and, drawn from it, NAME.png."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from qlip.cli.options import DEFAULT_MODEL, Device, Group, say

Out = Annotated[Path, tyro.conf.arg(help="Folder for the numbers and the picture.")]
Recipe = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]


def memory(
    recipe: Recipe = "b16-256",
    /,
    *,
    out: Out,
    stage2: str | None = None,
    sizes: tuple[int, ...] = (64, 256, 1024, 2048),
    stage2_sizes: tuple[int, ...] = (4, 64, 256),
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> int:
    """Memory of a step against images on a device, beside the paper's Figure 3.

    On a GPU steps are done; elsewhere tensors are counted without allocating them.

    Args:
        recipe: Of stage 1.
        stage2: Recipe of stage 2; without it RECIPE-stage2.
        sizes: Images at once in stage 1.
        stage2_sizes: Images at once in stage 2.
        device: Where to do the steps; on the CPU they are counted. auto takes a GPU if there is one.
    """
    from qlip.figures.memory import memory as measure

    return _written(measure(recipe, stage2 or f"{recipe}-stage2", out, sizes, stage2_sizes, device))


def gradients(
    recipe: Recipe = "tiny",
    /,
    *,
    out: Out,
    train: tuple[str, ...] = (),
    classes: Path | None = None,
    steps: int = 48,
    batch_size: int | None = None,
    every: int = 1,
    device: Device = "auto",
) -> int:
    """Gradients of both losses in training, with BSQ and without, beside the paper's Figure 5.

    Args:
        recipe: Of stage 1.
        train: Pictures with words, as for `qlip train`; without any, noise is learnt.
        classes: JSON file of class names, if samples have labels.
        steps: Of each of the two trainings; an interrupted one goes on.
        batch_size: Samples of a step; without it the recipe's.
        every: Steps from one measurement to the next.
    """
    from qlip.figures.gradients import gradients as measure

    return _written(measure(recipe, out, train, classes, steps, batch_size, every, device))


def stages(
    stage2: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STAGE2")],
    /,
    *,
    out: Out,
    val: tuple[str, ...],
    stage1: str = DEFAULT_MODEL,
    count: int = 6,
    device: Device = "auto",
) -> int:
    """Pictures, what stage 1 rebuilds of them, and what stage 2 does, as in the paper's Figure 4.

    Args:
        stage2: The tokenizer of stage 2: a folder, a bundled name, or a hub id.
        val: Pictures held out of training, as for `qlip train`.
        stage1: The tokenizer of stage 1.
        count: How many pictures, evenly spread.
    """
    from qlip.figures.stages import stages as measure

    return _written(measure(stage1, stage2, val, out, count, device))


figures = Group(
    "Measure a figure of the paper, and draw it beside the paper's numbers.",
    {
        "memory": memory,
        "gradients": gradients,
        "stages": stages,
    },
)


def _written(path: Path | None) -> int:
    if path is None:
        say("stopped; the same command goes on")
        return 0
    say(f"{path} and {path.with_suffix('.png').name}")
    return 0
