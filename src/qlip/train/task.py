"""What `fit` trains."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from qlip.train.distributed import any_rank, gather_rows

Batch = dict[str, Any]


class Task(Protocol):
    """A task owns its model, its losses and its optimizers."""

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """Their groups hold the peak learning rates, and names."""

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Train on one batch.

        Args:
            batch: this rank's share.
            step: its number, from 1.

        Returns:
            scalars to log, `loss` among them.

        Raises:
            NonFinite: a value is not finite; nothing has moved.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor that makes the run, live: filling them in place restores it."""

    def snapshot(self) -> Any:
        """The model as a whole copy in evaluation mode, for evaluators and export; all ranks must call it."""


class NonFinite(Exception):
    """A step's values are not all finite.

    Attributes:
        values: this rank's, by name.
        names: those that are not finite on any rank.
        culprit: the rank where most of them are not.
    """

    def __init__(self, values: dict[str, float], names: list[str], culprit: int):
        super().__init__(names)
        self.values, self.names, self.culprit = values, names, culprit


def check_finite(values: dict[str, Tensor]) -> None:
    """Compare notes over ranks; all must call it.

    Raises:
        NonFinite: on every rank, if a value of any is not finite.
    """
    numbers = torch.stack([value.detach().float() for value in values.values()])
    bad = ~numbers.isfinite()
    if any_rank(bool(bad.any())):
        each = gather_rows(bad.int()[None])
        names = [name for name, anywhere in zip(values, each.any(0).tolist(), strict=True) if anywhere]
        raise NonFinite(dict(zip(values, numbers.tolist(), strict=True)), names, int(each.sum(1).argmax()))


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by `prefix.name`."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}
