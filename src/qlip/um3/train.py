"""The task of a unified model: the next token of text and of pictures, with AdamW (paper Table 9)."""

from typing import Any

import torch
from torch import Tensor

from qlip.train.distributed import average, world_size
from qlip.train.model_task import ModelTask
from qlip.um3.mix import KINDS
from qlip.um3.model import Losses

INPUTS = ("input_ids", "document_ids")


class UM3Task(ModelTask):
    """The task: owns a `UM3`, its losses and its optimizer."""

    def step(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """One optimizer step.

        Args:
            batch: this rank's share; see `qlip.um3.data.Batches`.
            step: its number, from 1.

        Returns:
            `loss`, and of it `text_loss` and `visual_loss`, −ln p of a target; gradient norms; and as `share/…`
            what part of the rows is of each kind.

        Raises:
            NonFinite: a loss or a gradient is not finite; nothing has moved.
        """
        tensors = {name: batch[name].to(self.model.device) for name in INPUTS}
        counts = average(self._num_targets(**tensors)) * world_size()

        def losses(part: dict[str, Tensor]) -> list[Tensor]:
            # Each part and rank has its share of the sum over the whole batch's targets; ranks are then averaged.
            return [loss * world_size() for loss in self.parallel(*part.values(), *counts)]

        values = self.descend(tensors, losses, Losses._fields)
        shares = batch["num_tokens"].sum(0) / batch["input_ids"].numel()
        return values | {f"share/{kind}": share for kind, share in zip(KINDS, shares, strict=True)}

    def _num_targets(self, input_ids: Tensor, document_ids: Tensor) -> Tensor:
        """Text and visual targets of this rank's rows, (2,)."""
        same = (document_ids[:, 1:] == document_ids[:, :-1]) & (document_ids[:, 1:] != 0)
        visual = input_ids[:, 1:] >= self.model.config.num_text
        return torch.stack([(same & ~visual).sum(), (same & visual).sum()]).double()
