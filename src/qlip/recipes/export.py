"""From a checkpoint of a run to the published layout."""

from pathlib import Path
from typing import Literal

from qlip.errors import InputError
from qlip.model.checkpoint import load_description
from qlip.model.qlip import QLIP
from qlip.train.checkpoint import best_checkpoint, checkpoint_step, latest_checkpoint, read_tensors


def export(
    run: Path, out: Path, which: Literal["latest", "best"] = "latest", best: str = "psnr"
) -> tuple[QLIP, int]:
    """Write the tokenizer of a checkpoint, with its averaged weights if the run has them.

    Args:
        run: folder of a run, finished or not, of any number of processes.
        out: folder that `qlip.load` reads.
        which: "latest", or "best" by the number `best` of the evaluations.
        best: name of that number.

    Returns:
        the tokenizer, and the step it is of.

    Raises:
        InputError: the run has no such checkpoint, or it is damaged.
    """
    checkpoint = latest_checkpoint(run) if which == "latest" else best_checkpoint(run, best)
    if checkpoint is None:
        raise InputError(f"{run} has no checkpoint" + (f" with an evaluation of {best!r}" * (which == "best")))
    model = load_description(run / "description")
    tensors = read_tensors(checkpoint, ("model.", "ema."))
    for kind in ("model.", "ema."):  # averaged weights stand in for those they are the means of
        weights = {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}
        model.load_state_dict(weights, strict=kind == "model.", assign=True)
    model.save(out)
    return model.eval(), checkpoint_step(checkpoint)
