"""Where a run's log goes besides its file: TensorBoard, W&B. The one file that imports those."""

import json
import os
import secrets
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from qlip.errors import InputError, MissingExtra, one_line

Tracker = Literal["tensorboard", "wandb"]

_INSTALL = {"tensorboard": "'open-qlip[tensorboard]'", "wandb": "wandb"}


class Sink:
    """What a log writes to. Every method may be left out."""

    def write(self, step: int, entry: dict[str, float]) -> None:
        """Take the values of a step."""

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Take a picture."""

    def show(self, step: int, values: dict[str, float]) -> None:
        """Show values that are not kept."""

    def count(self) -> None:
        """Hear that a step is done."""

    def close(self, failed: bool) -> None:
        """Let go; `failed` if an error ended the run."""


def require(trackers: Sequence[Tracker]) -> None:
    """Say before a run writes anything that a tracker cannot be had.

    Raises:
        InputError: there is no such tracker, or its library is not installed.
    """
    for name in trackers:
        if name not in _INSTALL:
            raise InputError(f"log_to has {name!r}: choose from {', '.join(_INSTALL)}")
        try:
            import_module(name)
        except ImportError as error:
            raise MissingExtra(f"log_to {name} needs {name}: pip install {_INSTALL[name]}") from error


def open_tracker(name: Tracker, out: Path, start_step: int) -> Sink:
    """Start to show a run; what was shown of steps after `start_step` is taken back where that can be done.

    Args:
        name: where.
        out: the run's folder.
        start_step: the last step that is done.

    Raises:
        InputError: its library is not installed, or W&B cannot start.
    """
    require([name])
    return _TensorBoard(out, start_step) if name == "tensorboard" else _WandB(out)


class _TensorBoard(Sink):
    """Events in `out/tensorboard`."""

    def __init__(self, out: Path, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(out / "tensorboard", purge_step=start_step + 1)

    def write(self, step: int, entry: dict[str, float]) -> None:
        for name, value in entry.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # or a crash takes the last two minutes along

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self._writer.close()


class _WandB(Sink):
    """A run of the project "qlip" (or WANDB_PROJECT), with `recipe.json` as its configuration.

    A resumed run goes on under the id in `out/wandb/id`. W&B passes over steps that it has; they are the same,
    since a resumed run repeats the interrupted one.
    """

    def __init__(self, out: Path):
        import wandb

        recipe, id_file = out / "recipe.json", out / "wandb" / "id"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "qlip"),
                name=out.resolve().name,
                id=id_file.read_text(encoding="utf-8"),
                resume="allow",
                dir=out,
                config=json.loads(recipe.read_text(encoding="utf-8")) if recipe.exists() else None,
                settings=wandb.Settings(console="off"),  # it would upload every frame of the live view
            )
        except wandb.Error as error:
            raise InputError(
                f"wandb does not start ({one_line(error)}): set WANDB_API_KEY, or WANDB_MODE=offline"
            ) from error
        self._image = wandb.Image

    def write(self, step: int, entry: dict[str, float]) -> None:
        self._run.log(entry, step=step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._run.log({name: self._image(image)}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
