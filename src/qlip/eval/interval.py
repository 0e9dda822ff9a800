"""How far a mean over pictures would move, had other pictures of the same kind been drawn."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

NUM_RESAMPLES = 1000
SEED = 0


@dataclass(frozen=True)
class Number:
    """A number that was measured.

    Attributes:
        value: of all pictures.
        low, high: 95 % of resampled data sets give a value between them; None where pictures have no values of
            their own to resample.
        stderr: the standard error, where the protocol has one.
    """

    value: float
    low: float | None = None
    high: float | None = None
    stderr: float | None = None


def mean_of(values: Tensor, counts: Tensor | None = None) -> Number:
    """The mean, with its bootstrap interval (Efron 1979; the percentile method).

    Pictures are drawn with replacement, as many as there are, 1,000 times, from a fixed seed: all columns of one
    data set are resampled alike.

    Args:
        values: (n,), a picture's value, or the sum of its values.
        counts: (n,), how many values a picture has; 1 by default.
    """
    sums = values.double().numpy()
    weights = np.ones_like(sums) if counts is None else counts.double().numpy()
    rng = np.random.default_rng(SEED)
    means = np.empty(NUM_RESAMPLES)
    for i in range(NUM_RESAMPLES):
        drawn = rng.integers(0, len(sums), len(sums))
        means[i] = sums[drawn].sum() / weights[drawn].sum()
    low, high = np.percentile(means, (2.5, 97.5))
    return Number(float(sums.sum() / weights.sum()), float(low), float(high))
