"""A step whose loss is not finite: what was done, kept so that it can be done again."""

import json
import math
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qlip.errors import InputError, SharedError, one_line
from qlip.files import save_tensors
from qlip.guarded import read_json
from qlip.train.checkpoint import Checkpoints, latest_checkpoint, load_checkpoint
from qlip.train.distributed import barrier, on_all_ranks, rank, seed_step, world_size
from qlip.train.task import Batch, NonFinite, Task


def dump(out: Path, task: Task, batch: Batch, step: int, error: NonFinite) -> InputError:
    """Write `out/nonfinite/step-NNNNNNN/`: the state before the step, and each rank's batch and values.

    Returns:
        The error that ends the run: step, term, the batch's keys, and how to do the step again.
    """
    folder = out / "nonfinite" / f"step-{step:07d}"
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of the run before it was resumed, perhaps of other processes
    barrier()
    keys = batch["keys"]
    found = f"{folder} holds the step; do it again with --replay {folder}, as many processes"
    try:
        with Checkpoints(folder, keep=1) as checkpoints:
            checkpoints.save(task.state_dict(), step)
        tensors = {name: value.contiguous() for name, value in batch.items() if isinstance(value, Tensor)}
        save_tensors(tensors, folder / f"batch-{rank()}.safetensors")
        report = {
            "step": step,
            "world_size": world_size(),
            "values": for_json(error.values),
            "keys": batch["keys"],
        }
        (folder / f"report-{rank()}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except (InputError, OSError, SafetensorError) as failure:
        found = f"The step could not be kept ({one_line(failure)})"
    barrier()
    with suppress(OSError, ValueError):  # where nothing could be written, one's own will do
        keys = _report(folder, error.culprit)["keys"]
    named = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    where = f" of rank {error.culprit}" if world_size() > 1 else ""
    return SharedError(
        f"step {step}: {', '.join(error.names)} not finite, with the samples {named}{where}. {found}. "
        "Lower the learning rate, or let --skip-nonfinite N pass over N such steps"
    )


def replay(task: Task, folder: Path, seed: int) -> dict[str, float]:
    """Do a dumped step again, on as many processes as it had.

    Returns:
        the step's values on this rank, finite or not.

    Raises:
        InputError: the folder holds no such step, or one of another number of processes.
    """
    keys, batch = on_all_ranks(partial(_read, folder))
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        raise InputError(f"{folder} has no checkpoint: it was not written to its end")
    step = load_checkpoint(checkpoint, task.state_dict())
    seed_step(seed, step)
    try:
        return {k: float(v) for k, v in task.step(batch | {"keys": keys}, step).items()}
    except NonFinite as error:
        return error.values


def _read(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """The samples' keys and the rest of this rank's batch."""
    try:
        world = _report(folder, 0)["world_size"]
        if world == world_size():
            return _report(folder, rank())["keys"], load_file(folder / f"batch-{rank()}.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{folder}: not a step that a run left ({error})") from error
    raise InputError(f"{folder} is of {world} processes, not {world_size()}: start as many")


def _report(folder: Path, of: int) -> dict[str, Any]:
    return read_json(folder / f"report-{of}.json")


def for_json(values: dict[str, float]) -> dict[str, float | str]:
    """NaN and infinity as words, which JSON has no numbers for."""
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
