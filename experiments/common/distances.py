"""Distances between samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def wasserstein2(x: Tensor, y: Tensor) -> float:
    """Compute W2 of two empirical distributions, `[n, *event]` and `[m, *event]`, by exact optimal transport."""
    import ot  # here alone: it imports every array library there is, and the benchmarks of a card need no distance

    x, y = x.flatten(1).double().cpu(), y.flatten(1).double().cpu()
    costs = ot.dist(x.numpy(), y.numpy(), metric="sqeuclidean")
    return float(ot.emd2([], [], costs, numItermax=10_000_000)) ** 0.5


def sliced_wasserstein2(x: Tensor, y: Tensor, directions: Tensor) -> float:
    """Compute √D times the root mean square over directions of W2 between projections of x and y.

    The factor makes it the distance of the means, for two samples that differ by a shift in all directions.

    Args:
        x, y: samples, `[n, D]` and `[m, D]`.
        directions: unit vectors, `[K, D]`.
    """
    return sliced_difference(projected_quantiles(x, directions), projected_quantiles(y, directions), x.shape[-1])


def projected_quantiles(x: Tensor, directions: Tensor) -> Tensor:
    """Compute 1000 quantiles of the projections of x `[n, D]` on directions `[K, D]`, `[1000, K]`."""
    grid = (torch.arange(1000, device=x.device).double() + 0.5) / 1000
    return torch.quantile(directions @ x.double().T, grid, dim=1)


def sliced_difference(x: Tensor, y: Tensor, dim: int) -> float:
    """Compute the sliced W2 of samples in `dim` dimensions from their `projected_quantiles`."""
    return math.sqrt(dim * (x - y).square().mean().item())


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
