"""The one training loop: batch, `task.step`, schedule, log, evaluate, save."""

import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from qlip.errors import InputError, SharedError
from qlip.train.checkpoint import Checkpoints, checkpoint_step, latest_checkpoint, load_checkpoint
from qlip.train.distributed import (
    any_rank,
    gather_rows,
    mean_over_ranks,
    on_all_ranks,
    on_first_rank,
    rank,
    seed_step,
    world_size,
)
from qlip.train.log import Log, open_log, read_log
from qlip.train.nonfinite import dump
from qlip.train.plot import plot_log
from qlip.train.task import Batch, NonFinite, Task
from qlip.train.trackers import Tracker

Evaluator = Callable[[Any], Mapping[str, float | Image.Image]]  # of the task's snapshot
logger = logging.getLogger("qlip")


@dataclass(frozen=True)
class FitConfig:
    """How long and how often.

    Attributes:
        steps: optimizer steps.
        warmup_steps: steps over which the learning rate rises linearly, before the cosine to zero.
        log_every: steps between lines in the log.
        eval_every: steps between evaluations, with pictures.
        save_every: steps between checkpoints.
        keep: how many checkpoints are kept, the latest.
        best: the evaluation's number whose best checkpoint is kept besides; it is saved when it is reached, and
            which way is better `qlip.train.measures` says. None: no such.
        skip_nonfinite: how many steps with a loss that is not finite are passed over before the run stops.
        log_to: where the log goes besides `log.jsonl`: "tensorboard", "wandb".
    """

    steps: int = 3000
    warmup_steps: int = 200
    log_every: int = 10
    eval_every: int = 500
    save_every: int = 500
    keep: int = 2
    best: str | None = "psnr"
    skip_nonfinite: int = 0
    log_to: tuple[Tracker, ...] = ()

    def __post_init__(self):
        for name in ("steps", "log_every", "eval_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.warmup_steps < self.steps:
            raise InputError(f"warmup_steps {self.warmup_steps} must be less than steps {self.steps}")
        if self.skip_nonfinite < 0:
            raise InputError(f"skip_nonfinite is {self.skip_nonfinite}: it must be 0 or more")


@dataclass
class Outcome:
    """Where a run stands when `fit` returns.

    Attributes:
        step: the last one done; less than the config's if SIGTERM or Ctrl-C came.
        results: the last evaluation's numbers, on the first process.
    """

    step: int
    results: dict[str, float]


def fit(
    task: Task,
    batches: Callable[[int], Generator[Batch, None, None]],
    config: FitConfig,
    out: Path,
    evaluators: Sequence[Evaluator] = (),
    resume: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    flops_per_image: float | None = None,
) -> Outcome:
    """Train. All processes call it; the first one logs and evaluates.

    SIGTERM and Ctrl-C end it after the step at hand, with a checkpoint; a second Ctrl-C ends it at once.

    Args:
        task: what to train.
        batches: from a step number, this rank's endless batches from there on.
        config: how long and how often.
        out: folder for `log.jsonl`, `curves.png`, `images/` and `checkpoints/`.
        evaluators: functions of the task's snapshot that return named numbers and pictures; called every
            `eval_every` steps and at the end, without gradients.
        resume: go on from the latest checkpoint in `out`, if there is one.
        seed: of what is random in a step.
        device: on which this process trains, for the log.
        flops_per_image: of training, for the log.

    Raises:
        InputError: `out` holds a run and `resume` is False, its checkpoint does not fit the task, a checkpoint
            cannot be written, or a loss is not finite.
    """
    checkpoint = start_checkpoint(out, resume)
    if resume and checkpoint is None and rank() == 0:
        logger.info("no checkpoint in %s: starting anew", out)
    checkpoints = Checkpoints(out, config.keep, config.best)
    start = load_checkpoint(checkpoint, task.state_dict()) if checkpoint else 0
    if start > config.steps:
        raise SharedError(f"{out} has done {start} steps, more than steps {config.steps}: raise --steps")
    skipped = sum("skipped" in entry and entry["step"] <= start for entry in read_log(out / "log.jsonl"))
    outcome, stream = Outcome(start, {}), batches(start)
    opened = open_log(
        out, start, config.steps, device=device, flops_per_image=flops_per_image, log_to=config.log_to
    )
    with _on_stop() as stop, checkpoints, ExitStack() as stack:
        stack.enter_context(closing(stream))  # its workers outlive signals and would hold a failed run at its exit
        log = on_all_ranks(partial(stack.enter_context, opened))
        for step in range(start + 1, config.steps + 1):
            last, results = step == config.steps, None
            for optimizer in task.optimizers:
                set_learning_rate(optimizer, cosine_factor(step, config))
            batch = on_all_ranks(partial(next, stream))
            seed_step(seed, step)
            try:
                values = task.step(batch, step)
            except NonFinite as error:
                if skipped == config.skip_nonfinite:
                    checkpoints.wait()
                    raise dump(out, task, batch, step, error) from None
                skipped, values = skipped + 1, {"skipped": torch.ones(())}
                if rank() == 0:
                    logger.warning("step %d is not finite and was passed over", step)
            log.count(len(batch["keys"]) * world_size())
            if step == start + 1:
                log.show(step, mean_over_ranks(values))
            if last or step % config.log_every == 0 or "skipped" in values:
                line = mean_over_ranks(values) | learning_rates(task.optimizers)
                on_all_ranks(partial(log.write, step, line))
            if last or step % config.eval_every == 0:
                with log.paused():
                    results = outcome.results = evaluate(task, evaluators, log, step)
                    if results and config.best not in {None, *results}:
                        logger.warning("no evaluation gives %r: no checkpoint is kept as the best", config.best)
                    on_first_rank(partial(plot_log, out / "log.jsonl", out / "curves.png"))
            stopped = any_rank(stop.is_set())
            if last or stopped or step % config.save_every == 0 or any_rank(checkpoints.is_best(results)):
                with log.paused():
                    checkpoints.save(task.state_dict(), step, results)
            checkpoints.check()
            outcome.step = step
            if stopped:
                break
    return outcome


def start_checkpoint(out: Path, resume: bool) -> Path | None:
    """The checkpoint that a run begins with, on which all ranks agree.

    Raises:
        SharedError: there is one and `resume` is False, or the ranks do not see the same.
    """
    checkpoint = latest_checkpoint(out)
    steps = gather_rows(torch.tensor([checkpoint_step(checkpoint) if checkpoint else -1])).tolist()
    if len(set(steps)) > 1:
        raise SharedError(
            f"the ranks see checkpoints of steps {steps} in {out}: --out must be one for all of them"
        )
    if checkpoint and not resume:
        raise SharedError(f"{out} already holds a run: go on with --resume, or choose another --out")
    return checkpoint


def evaluate(task: Task, evaluators: Sequence[Evaluator], log: Log, step: int) -> dict[str, float]:
    """Let each evaluator look at the task's snapshot, on the first process; the others wait.

    Returns:
        the numbers; on the other processes none.
    """
    if not evaluators:  # a copy of a large model for nothing
        return {}
    model = task.snapshot()

    def look() -> dict[str, float]:
        if rank():
            return {}
        with torch.inference_mode():
            found = {name: value for evaluator in evaluators for name, value in evaluator(model).items()}
        for name, value in found.items():
            if isinstance(value, Image.Image):
                log.image(step, name, value)
        results = {name: value for name, value in found.items() if not isinstance(value, Image.Image)}
        log.results(step, results)
        return results

    return on_all_ranks(look)


def learning_rates(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, float]:
    """The largest rate of each named group of parameters, as `lr/…`."""
    rates: dict[str, float] = {}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        name = f"lr/{group['name']}"
        rates[name] = max(rates.get(name, 0.0), group["lr"])
    return rates


def cosine_factor(step: int, config: FitConfig) -> float:
    """Share of the peak learning rate at a step (1 to steps): linear warm-up, then cosine to zero.

    A run of a single step has the peak, or it would learn nothing.
    """
    if config.steps == 1:
        return 1.0
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to `factor` times the rate that it was built with."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("initial_lr", group["lr"])


@contextmanager
def _on_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; only the main thread may listen."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def stop(number: int, frame: object) -> None:
        event.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one ends the process, whatever it is doing
            if rank() == 0:  # by the file's number: the interrupted code may be writing to the stream
                show_cursor = b"\x1b[?25h" if os.isatty(2) else b""
                os.write(2, show_cursor + b"\nsaving after this step; Ctrl-C again stops at once\n")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
