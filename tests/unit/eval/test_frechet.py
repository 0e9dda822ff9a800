import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from qlip.errors import InputError
from qlip.eval.frechet import Statistics, frechet_distance


def features(seed, count, size=12):
    """Correlated, far from mean 0."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(
        rng.normal(size=(count, size)) @ rng.normal(size=(size, size)) + 3 * rng.normal(size=size)
    )


def statistics(rows, parts=3):
    found = Statistics.empty(rows.shape[1])
    for part in rows.tensor_split(parts):
        found.add(part)
    return found


class Given(torch.nn.Module):
    """A feature extractor of pictures that are features already."""

    num_features = 12

    def forward(self, x):
        return x.flatten(1)


@pytest.mark.parametrize("count", [200, 12])  # singular, too: 12 vectors span 11 dimensions
def test_distance_equals_torchmetrics_and_scipys(count):
    a, b = features(0, count), features(1, count)
    ours = frechet_distance(statistics(a), statistics(b))
    metric = FrechetInceptionDistance(Given(), input_img_size=(12, 1, 1)).set_dtype(torch.float64)
    metric.update(a[:, :, None, None], real=True)
    metric.update(b[:, :, None, None], real=False)
    assert ours == pytest.approx(metric.compute().item(), rel=1e-4)
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    difference = (a.mean(0) - b.mean(0)).square().sum().item()
    assert ours == pytest.approx(difference + np.trace(cov_a + cov_b - 2 * root), rel=1e-5)


def test_streamed_statistics_are_those_of_all_features():
    rows = features(2, 50)
    found = statistics(rows[:20]).merge(statistics(rows[20:], parts=2))
    assert found.count == 50
    torch.testing.assert_close(found.mean, rows.mean(0))
    torch.testing.assert_close(found.covariance, torch.from_numpy(np.cov(rows.numpy().T)))


def test_the_same_pictures_have_no_distance():
    assert frechet_distance(statistics(features(3, 40)), statistics(features(3, 40), parts=5)) < 1e-9


def test_one_picture_is_refused():
    with pytest.raises(InputError, match="two pictures"):
        frechet_distance(statistics(features(0, 1), 1), statistics(features(1, 5)))
