"""Horizon distributions: quantiles invert the density, learned rates find the loss's own shape."""

import pytest
import torch
from torch import Tensor

from fluxmatching import Horizon, LearnedHorizon, TruncatedExponentialHorizon, UniformHorizon

SIGMA = torch.tensor(0.3, dtype=torch.float64)
ALL = [
    UniformHorizon(),
    UniformHorizon(2.0),
    *(TruncatedExponentialHorizon(r) for r in (1e-9, 1e-5, 2.4e-5, 2.6e-5, 0.1, 1.0, 30.0)),
    LearnedHorizon(),
]


@pytest.mark.parametrize("horizon", ALL, ids=lambda h: f"{type(h).__name__}")
def test_density_and_quantile(horizon: Horizon) -> None:
    horizon = horizon.double()
    tau = torch.linspace(0, horizon.tau_max, 200_001, dtype=torch.float64)
    density = horizon.log_density(tau, SIGMA).detach().exp()
    mass = torch.cumulative_trapezoid(density, tau)
    assert mass[-1].item() == pytest.approx(1, abs=1e-6)
    uniform = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    quantile = horizon.quantile(uniform, SIGMA)
    assert quantile[0] == 0
    assert quantile[-1].item() == pytest.approx(horizon.tau_max)
    at_quantile = mass[(quantile[1:-1] / horizon.tau_max * 200_000).round().long() - 1]
    one_cell = density.max().item() * (tau[1] - tau[0]).item()
    torch.testing.assert_close(at_quantile, uniform[1:-1], rtol=0, atol=one_cell)


def test_no_density_outside_of_the_support() -> None:
    outside = torch.tensor([-0.1, 4.1])
    assert (UniformHorizon().log_density(outside) == -torch.inf).all()


def test_small_rates_join_the_uniform_distribution_smoothly() -> None:
    """Both sides of the switch of formula, in float64: no jump above second order in λ."""
    u, tau = torch.tensor(0.3, dtype=torch.float64), torch.tensor(1.7, dtype=torch.float64)
    below, above = (TruncatedExponentialHorizon(r).double() for r in (2.4999e-5, 2.5001e-5))
    assert abs(below.quantile(u) - above.quantile(u)).item() < 1e-8
    assert abs(below.log_density(tau) - above.log_density(tau)).item() < 1e-8


def test_rate_is_what_was_asked_for() -> None:
    for rate in (1e-3, 1.0, 40.0):
        h = TruncatedExponentialHorizon(rate)
        assert h.rate(None, torch.ones(())).item() == pytest.approx(rate, rel=1e-4)
        assert list(h.parameters()) == []  # a fixed rate is a number, not a parameter
    assert TruncatedExponentialHorizon(1.0, learned=True).raw_rate.requires_grad


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_rate(rate: float) -> None:
    with pytest.raises(ValueError, match="rate must be a positive number"):
        TruncatedExponentialHorizon(rate)


def test_learned_scalar_finds_the_loss_decay() -> None:
    """Losses e^{-3τ}/q: Eq. 50 is least at λ = 3 (τ_max cuts both alike)."""
    h = TruncatedExponentialHorizon(0.5, learned=True).double()
    optimizer = torch.optim.Adam(h.parameters(), lr=0.05)
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    for _ in range(400):
        tau = h.quantile(u)
        loss = torch.exp(-3 * tau) / h.log_density(tau).detach().exp()
        optimizer.zero_grad()
        h.fit_loss(tau, loss).mean().backward()
        optimizer.step()
    assert h.rate(None, u).item() == pytest.approx(3.0, rel=0.01)


def test_learned_horizon_depends_on_sigma_and_stays_above_one() -> None:
    h = LearnedHorizon()
    sigmas = torch.logspace(-3, 2, 20)
    rates = h.rate(sigmas, sigmas)
    assert rates.shape == sigmas.shape
    assert (rates > 1).all()
    assert rates.unique().numel() > 10
    with pytest.raises(ValueError, match="needs sigma"):
        h.quantile(torch.tensor(0.5))


def test_fit_loss_reaches_the_rate_alone() -> None:
    h = LearnedHorizon()
    loss = torch.ones(5, requires_grad=True)
    tau: Tensor = h.quantile(torch.tensor(0.4), torch.tensor(1.0))
    h.fit_loss(tau, loss, torch.tensor(1.0)).sum().backward()
    assert loss.grad is None
    assert all(p.grad is not None for p in h.parameters())
