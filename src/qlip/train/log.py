"""What a run tells: `log.jsonl` with an object a line, pictures, and whatever else shows them while it goes."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from qlip.errors import InputError, one_line
from qlip.files import whole_file
from qlip.guarded import parse_json, typed
from qlip.train.distributed import rank, world_size
from qlip.train.flops import peak_flops
from qlip.train.terminal import Terminal
from qlip.train.trackers import Sink, Tracker, open_tracker, require

Values = Mapping[str, torch.Tensor | float]


@contextmanager
def open_log(
    out: Path,
    start_step: int,
    total_steps: int,
    *,
    device: torch.device | str = "cpu",
    flops_per_image: float | None = None,
    log_to: Sequence[Tracker] = (),
) -> Iterator["Log"]:
    """Keep the record of a run; rank 0 writes, on the others nothing happens.

    Args:
        out: the run's folder, for `log.jsonl` and `images/`.
        start_step: the last step that is done; lines after it are dropped, so that every step stands once.
        total_steps: of the run.
        device: on which this process trains.
        flops_per_image: see `qlip.train.flops`; None leaves TFLOP/s and MFU out.
        log_to: trackers beside the folder.

    Raises:
        InputError: a tracker cannot be had.
    """
    sinks: list[Sink] = []
    failed = True
    try:
        if rank() == 0:
            require(log_to)
            folder = _Folder(out, start_step)
            sinks.append(folder)
            sinks.extend(open_tracker(name, out, start_step) for name in log_to)
            sinks.append(Terminal(f"training {out}", start_step, total_steps, read_log(folder.path)))
        yield Log(sinks, torch.device(device), flops_per_image)
        failed = False
    finally:
        for sink in reversed(sinks):
            sink.close(failed)


class Log:
    """Adds to what it is told what it measures itself: the speed and the memory.

    A line holds the step, the values handed over, and for the steps since the last line images_per_s, tflops_per_s
    (10¹² FLOP/s on each device), mfu (their share of the device's peak) and memory_gib (the most that was
    allocated on the GPU, or what this process holds of the machine's). Evaluation and saving do not count.
    """

    def __init__(self, sinks: Sequence[Sink], device: torch.device, flops_per_image: float | None):
        """Start the clock. See `open_log`."""
        self._sinks, self._device = sinks, device
        self._flops = flops_per_image
        self._peak = peak_flops(device)
        self._restart()

    def count(self, num_images: int) -> None:
        """Count a step and its images, those of all ranks."""
        self._images += num_images
        for sink in self._sinks:
            sink.count()

    def write(self, step: int, values: Values) -> None:
        """Add a line about training."""
        if self._sinks:
            numbers = _numbers(values)  # waits for the device, and so goes before the clock is read
            self._send(step, numbers | self._speed())
            self._restart()

    def show(self, step: int, values: Values) -> None:
        """Show values to who is watching, without a line in the log: those of a run's first step."""
        if self._sinks:
            numbers = _numbers(values)
            for sink in self._sinks:
                sink.show(step, numbers)

    def results(self, step: int, values: Values) -> None:
        """Add a line about an evaluation; names get the prefix "eval/"."""
        if self._sinks and values:
            self._send(step, {f"eval/{name}": value for name, value in _numbers(values).items()})
        self._restart()

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Keep a picture as `images/NAME-STEP.png`."""
        for sink in self._sinks:
            sink.image(step, name, image)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock while the run does something else than train."""
        start = time.monotonic()
        yield
        self._since += time.monotonic() - max(start, self._since)  # a line may have been written meanwhile

    def _send(self, step: int, entry: dict[str, float]) -> None:
        for sink in self._sinks:
            sink.write(step, entry)

    def _restart(self) -> None:
        self._images, self._since = 0, time.monotonic()
        if self._sinks and self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def _speed(self) -> dict[str, float]:
        speed: dict[str, float] = {}
        if self._images:
            rate = self._images / max(time.monotonic() - self._since, 1e-9)
            speed["images_per_s"] = rate
            if self._flops:
                flops = rate * self._flops / world_size()
                speed["tflops_per_s"] = flops / 1e12
                if self._peak:
                    speed["mfu"] = flops / self._peak
        if memory := _memory_gib(self._device):
            speed["memory_gib"] = memory
        return {name: float(f"{value:.4g}") for name, value in speed.items()}


def read_log(path: Path) -> list[dict[str, float]]:
    """The entries of a `log.jsonl`; lines that are damaged, such as one cut off by a crash, are left out."""
    return [entry for _, entry in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, float]]]:
    """Complete lines and their entries."""
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            entry = typed(dict[str, Any], parse_json(line), "the line")
            typed(int, entry.get("step"), "step")
        except InputError:
            continue
        if line.endswith(b"\n") and all(type(value) in (int, float) for value in entry.values()):  # NaN is one
            yield line, entry


def _numbers(values: Values) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _memory_gib(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    statm = Path("/proc/self/statm")
    if statm.exists():
        pages = int(statm.read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    if sys.platform == "darwin":
        import resource  # which Windows does not have

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # the most until now
    return None


class _Folder(Sink):
    """`log.jsonl`, a line at a time, and `images/`."""

    def __init__(self, out: Path, start_step: int):
        self.path = out / "log.jsonl"
        kept = [line for line, entry in _lines(self.path) if entry["step"] <= start_step]
        with whole_file(self.path) as unfinished:
            unfinished.write_bytes(b"".join(kept))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, entry: dict[str, float]) -> None:
        try:
            self._file.write(json.dumps({"step": step} | entry) + "\n")
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written ({one_line(error)}): make room, then go on with --resume"
            ) from error

    def image(self, step: int, name: str, image: Image.Image) -> None:
        with whole_file(self.path.parent / "images" / f"{name}-{step:07d}.png") as unfinished:
            image.save(unfinished, "PNG")

    def close(self, failed: bool) -> None:
        with suppress(*(OSError,) if failed else ()):  # the first error is the one to see
            self._file.close()
