"""Muon: steps along the orthogonalized momentum of each hidden matrix, and AdamW for every other parameter.

The same updates as `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`. Torch's runs its iterations in
bfloat16, matrix by matrix: on a CPU without bfloat16 instructions that is 20 times slower than float32.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from qlip.train.lamb import adam_state

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for groups whose `hidden` is true, fused AdamW for the others.

        m ← 0.95·m + 0.05·g
        p ← (1 − lr·weight_decay)·p − lr · 0.2·√max(rows, columns) · orthogonalize(0.05·g + 0.95·m)

    The factor gives a step the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that `lr` and
    `weight_decay` mean the same for both. A sharded matrix (DTensor) is gathered, and each process
    orthogonalizes it whole.

    State of a hidden matrix: `momentum_buffer`, like the parameter; of another parameter: AdamW's.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float):
        """Take over groups of `make_groups`, and put the state in place.

        Args:
            groups: with `lr`, `weight_decay` and `hidden`; a hidden group's parameters are matrices.
            betas: of AdamW.
            eps: of AdamW.
        """
        super().__init__(groups, {"betas": betas, "eps": eps})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"momentum_buffer": torch.zeros_like(p)} if group["hidden"] else adam_state(p)
        self._adamw = self._of_the_others()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a copy whole: AdamW of the others has its own groups and state."""
        super().__setstate__(state)
        self._adamw = self._of_the_others()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; one collective for each sharded hidden matrix, which all processes must join."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["hidden"]:
                self._update(group)
        if self._adamw:
            self._adamw.step()
        return loss

    def _of_the_others(self) -> torch.optim.AdamW | None:
        """AdamW of the groups that are not hidden, on this optimizer's own groups and state."""
        others = [group for group in self.param_groups if not group["hidden"]]
        if not others:
            return None
        adamw = torch.optim.AdamW(others, fused=True)
        adamw.param_groups, adamw.state = others, self.state
        return adamw

    def _update(self, group: dict[str, Any]) -> None:
        by_shape = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                by_shape[p.shape].append(p)
        for shape, params in by_shape.items():
            step = group["lr"] * 0.2 * math.sqrt(max(shape))
            directions = orthogonalize(torch.stack([self._momentum(p) for p in params]))
            for p, direction in zip(params, directions, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(_placed_as(direction, p), alpha=-step)

    def _momentum(self, p: Tensor) -> Tensor:
        """Nesterov's momentum of a matrix, whole, after this step's gradient."""
        grad: Any = p.grad
        mean = self.state[p]["momentum_buffer"]
        mean.lerp_(grad, 1 - MOMENTUM)
        ahead = grad.lerp(mean, MOMENTUM)
        return ahead.full_tensor() if isinstance(ahead, DTensor) else ahead


def orthogonalize(matrices: Tensor) -> Tensor:
    """Move all singular values of each matrix to about 1, between 0.7 and 1.2, by Newton–Schulz iterations.

    They run in bfloat16 on a GPU that computes it natively, else in float32.

    Args:
        matrices: (B, M, N) float32.

    Returns:
        (B, M, N) float32. A matrix of zeros stays zero.
    """
    tall = matrices.size(1) > matrices.size(2)
    fast = matrices.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    x = (matrices.mT if tall else matrices).to(torch.bfloat16 if fast else torch.float32)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _placed_as(whole: Tensor, p: Tensor) -> Tensor:
    """A whole tensor that every process has, sharded as a parameter is."""
    if isinstance(p, DTensor):
        return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
    return whole
