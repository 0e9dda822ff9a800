"""The paper's rule for the loss weights: α_r/α_a ≈ L_align(∞)/L_mse(∞), each trained with that loss alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlip.environment import environment
from qlip.errors import InputError
from qlip.files import whole_file
from qlip.recipes.run import run
from qlip.recipes.stage1 import Recipe
from qlip.train.balance import loss_limit
from qlip.train.distributed import processes, rank
from qlip.train.log import read_log
from qlip.train.plot import plot_calibration

ALONE: dict[str, dict[str, Any]] = {
    "alignment": {"reconstruction_weight": 0.0, "quantizer_weight": 0.0, "commitment_weight": 0.0},
    "reconstruction": {"alignment_weight": 0.0},
}
WHOLE: dict[str, Any] = {"reconstruct_every": 1, "drop_tokens": 0.0}  # with one loss every image is for that one


def calibrate(recipe: Recipe, out: Path, resume: bool = False) -> float | None:
    """Train with each loss alone and measure where it ends.

    Args:
        recipe: of stage 1; its steps are those of each of the two trainings.
        out: folder for the runs `alignment/` and `reconstruction/`, `calibration.json` and `calibration.png`.
        resume: go on where it was interrupted.

    Returns:
        α_r/α_a, which `calibration.json` holds for `--balance calibrated`; None if SIGTERM or Ctrl-C stopped it.

    Raises:
        InputError: the recipe is of stage 2, or cannot be run.
    """
    if not isinstance(recipe, Recipe):
        raise InputError("only recipes of stage 1 have two losses to weigh: name one of those")
    tasks = {
        loss: replace(recipe.task, **weights, **WHOLE, balance="fixed", calibration=None)
        for loss, weights in ALONE.items()
    }
    points, limits = {}, {}
    with processes(recipe.device) as device:
        for loss, task in tasks.items():
            if not run(replace(recipe, task=task), out / loss, resume):
                return None
            points[loss] = [(int(e["step"]), e[loss]) for e in read_log(out / loss / "log.jsonl") if loss in e]
            limits[loss] = loss_limit(points[loss])
        ratio = limits["alignment"] / limits["reconstruction"]
        if rank() == 0:
            record = {
                "ratio": ratio,
                "alignment_limit": limits["alignment"],
                "reconstruction_limit": limits["reconstruction"],
                "steps": recipe.fit.steps,
                "environment": environment(str(device)),
            }
            with whole_file(out / "calibration.json") as unfinished:
                unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            plot_calibration(
                points["alignment"],
                points["reconstruction"],
                limits["alignment"],
                limits["reconstruction"],
                out / "calibration.png",
            )
    return ratio
