"""Checkpoints of a run: the model, the optimizer's state and the step, as safetensors, written atomically."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qlip.errors import InputError
from qlip.files import whole_file

if TYPE_CHECKING:
    from qlip.train.fit import Task


def save_checkpoint(out: Path, task: "Task", step: int, keep: int) -> Path:
    """Write `out/checkpoints/step-NNNNNNN.safetensors` and drop all but the latest `keep`.

    The file appears whole or not at all: it is written beside, flushed to disk and renamed.
    """
    tensors = {f"model.{name}": value for name, value in task.model.state_dict().items()}
    for i, state in task.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
    path = out / "checkpoints" / f"step-{step:07d}.safetensors"
    try:
        with whole_file(path) as unfinished:
            save_file({k: v.contiguous() for k, v in tensors.items()}, unfinished)
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
    except SafetensorError as error:  # what a full disk comes out as
        raise InputError(f"{path} cannot be written ({error}): make room, then go on with --resume") from error
    for old in _checkpoints(out)[:-keep]:
        old.unlink()
    return path


def latest_checkpoint(out: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next(reversed(_checkpoints(out)), None)


def checkpoint_step(path: Path) -> int:
    """The step at which a checkpoint was written, from its name."""
    return int(path.stem.removeprefix("step-"))


def load_checkpoint(path: Path, task: "Task") -> int:
    """Put model and optimizer back.

    Returns:
        The step that was saved.

    Raises:
        InputError: the file is damaged, or of another model.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: not a readable checkpoint ({error}); delete it to use the one before"
        ) from error
    model = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    states: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, i, name = key.split(".")
            states.setdefault(int(i), {})[name] = value
    try:
        task.model.load_state_dict(model)
    except RuntimeError as error:
        raise InputError(f"{path} is of another model: {str(error).splitlines()[1].strip()}") from error
    task.optimizer.load_state_dict(task.optimizer.state_dict() | {"state": states})
    return checkpoint_step(path)


def _checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*.safetensors"))
