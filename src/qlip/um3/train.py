"""The task of a unified model: the next token of text and of pictures, with AdamW (paper Table 9)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlip.errors import InputError
from qlip.train.caching import split_batch
from qlip.train.distributed import average, world_size
from qlip.train.optim import adamw, clip_gradients, make_groups, optimizer_state
from qlip.train.parallel import ComputeConfig, Parallel, whole
from qlip.train.task import check_finite, prefixed
from qlip.um3.mix import KINDS
from qlip.um3.model import UM3, skeleton

INPUTS = ("input_ids", "document_ids")


@dataclass(frozen=True)
class UM3TaskConfig:
    """How the parameters move; the defaults are the paper's.

    Attributes:
        lr: peak learning rate.
        betas: of AdamW.
        weight_decay: on matrices; vectors have none.
        grad_clip: largest norm of the whole gradient.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    grad_clip: float = 1.0

    def __post_init__(self):
        for name in ("lr", "grad_clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}: it must be above 0")
        if self.weight_decay < 0:
            raise InputError(f"weight_decay is {self.weight_decay}: it must be 0 or more")


class UM3Task:
    """The task: owns the model, its losses and its optimizer."""

    def __init__(self, model: UM3, config: UM3TaskConfig, compute: ComputeConfig, batch_size: int):
        """Spread the model over the processes.

        Args:
            model: on its device, float32, the same on every process.
            config: how it moves.
            compute: how a step is computed.
            batch_size: rows of a step, over all processes.

        Raises:
            InputError: the batch cannot be shared out.
        """
        self.num_parts = compute.num_parts(batch_size)
        self.model, self.config = model.train(), config
        self.parallel = Parallel(model, model, compute)
        groups = make_groups(model, lambda name: ("all", config.lr), config.weight_decay)
        self.optimizer = adamw(groups, config.betas, eps=1e-8)
        self.optimizers = [self.optimizer]

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
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for i, part in enumerate(split_batch(tensors, self.num_parts)):
            self.parallel.synchronize(i == self.num_parts - 1)
            found = self.parallel(*(part[name] for name in INPUTS), *counts)
            # Each part and rank has its share of the sum over the whole batch's targets; ranks are then averaged.
            (found.loss * world_size()).backward()
            losses.append(torch.stack([found.loss, found.text_loss, found.visual_loss]).detach())
        self.parallel.finish_backward()
        norms = clip_gradients(self.optimizer.param_groups, self.config.grad_clip)
        means = average(torch.stack(losses).sum(0)) * world_size()
        values = dict(zip(("loss", "text_loss", "visual_loss"), means.unbind(), strict=True)) | norms
        check_finite(values)
        self.optimizer.step()
        shares = batch["num_tokens"].sum(0) / batch["input_ids"].numel()
        return values | {f"share/{kind}": share for kind, share in zip(KINDS, shares, strict=True)}

    def _num_targets(self, input_ids: Tensor, document_ids: Tensor) -> Tensor:
        """Text and visual targets of this rank's rows, (2,)."""
        same = (document_ids[:, 1:] == document_ids[:, :-1]) & (document_ids[:, 1:] != 0)
        visual = input_ids[:, 1:] >= self.model.config.num_text
        return torch.stack([(same & ~visual).sum(), (same & visual).sum()]).double()

    def state_dict(self) -> dict[str, Tensor]:
        """The model and its optimizer's state, live."""
        state = prefixed("model", self.model.state_dict())
        return state | prefixed("optimizer", optimizer_state(self.optimizer, self.model))

    def snapshot(self) -> UM3:
        """The model as a whole copy in evaluation mode; all ranks must call it."""
        copy = skeleton(self.model.config)
        tensors = {name: whole(tensor).clone() for name, tensor in self.model.state_dict().items()}
        copy.load_state_dict(tensors, assign=True)
        return copy.eval()
