"""Distances between samples."""

from __future__ import annotations

import ot
import torch
from torch import Tensor


def wasserstein2(x: Tensor, y: Tensor) -> float:
    """W2 of two samples as empirical distributions, by exact optimal transport: `[n, *event]` and `[m, *event]`."""
    x, y = x.flatten(1).double().cpu(), y.flatten(1).double().cpu()
    costs = ot.dist(x.numpy(), y.numpy(), metric="sqeuclidean")
    return float(ot.emd2([], [], costs, numItermax=10_000_000)) ** 0.5


def bures_wasserstein2(a: Tensor, b: Tensor) -> float:
    """W2² of two Gaussians of one mean and covariances A, B, also singular ones: tr(A + B - 2 (A^½ B A^½)^½)."""
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()
    return max(0.0, (a.trace() + b.trace() - 2 * cross).item())
