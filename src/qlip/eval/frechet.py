"""The Fréchet distance of two sets of pictures: of the Gaussians fitted to their features (Heusel et al. 2017).

What the features are makes the number: only with those of the standard Inception network is it called FID.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlip.errors import InputError


@dataclass
class Statistics:
    """Mean and covariance of features, streamed in float64.

    Sums are kept, not features: of D numbers a picture D² remain, whatever the number of pictures.

    Attributes:
        count: of pictures.
        total: (D,), their sum.
        products: (D, D), the sum of outer products.
    """

    count: int
    total: Tensor
    products: Tensor

    @classmethod
    def empty(cls, num_features: int) -> "Statistics":
        """Of no pictures."""
        zeros = torch.zeros(num_features, num_features, dtype=torch.float64)
        return cls(0, zeros[0].clone(), zeros)

    def add(self, features: Tensor) -> None:
        """Take in the features (B, D) of some pictures."""
        features = features.cpu().double()
        self.count += len(features)
        self.total += features.sum(0)
        self.products += features.T @ features

    def merge(self, other: "Statistics") -> "Statistics":
        """Of both sets together."""
        return Statistics(self.count + other.count, self.total + other.total, self.products + other.products)

    @property
    def mean(self) -> Tensor:
        """(D,)."""
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(D, D), unbiased."""
        return (self.products - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """‖μ_a − μ_b‖² + Tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½).

    The trace of the root is that of (Σ_a^½ Σ_b Σ_a^½)^½, which is symmetric, so that its eigenvalues are real even
    where there are fewer pictures than features.

    Raises:
        InputError: a set has fewer than two pictures.
    """
    if min(a.count, b.count) < 2:
        raise InputError(f"a Fréchet distance needs two pictures at least, not {min(a.count, b.count)}")
    cov_a, cov_b = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * shared
    return float(distance.clamp(min=0))
