"""Distances between samples."""

from __future__ import annotations

import ot
from torch import Tensor


def wasserstein2(x: Tensor, y: Tensor) -> float:
    """W2 of two samples as empirical distributions, by exact optimal transport: `[n, *event]` and `[m, *event]`."""
    x, y = x.flatten(1).double().cpu(), y.flatten(1).double().cpu()
    costs = ot.dist(x.numpy(), y.numpy(), metric="sqeuclidean")
    return float(ot.emd2([], [], costs, numItermax=10_000_000)) ** 0.5
