"""LAMB, and norms of tensors that are sharded over processes.

The packaged LAMBs take the norm of what they are handed. Under FSDP2 that is a shard, so that the trust ratio, and
with it the training, would depend on the number of processes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


class Lamb(torch.optim.Optimizer):
    """Adam whose step on each matrix is as long as a share `lr` of the matrix (You et al. 2019, algorithm 2).

        u = m̂ / (√v̂ + eps) + weight_decay·p        m̂, v̂: Adam's bias-corrected moments
        p ← p − lr · ‖p‖/‖u‖ · u                   the ratio is 1 where either norm is zero

    Norms are over the whole parameter, however it is sharded. Parameters of fewer than two dimensions take the
    ratio 1, which is Adam's step: in EVA-CLIP's LAMB, apex and timm it is all parameters without weight decay,
    which with the usual settings are the same. Unlike theirs, this one does not also clip gradients to norm 1.

    State of a parameter: `exp_avg` and `exp_avg_sq` like the parameter, `step` () float32 on its device.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        """Take over parameters or groups of them, plain or sharded (DTensor)."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; one collective for each group with sharded matrices, which all processes must join."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = adam_state(p)
            if params:
                self._update(params, local_shards(p.grad for p in params), group)
        return loss

    def _update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        states = [self.state[p] for p in params]
        weights = local_shards(params)
        means, squares = (local_shards([s[key] for s in states]) for key in ("exp_avg", "exp_avg_sq"))
        steps = [s["step"] for s in states]
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)

        step = torch.stack(steps)  # counted on the device, so that nothing waits for it
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, (1 - beta2**step).sqrt().unbind())
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(means, denominators)
        del denominators
        torch._foreach_div_(updates, (1 - beta1**step).unbind())
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])

        matrices = [i for i, p in enumerate(params) if p.ndim >= 2]
        if matrices:
            layouts = [params[i] for i in matrices]
            local = [tensors[i] for tensors in (weights, updates) for i in matrices]
            weight_norm, update_norm = whole_norms(local, layouts * 2).chunk(2)
            ratio = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
            torch._foreach_mul_([updates[i] for i in matrices], ratio.unbind())
        torch._foreach_add_(weights, updates, alpha=-group["lr"])


def adam_state(parameter: Tensor) -> dict[str, Tensor]:
    """State before the first step, of AdamW and LAMB alike: moments like the parameter, and a count."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


@torch.no_grad()
def local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process holds of each tensor: shares its memory, so that writing to it writes to the tensor."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def whole_norms(shards: Sequence[Tensor], layouts: Sequence[Tensor]) -> Tensor:
    """Norms of whole tensors from what each process holds of them.

    Args:
        shards: what this process holds; may be empty tensors.
        layouts: for each, a tensor that is sharded as it is: DTensors on one mesh, placed alike, and plain
            tensors, which every process holds whole.

    Returns:
        (len(shards),) Euclidean norms, the same on every process. One collective if any is sharded.
    """
    norms = torch.stack(torch._foreach_norm(list(shards)))
    like = next((layout for layout in layouts if isinstance(layout, DTensor)), None)
    if like is None:
        return norms
    # Shards' squares add up to the whole's; along a mesh dimension that holds copies there is nothing to add.
    addends = [Partial() if placement.is_shard() else Replicate() for placement in like.placements]
    whole = DTensor.from_local(norms.square(), like.device_mesh, addends).full_tensor().sqrt()
    choices = zip(whole, norms, layouts, strict=True)
    return torch.stack([w if isinstance(layout, DTensor) else n for w, n, layout in choices])
