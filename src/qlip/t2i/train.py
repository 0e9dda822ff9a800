"""The task of text to image: the next sub-token, with AdamW; LlamaGen's settings (docs/t2i.md)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlip.errors import InputError
from qlip.t2i.checkpoint import skeleton
from qlip.t2i.model import T2I
from qlip.train.caching import split_batch
from qlip.train.distributed import average
from qlip.train.optim import adamw, clip_gradients, make_groups, optimizer_state
from qlip.train.parallel import ComputeConfig, Parallel, whole
from qlip.train.task import check_finite, prefixed

INPUTS = ("condition", "lengths", "sub_tokens", "dropped")


@dataclass(frozen=True)
class T2ITaskConfig:
    """How the parameters move; the defaults are LlamaGen's, and the paper's.

    Attributes:
        lr: peak learning rate.
        betas: of AdamW.
        weight_decay: on matrices; vectors have none.
        grad_clip: largest norm of the whole gradient.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    grad_clip: float = 1.0

    def __post_init__(self):
        for name in ("lr", "grad_clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}: it must be above 0")
        if self.weight_decay < 0:
            raise InputError(f"weight_decay is {self.weight_decay}: it must be 0 or more")


class T2ITask:
    """The task: owns the model, its loss and its optimizer."""

    def __init__(self, model: T2I, config: T2ITaskConfig, compute: ComputeConfig, batch_size: int):
        """Spread the model over the processes.

        Args:
            model: on its device, float32, the same on every process.
            config: how it moves.
            compute: how a step is computed.
            batch_size: pictures of a step, over all processes.

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
            batch: this rank's share; see `qlip.t2i.data.training_batches`.
            step: its number, from 1.

        Returns:
            `loss`, −ln p of a sub-token, and gradient norms.

        Raises:
            NonFinite: the loss or a gradient is not finite; nothing has moved.
        """
        tensors = {name: batch[name].to(self.model.device) for name in INPUTS}
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for i, part in enumerate(split_batch(tensors, self.num_parts)):
            self.parallel.synchronize(i == self.num_parts - 1)
            loss = self.parallel(*(part[name] for name in INPUTS)) / self.num_parts
            loss.backward()
            losses.append(loss.detach())
        self.parallel.finish_backward()
        norms = clip_gradients(self.optimizer.param_groups, self.config.grad_clip)
        values = {"loss": average(torch.stack(losses).sum())} | norms
        check_finite(values)
        self.optimizer.step()
        return values

    def state_dict(self) -> dict[str, Tensor]:
        """The model and its optimizer's state, live."""
        state = prefixed("model", self.model.state_dict())
        return state | prefixed("optimizer", optimizer_state(self.optimizer, self.model))

    def snapshot(self) -> T2I:
        """The model as a whole copy in evaluation mode; all ranks must call it."""
        copy = skeleton(self.model.config)
        tensors = {name: whole(tensor).clone() for name, tensor in self.model.state_dict().items()}
        copy.load_state_dict(tensors, assign=True)
        return copy.eval()
