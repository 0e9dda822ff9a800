import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from qlip.eval.interval import NUM_RESAMPLES, mean_of


@pytest.mark.parametrize("counted", [False, True], ids=["mean", "ratio"])
def test_interval_equals_scipys(counted):
    """Other resamples than ours, so within what 1,000 of them leave open."""
    rng = np.random.default_rng(1)
    values, counts = rng.exponential(2, 300), rng.integers(1, 6, 300)
    data, statistic = (values,), lambda x, axis: x.mean(axis)
    if counted:
        data, statistic = (values, counts), lambda x, n, axis: x.sum(axis) / n.sum(axis)
    expected = bootstrap(
        data, statistic, paired=counted, n_resamples=20_000, method="percentile", rng=2, vectorized=True
    ).confidence_interval
    found = mean_of(torch.tensor(values), torch.tensor(counts) if counted else None)
    width = expected.high - expected.low
    assert found.value == pytest.approx(values.sum() / (counts.sum() if counted else 300), rel=1e-12)
    assert found.low == pytest.approx(expected.low, abs=0.06 * width)
    assert found.high == pytest.approx(expected.high, abs=0.06 * width)
    assert found == mean_of(torch.tensor(values), torch.tensor(counts) if counted else None)  # seeded


def test_the_percentiles_are_those_of_the_resamples():
    values = torch.arange(7.0)
    rng = np.random.default_rng(0)
    means = [values.numpy()[rng.integers(0, 7, 7)].mean() for _ in range(NUM_RESAMPLES)]
    found = mean_of(values)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, (2.5, 97.5))))


def test_equal_values_have_no_spread():
    assert mean_of(torch.ones(5)) == mean_of(torch.ones(9)) and mean_of(torch.ones(5)).high == 1.0
