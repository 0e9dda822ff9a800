"""The record of a run: one JSON object a line, and a live line in the terminal."""

import json
import time
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qlip.files import whole_file


class Log:
    """`log.jsonl` in the run's folder, and progress on stderr.

    A resumed run drops the lines past its checkpoint, so that every step stands once.
    """

    def __init__(self, path: Path, start_step: int, total_steps: int):
        """Open the file; lines of steps after `start_step` are dropped."""
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= start_step]
        with whole_file(path) as unfinished:
            unfinished.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=start_step, status="")
        self._images, self._since = 0, time.monotonic()

    def __enter__(self) -> "Log":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._file.close()

    def count(self, num_images: int) -> None:
        """Count images towards the rate that the next line reports."""
        self._images += num_images

    def write(self, step: int, values: dict[str, torch.Tensor | float]) -> None:
        """Add a line: the step, the values, and the images a second since the last line."""
        entry: dict[str, float] = {"step": step} | {name: float(v) for name, v in values.items()}
        if self._images:
            now = time.monotonic()
            entry["images_per_s"] = round(self._images / (now - self._since), 1)
            self._images = 0
        self._since = time.monotonic()
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        status = "  ".join(
            f"{name.removeprefix('eval/')} {entry[name]:.4g}"
            for name in ("loss", "images_per_s", "eval/psnr", "eval/top1")
            if name in entry
        )
        self._bar.update(self._task, completed=step, status=status)


def read_log(path: Path) -> list[dict[str, float]]:
    """The entries of a `log.jsonl`."""
    return [json.loads(line) for line in _lines(path)]


def _lines(path: Path) -> list[str]:
    """Complete lines; one cut off by a crash is dropped."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("}\n")]
