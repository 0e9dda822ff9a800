"""How much reconstruction weighs against alignment.

Their gradients differ by two to three orders of magnitude (the paper's Figure 5). The paper's rule
(docs/paper.md section 2): train with each loss alone, then α_r/α_a ≈ L_align(∞)/L_mse(∞); `qlip calibrate` does
that. `Balance` measures the gradients themselves instead, now and then, as VQGAN does at every step.
"""

from pathlib import Path

import torch

from qlip.errors import InputError
from qlip.guarded import read_object, typed
from qlip.train.caching import Terms

LIMIT_SHARE = 0.1


class Balance:
    """Running means of two gradient norms.

    Attributes:
        state: the means by name, live tensors, for checkpoints; 0 before the first measurement.
    """

    def __init__(self, smoothing: float, device: torch.device):
        """Start with nothing measured.

        Args:
            smoothing: share of the old mean that an update keeps, in [0, 1).
            device: of the state.
        """
        self.smoothing = smoothing
        self.state = {name: torch.zeros((), device=device) for name in ("alignment", "reconstruction")}

    def measured(self) -> bool:
        """Whether there is a ratio yet."""
        return bool(self.state["reconstruction"] > 0)

    def after(self, norms: Terms) -> Terms:
        """The means with one more measurement; one that is not finite, or is 0, is passed over."""
        if not all(bool(norm.isfinite()) and bool(norm > 0) for norm in norms.values()):
            return self.state
        keep = self.smoothing if self.measured() else 0.0
        return {name: keep * self.state[name] + (1 - keep) * norm for name, norm in norms.items()}

    def update(self, means: Terms) -> None:
        """Take over what `after` gave."""
        for name, mean in means.items():
            self.state[name].copy_(mean)


def ratio(means: Terms) -> float:
    """α_r/α_a that makes both losses' gradients equally long; 0 before the first measurement."""
    return float(means["alignment"] / means["reconstruction"]) if means["reconstruction"] > 0 else 0.0


def loss_limit(points: list[tuple[int, float]]) -> float:
    """L(∞) of a run, estimated as the mean over its last tenth.

    Args:
        points: (step, loss).

    Raises:
        InputError: there are none, or the end is not a positive number.
    """
    last = max((step for step, _ in points), default=0)
    values = [value for step, value in points if step > last * (1 - LIMIT_SHARE)]
    limit = sum(values) / len(values) if values else 0.0
    if not 0 < limit < float("inf"):
        raise InputError(f"the run ends at a loss of {limit}, from which no weight follows: train it longer")
    return limit


def read_calibration(path: Path) -> float:
    """α_r/α_a from the file that `qlip calibrate` wrote.

    Raises:
        InputError: it is missing or is no such file.
    """
    try:
        ratio = typed(float, read_object(path).get("ratio"), "ratio")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a calibration ({error}): write it with `qlip calibrate`") from error
    if not 0 < ratio < float("inf"):
        raise InputError(f"{path}: its ratio is {ratio}, which must be positive: run `qlip calibrate` again")
    return ratio
