"""Autocorrelation times against processes whose time is known."""

import pytest
import torch

from experiments.common.autocorrelation import integrated_autocorrelation_time


@pytest.mark.parametrize(("memory", "window"), [(0.0, 5.0), (0.5, 5.0), (0.9, 5.0), (-0.5, 10.0)])
def test_autoregressive_process(memory: float, window: float) -> None:
    """x ← ρx + ξ has the time (1+ρ)/(1-ρ); below 1 where steps are antithetic."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, generator=generator) / (1 - memory**2) ** 0.5
    path = []
    for _ in range(4000):
        x = memory * x + torch.randn(200, generator=generator)
        path.append(x + 7.0)
    exact = (1 + memory) / (1 - memory)
    assert integrated_autocorrelation_time(torch.stack(path), window) == pytest.approx(exact, rel=0.03)


def test_chains_that_are_too_short() -> None:
    walk = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)).cumsum(0)
    with pytest.raises(ValueError, match="chains of 200 steps are too short"):
        integrated_autocorrelation_time(walk)


def test_values_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match="values must be finite"):
        integrated_autocorrelation_time(torch.full((100, 2), torch.nan))
