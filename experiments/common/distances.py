"""Distances between samples."""

from __future__ import annotations

import torch
from torch import Tensor


def wasserstein2(x: Tensor, y: Tensor) -> float:
    """Compute W2 of two empirical distributions, `[n, *event]` and `[m, *event]`, by exact optimal transport."""
    import ot  # here alone: it imports every array library there is, and the benchmarks of a card need no distance

    x, y = x.flatten(1).double().cpu(), y.flatten(1).double().cpu()
    costs = ot.dist(x.numpy(), y.numpy(), metric="sqeuclidean")
    return float(ot.emd2([], [], costs, numItermax=10_000_000)) ** 0.5


def bures_wasserstein2(a: Tensor, b: Tensor) -> float:
    """Compute W2 of two Gaussians with equal means and covariances A, B, singular or not.

    √tr(A + B - 2 (A^½ B A^½)^½).
    """
    # The singular values of A^½ B^½, without the squares under the root: they keep twice the digits.
    cross = torch.linalg.svdvals(_root(a) @ _root(b)).sum()
    return max(0.0, (a.trace() + b.trace() - 2 * cross).item()) ** 0.5


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T
