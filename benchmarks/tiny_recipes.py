"""Which options train `tiny` best in equal time: `python benchmarks/tiny_recipes.py --out DIR --data.train …`.

Every arm changes one thing of the first one, `ARMS["base"]`, and has the same seconds of one core. What a step of
each arm costs is measured first, in turns, and decides how many steps the arm has; so a machine that is busy later
changes nothing. A learning rate rises over a twelfth of the steps and falls to zero at the last. A finished arm is
not trained again, an interrupted one resumes. `--arms` chooses. Two processes with different arms may share an
`--out`. After each arm docs/results/tiny-recipes.md and .json are written from all that are finished.

    OMP_NUM_THREADS=1 python benchmarks/tiny_recipes.py --out runs/tiny-recipes --minutes 15 --device cpu \
        --teacher features.safetensors --data.train tiny-imagenet/train registry/train \
        --data.val tiny-imagenet/val --data.classes classes.json
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from qlip.environment import environment, resolve_device
from qlip.errors import InputError
from qlip.figures.memory import random_batch
from qlip.files import whole_file
from qlip.model import QLIP
from qlip.model.image import ImageProcessor
from qlip.recipes import load_recipe
from qlip.recipes.run import DataConfig, run
from qlip.recipes.stage1 import Recipe
from qlip.train.log import read_log

NUM_WORDS = 14  # the length of a batch of captions, about
RESULTS = Path(__file__).parents[1] / "docs" / "results"
BASE = {
    "optimizer": "muon",
    "lr": 2e-3,
    "teacher_weight": 5.0,
    "reconstruct_every": 2,
    "drop_tokens": 0.5,
    "batch_size": 128,
}
PLAIN = {"optimizer": "adamw", "lr": 1e-3, "teacher_weight": 0.0, "reconstruct_every": 1, "drop_tokens": 0.0}
ARMS: dict[str, dict[str, Any]] = {
    "base": {},
    "none of these": PLAIN,
    "no teacher": {"teacher_weight": 0.0},
    "AdamW, 1e-3": {"optimizer": "adamw", "lr": 1e-3},
    "every image reconstructed": {"reconstruct_every": 1, "drop_tokens": 0.0},
    "every fourth image reconstructed": {"reconstruct_every": 4},
    "sigmoid": {"contrastive": "sigmoid"},
    "Muon, 1e-3": {"lr": 1e-3},
    "teacher_weight 20": {"teacher_weight": 20.0},
    "AdamW, 2e-3": {"optimizer": "adamw"},
    "batch_size 256": {"batch_size": 256},
    "another seed": {"seed": 1},
}


@dataclass(frozen=True)
class Options:
    """What to train.

    Attributes:
        out: folder of the trainings.
        data: as for `qlip train`.
        teacher: files of `qlip features --vision`.
        arms: which; () is all.
        minutes: of one core for the training steps of each arm.
        device: "auto" takes a GPU if there is one.
        compile: compile the blocks, as the recipe does.
        results: folder for the page.
    """

    out: Path
    data: DataConfig
    teacher: tuple[Path, ...]
    arms: tuple[str, ...] = ()
    minutes: float = 15.0
    device: str = "auto"
    compile: bool = True
    results: Path = field(default=RESULTS)


def recipe_of(arm: str, options: Options, device: str) -> Recipe:
    """The recipe of an arm, without its number of steps."""
    changes = BASE | ARMS[arm]
    outer = {name: changes.pop(name) for name in ("batch_size", "seed") if name in changes}
    recipe = load_recipe("tiny")
    task = replace(recipe.task, **changes)
    teacher = options.teacher if task.teacher_weight else ()
    compute = {"device": device, "compile": options.compile and recipe.compile}
    return replace(recipe, task=task, teacher=teacher, data=options.data, **compute, **outer)


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with a schedule of that length, evaluated at its end."""
    schedule = {"steps": steps, "warmup_steps": steps // 12, "eval_every": steps, "save_every": max(1, steps // 4)}
    return replace(recipe, fit=replace(recipe.fit, best=None, keep=1, **schedule))


def step_of(recipe: Recipe) -> Any:
    """A function that does one step on random images."""
    torch.manual_seed(0)
    size = recipe.model.vision.image_size
    model = QLIP(recipe.model, image_processor=ImageProcessor(resize=size, crop=size)).to(recipe.device)
    task = recipe.build_task(model)
    batch = random_batch(model.config, recipe.batch_size)
    batch["input_ids"] = batch["input_ids"][:, -NUM_WORDS:]
    files = recipe.open_teacher()
    if files is not None:
        shapes = {"pooled": (files.teacher.width,)}
        if files.teacher.grid_width:
            shapes["grid"] = (*files.teacher.grid, files.teacher.grid_width)
        batch |= {f"teacher/{name}": torch.randn(recipe.batch_size, *shape) for name, shape in shapes.items()}
    return lambda: task.step(batch, 1)


def measure(options: Options, device: str, turns: int = 5) -> dict[str, float]:
    """Seconds of a core that a step of each arm takes: the median of turns."""
    steps = {arm: step_of(recipe_of(arm, options, device)) for arm in ARMS if arm != "another seed"}
    seconds: dict[str, list[float]] = {arm: [] for arm in steps}
    for turn in range(turns + 1):
        for arm, step in steps.items():
            start = time.process_time()
            step()
            if turn:  # the first compiles
                seconds[arm].append(time.process_time() - start)
    costs = {arm: round(statistics.median(values), 3) for arm, values in seconds.items()}
    return costs | {"another seed": costs["base"]}


def costs_of(options: Options, device: str) -> dict[str, float]:
    """What `measure` found, once for a folder."""
    path = options.out / "seconds-a-step.json"
    if not path.exists():
        options.out.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            unfinished.write_text(json.dumps(measure(options, device), indent=1) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def train(arm: str, options: Options, device: str, seconds_a_step: float) -> bool:
    """Train an arm unless that is done, and keep its result; False if SIGTERM stopped it."""
    folder = options.out / arm.replace(",", "").replace(" ", "-")
    path = folder / "result.json"
    if path.exists():
        return True
    recipe = recipe_of(arm, options, device)
    steps = max(2, round(60 * options.minutes / seconds_a_step))
    torch.compiler.reset()  # or the compiler would count the models of all arms as one that keeps changing
    if not run(with_steps(recipe, steps), folder, resume=True):
        return False
    last = {name: value for line in read_log(folder / "log.jsonl") for name, value in line.items()}
    result = {
        "arm": arm,
        "changes": ARMS[arm],
        "steps": steps,
        "images": steps * recipe.batch_size,
        "seconds_a_step": seconds_a_step,
        "images_a_core_second": round(recipe.batch_size / seconds_a_step, 2),
        "top1": last["eval/top1"],
        "psnr": last["eval/psnr"],
        "environment": environment(device),
    }
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return True


def write_page(options: Options) -> None:
    """Write the table of all finished arms."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in options.out.glob("*/result.json")]
    found.sort(key=lambda result: list(ARMS).index(result["arm"]))
    rows = [
        f"| {r['arm']} | {r['images_a_core_second']:.1f} | {r['steps']:,} | {r['images']:,} "
        f"| {100 * r['top1']:.1f}% | {r['psnr']:.2f} |"
        for r in found
    ]
    page = "\n".join((*_head(options, found[0]["environment"]), *rows, "", *_foot(found)))
    options.results.mkdir(parents=True, exist_ok=True)
    with whole_file(options.results / "tiny-recipes.md") as unfinished:
        unfinished.write_text(page + "\n", encoding="utf-8")
    with whole_file(options.results / "tiny-recipes.json") as unfinished:
        unfinished.write_text(json.dumps({"base": BASE, "arms": found}, indent=1) + "\n", encoding="utf-8")


def _head(options: Options, hardware: dict[str, str]) -> list[str]:
    base = ", ".join(f"`{name} {value}`" for name, value in BASE.items())
    return [
        "# Which options train `tiny` best in equal time",
        "",
        f"Every arm has {options.minutes:g} minutes of one core for its training steps. The base is the recipe "
        f"`tiny` with {base}. Each other arm changes what its name says. Images a core-second are of the step "
        "alone, measured in turns. Top-1 is zero-shot among the classes of the held-out images, PSNR is in dB.",
        "",
        f"{hardware['hardware']}, torch {hardware['torch']}, commit {hardware['commit']}. Written by",
        "`benchmarks/tiny_recipes.py`; its docstring has the command.",
        "",
        "| arm | images a core-second | steps | images seen | top-1 | PSNR |",
        "| --- | --- | --- | --- | --- | --- |",
    ]


def _foot(found: list[dict[str, Any]]) -> list[str]:
    """How sure the table is: the difference that another seed makes."""
    results = {result["arm"]: result for result in found}
    if not {"base", "another seed"} <= results.keys():
        return ["One seed an arm: differences of one point or of 0.1 dB may be chance."]
    first, second = results["base"], results["another seed"]
    points, decibels = 100 * abs(first["top1"] - second["top1"]), abs(first["psnr"] - second["psnr"])
    return [
        f"Another seed of the base differs by {points:.1f} points and {decibels:.2f} dB: less than that is chance."
    ]


def main() -> None:
    """Train arm by arm, and write after each."""
    options = tyro.cli(Options, description=__doc__)
    if unknown := set(options.arms) - ARMS.keys():
        raise InputError(f"arms: {min(unknown)!r} is none of {', '.join(ARMS)}")
    device = resolve_device(options.device).type
    costs = costs_of(options, device)
    for arm in options.arms or ARMS:
        if not train(arm, options, device, costs[arm]):
            return
        write_page(options)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"tiny_recipes: {error}")
