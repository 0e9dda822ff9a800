"""The paper's Figure 5: how long both losses' gradients are in training, with BSQ and with an identity instead.

Alignment's gradient is two to three orders of magnitude longer than that of the MSE, with BSQ more so: that is why
reconstruction weighs 10³ in stage 1. Measured at the last linear of the vision encoder's last MLP.
"""

import io
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from torch import Tensor

from qlip.environment import resolve_device
from qlip.errors import InputError
from qlip.figures.record import OURS, THEIRS, plain, write_figure
from qlip.files import whole_file
from qlip.model.qlip import QLIP
from qlip.recipes import load_recipe
from qlip.recipes.run import run
from qlip.recipes.stage1 import Recipe
from qlip.train.log import read_log
from qlip.train.plot import new_figure
from qlip.train.stage1 import Stage1

if TYPE_CHECKING:
    from qlip.train.plot import Figure

PAPER = {"alignment": (1.0, 2.0), "reconstruction": (2e-3, 8e-3)}  # docs/paper.md section 2
BOTTLENECKS: dict[str, dict[str, Any]] = {
    "BSQ": {},
    "identity": {"quantize": False, "quantizer_weight": 0.0, "commitment_weight": 0.0},
}


def gradients(
    recipe_name: str,
    out: Path,
    train: tuple[str, ...] = (),
    classes: Path | None = None,
    steps: int = 48,
    batch_size: int | None = None,
    every: int = 1,
    device: str = "auto",
) -> Path | None:
    """Train twice and measure; write `gradients.json` and `gradients.png`.

    Args:
        recipe_name: of stage 1, or its file.
        out: folder; the two runs stay in `gradients/` there, and an interrupted one goes on.
        train: pictures with words, as a recipe's `data.train`; without any, noise with random words is learnt.
        classes: JSON file of class names, if samples have labels.
        steps: of each training.
        batch_size: samples of a step; None takes the recipe's.
        every: steps from one measurement to the next; each takes two backward passes.
        device: where to train.

    Returns:
        the JSON file; None if SIGTERM or Ctrl-C stopped it.

    Raises:
        InputError: the recipe is of stage 2 or does without one of both losses, or cannot be run.
    """
    recipe = load_recipe(recipe_name)
    if not isinstance(recipe, Recipe) or not (recipe.task.alignment_weight and recipe.task.reconstruction_weight):
        raise InputError(f"{recipe_name!r} does not weigh alignment against reconstruction: name one that does")
    if not 1 <= every <= steps:
        raise InputError(f"every is {every}: it must be from 1 to steps ({steps})")
    batch_size = recipe.batch_size if batch_size is None else batch_size
    runs = out / "gradients"
    data = replace(
        recipe.data, train=train or (str(_noise(runs / "noise.parquet", recipe, batch_size)),), classes=classes
    )
    warmup = min(recipe.fit.warmup_steps, steps // 10)
    fit = replace(recipe.fit, steps=steps, warmup_steps=warmup, log_every=every, save_every=max(1, steps // 4))
    place = resolve_device(device)
    found = {}
    for name, changes in BOTTLENECKS.items():
        settings = {field: getattr(recipe, field) for field in Recipe.__dataclass_fields__}
        settings |= {"data": data, "fit": fit, "batch_size": batch_size, "device": place.type, "compile": False}
        measured = _Measured(**settings | {"task": replace(recipe.task, **changes)})
        if not run(measured, runs / name, resume=True):
            return None
        found[name] = _series(runs / name / "log.jsonl")
    numbers = {
        "recipe": recipe_name,
        "data": [Path(source).name for source in train] or "noise with random words",
        "batch_size": batch_size,
        "reconstruction_weight": recipe.task.reconstruction_weight,
        "bottlenecks": found,
        "ratio": {name: geometric_mean(_ratios(series)) for name, series in found.items()},
        "paper": {name: list(span) for name, span in PAPER.items()},
    }
    return write_figure(out, "gradients", numbers, draw, place.type)


class _MeasuredStage1(Stage1):
    """Stage 1 that measures before each step that is logged."""

    every = 1

    def step(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        norms = self.gradient_norms(batch, step) if step % self.every == 0 else {}
        return super().step(batch, step) | {f"gradient/{name}": norm for name, norm in norms.items()}


@dataclass(frozen=True)
class _Measured(Recipe):
    """A recipe whose task measures."""

    def build_task(self, model: QLIP) -> Stage1:
        task = _MeasuredStage1(model, self.task, self, self.batch_size)
        task.every = self.fit.log_every
        return task


def draw(record: dict[str, Any], folder: Path) -> "Figure":
    """Both gradients over the steps, and where the paper's lie."""
    figure = new_figure(7.2, 4.4)
    axis = figure.subplots()
    for loss, (low, high) in record["paper"].items():
        axis.axhspan(low, high, color=THEIRS, alpha=0.15, lw=0)
        place, label = axis.get_yaxis_transform(), f"paper: {loss}, {low:g} to {high:g}"
        axis.text(0.99, (low * high) ** 0.5, label, transform=place, ha="right", va="center", color=THEIRS)
    for (name, series), style in zip(record["bottlenecks"].items(), ("-", "--"), strict=True):
        for loss, color in (("alignment", OURS), ("reconstruction", "#2c8c5a")):
            label = f"ours: {loss}, {name}"
            axis.plot(series["step"], series[loss], style, color=color, linewidth=1.5, label=label)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    ratios = ", ".join(f"{ratio:,.0f} with {name}" for name, ratio in record["ratio"].items())
    title = f"Gradients at the vision encoder's last MLP: {record['recipe']}, batch {record['batch_size']}"
    plain(axis, f"{title}\nalignment / reconstruction: {ratios}", "step", "norm of the gradient")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    return figure


def _series(log: Path) -> dict[str, list[float]]:
    entries = [entry for entry in read_log(log) if "gradient/alignment" in entry]
    names = {"step": "step", "alignment": "gradient/alignment", "reconstruction": "gradient/reconstruction"}
    return {name: [entry[key] for entry in entries] for name, key in names.items()}


def _ratios(series: dict[str, list[float]]) -> list[float]:
    return [a / r for a, r in zip(series["alignment"], series["reconstruction"], strict=True)]


def _noise(path: Path, recipe: Recipe, batch_size: int) -> Path:
    """A Parquet file with two batches of pictures of noise and a number as each one's caption."""
    if not path.exists():
        rng, side = np.random.default_rng(recipe.seed), recipe.model.vision.image_size
        rows = []
        for _ in range(2 * batch_size):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(256, size=(side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
            rows.append({"bytes": buffer.getvalue(), "path": None})
        captions = [" ".join(map(str, rng.integers(10, size=8))) for _ in rows]
        with whole_file(path) as unfinished:
            pq.write_table(pa.table({"image": rows, "caption": captions}), unfinished)
    return path
