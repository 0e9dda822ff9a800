"""A task that trains one model whole: what text to image and the unified model have in common."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlip.train.caching import split_batch
from qlip.train.distributed import average
from qlip.train.optim import AdamWConfig, clip_gradients, make_groups, make_optimizer, optimizer_state
from qlip.train.parallel import ComputeConfig, Parallel, whole
from qlip.train.task import check_finite, prefixed


class ModelTask:
    """Owns a model and its optimizer; what a step is, a subclass says.

    Attributes:
        model: what is trained; its class makes another of its `config`.
        config: how it moves.
        parallel: the model, called where all processes have their share.
        num_parts: parts of a rank's batch that are computed one after the other.
        optimizers: its one optimizer.
    """

    def __init__(self, model: nn.Module, config: AdamWConfig, compute: ComputeConfig, batch_size: int):
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
        self.model: Any = model.train()
        self.config, self.kind = config, type(model)  # FSDP gives the model a class of its own
        self.parallel = Parallel(model, model, compute)
        groups = make_groups(model, lambda name: ("all", config.lr), config.weight_decay)
        self.optimizer = make_optimizer(config.optimizer, groups, config.betas, eps=1e-8)
        self.optimizers = [self.optimizer]

    def descend(
        self,
        tensors: dict[str, Tensor],
        losses: Callable[[dict[str, Tensor]], Sequence[Tensor]],
        names: Sequence[str] = ("loss",),
    ) -> dict[str, Tensor]:
        """One step downhill.

        Args:
            tensors: this rank's share of the batch, of equal length.
            losses: of a part of it, scalars for `names`, of which the first is minimised. They are added up over
                the parts, and averaged over the ranks as gradients are.
            names: of what is logged.

        Returns:
            the losses, and gradient norms.

        Raises:
            NonFinite: a value is not finite; nothing has moved.
        """
        self.optimizer.zero_grad(set_to_none=True)
        sums = []
        for i, part in enumerate(split_batch(tensors, self.num_parts)):
            self.parallel.synchronize(i == self.num_parts - 1)
            found = losses(part)
            found[0].backward()
            sums.append(torch.stack([value.detach() for value in found]))
        self.parallel.finish_backward()
        norms = clip_gradients(self.optimizer.param_groups, self.config.grad_clip)
        values = dict(zip(names, average(torch.stack(sums).sum(0)).unbind(), strict=True)) | norms
        check_finite(values)
        self.optimizer.step()
        return values

    def state_dict(self) -> dict[str, Tensor]:
        """The model and its optimizer's state, live."""
        state = prefixed("model", self.model.state_dict())
        return state | prefixed("optimizer", optimizer_state(self.optimizer, self.model))

    def snapshot(self) -> Any:
        """The model as a whole copy in evaluation mode; all ranks must call it."""
        with torch.device("meta"):
            copy = self.kind(self.model.config)
        tensors = {name: whole(tensor).clone() for name, tensor in self.model.state_dict().items()}
        copy.load_state_dict(tensors, assign=True)
        return copy.eval()
