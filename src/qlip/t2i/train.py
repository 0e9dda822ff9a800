"""The task of text to image: the next sub-token, with AdamW; LlamaGen's settings (docs/t2i.md)."""

from typing import Any

from torch import Tensor

from qlip.train.model_task import ModelTask

INPUTS = ("condition", "lengths", "sub_tokens", "dropped")


class T2ITask(ModelTask):
    """The task: owns a `T2I`, its loss and its optimizer."""

    def step(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """One optimizer step.

        Args:
            batch: this rank's share; see `qlip.t2i.data.training_batches`.
            step: its number, from 1.

        Returns:
            `loss`, −ln p of a sub-token, and gradient norms.

        Raises:
            NonFinite: the loss or a gradient is not finite; nothing has moved.
        """
        tensors = {name: batch[name].to(self.model.device) for name in INPUTS}
        return self.descend(tensors, lambda part: [self.parallel(*part.values()) / self.num_parts])
