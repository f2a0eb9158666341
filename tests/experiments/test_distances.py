"""Distances of Gaussians against POT and closed forms."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch

from experiments.common.distances import bures_wasserstein2


def test_against_pot() -> None:
    a, b = (root @ root.T for root in torch.randn(2, 6, 6, dtype=torch.float64))
    zero = np.zeros(6)
    exact = ot.gaussian.bures_wasserstein_distance(zero, zero, a.numpy(), b.numpy())
    assert bures_wasserstein2(a, b) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("epsilon", [1e-2, 1e-6])
def test_of_a_singular_covariance_and_one_nearby(epsilon: float) -> None:
    """They commute, so W2² = Σ (√(λ + ε) - √λ)²."""
    root = torch.randn(50, 8, dtype=torch.float64)
    a = root @ root.T
    values = torch.linalg.eigvalsh(a).clamp_min(0)
    exact = ((values + epsilon).sqrt() - values.sqrt()).square().sum().sqrt().item()
    found = bures_wasserstein2(a + epsilon * torch.eye(50, dtype=torch.float64), a)
    assert found == pytest.approx(exact, rel=1e-3)
