"""The one training loop: batch, `task.step`, schedule, log, evaluate, save."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlip.errors import InputError
from qlip.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from qlip.train.log import Log
from qlip.train.plot import plot_log

Evaluator = Callable[[], dict[str, float]]
Batch = dict[str, Any]


class Task(Protocol):
    """What `fit` trains: a task owns its model, its losses and its optimizer."""

    @property
    def model(self) -> nn.Module:
        """In training mode."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Its groups hold the peak learning rates."""

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimizer step; returns scalars to log, `loss` among them."""


@dataclass(frozen=True)
class FitConfig:
    """How long and how often.

    Attributes:
        steps: optimizer steps.
        warmup_steps: steps over which the learning rate rises linearly, before the cosine to zero.
        log_every: steps between lines in the log.
        eval_every: steps between evaluations.
        save_every: steps between checkpoints.
        keep: how many checkpoints are kept, the latest.
    """

    steps: int = 3000
    warmup_steps: int = 200
    log_every: int = 10
    eval_every: int = 500
    save_every: int = 500
    keep: int = 2

    def __post_init__(self):
        for name in ("steps", "log_every", "eval_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"fit.{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.warmup_steps < self.steps:
            raise InputError(f"fit.warmup_steps {self.warmup_steps} must be less than fit.steps {self.steps}")


def fit(
    task: Task,
    batches: Callable[[int], Iterator[Batch]],
    config: FitConfig,
    out: Path,
    evaluators: Sequence[Evaluator] = (),
    resume: bool = False,
) -> dict[str, float]:
    """Train.

    Args:
        task: what to train.
        batches: from a step number, the endless batches from there on.
        config: how long and how often.
        out: folder for `log.jsonl`, `curves.png` and `checkpoints/`.
        evaluators: functions that return named numbers; called every `eval_every` steps and at the end, with
            the model in evaluation mode and without gradients.
        resume: go on from the latest checkpoint in `out`, if there is one.

    Returns:
        The last evaluation's numbers.

    Raises:
        InputError: `out` holds a run and `resume` is False, or its checkpoint does not fit the task.
    """
    checkpoint = latest_checkpoint(out)
    if checkpoint and not resume:
        raise InputError(f"{out} already holds a run: go on with --resume, or choose another --out")
    start = load_checkpoint(checkpoint, task) if checkpoint else 0
    results: dict[str, float] = {}
    stream = batches(start)
    with Log(out / "log.jsonl", start, config.steps) as log:
        for step in range(start + 1, config.steps + 1):
            last = step == config.steps
            set_learning_rate(task.optimizer, cosine_factor(step, config))
            batch = next(stream)
            values = task.step(batch)
            log.count(len(batch["keys"]))
            if last or step % config.log_every == 0:
                log.write(step, {**values, "lr": task.optimizer.param_groups[0]["lr"]})
            if last or step % config.eval_every == 0:
                results = evaluate(task.model, evaluators)
                if results:
                    log.write(step, {f"eval/{name}": value for name, value in results.items()})
                plot_log(out / "log.jsonl", out / "curves.png")
            if last or step % config.save_every == 0:
                save_checkpoint(out, task, step, config.keep)
    return results


def evaluate(model: nn.Module, evaluators: Sequence[Evaluator]) -> dict[str, float]:
    """Call each evaluator with the model in evaluation mode, and put it back after."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        results = {name: value for evaluator in evaluators for name, value in evaluator().items()}
    model.train(was_training)
    return results


def cosine_factor(step: int, config: FitConfig) -> float:
    """Share of the peak learning rate at a step (1 to steps): linear warm-up, then cosine to zero."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to `factor` times the rate that it was built with."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("initial_lr", group["lr"])
