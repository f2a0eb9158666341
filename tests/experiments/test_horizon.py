"""Sec. D.1.1, D.2: mode crossing, the loss at a fixed horizon, fits, and the smoke run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.common.mixture import GaussianMixture, triangle_means
from experiments.common.run import Run
from experiments.horizon import experiment as horizon
from experiments.horizon.estimates import (
    AtHorizon,
    autocorrelation,
    cross_modes,
    fit_exponential,
    loss_at,
    nearest_mode,
    relative_band,
    residual,
    share_beyond,
)
from experiments.horizon.measure import Config, make_field, measure_curves

ORIGIN = torch.zeros(1, 2, dtype=torch.float64)
MATRIX = torch.tensor([[0.3, 1.0], [-0.4, 0.1]], dtype=torch.float64)
SYMMETRIC = (MATRIX + MATRIX.T) / 2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(sigma: float) -> tuple[object, float]:
    """f = s + U x / σ² on N(0, σ² I): 2 σ⁴ E[r_0 r_τ] = 4 ‖(U + Uᵀ)/2‖²_F e^{-2τ} (second Hermite functions)."""
    return (lambda x: (x @ MATRIX.T - x) / sigma**2), 4 * SYMMETRIC.square().sum().item()


def test_nearest_mode_by_hand() -> None:
    means = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    x = torch.tensor([[1.9, 0.0], [2.1, 0.0], [0.5, 2.2], [-9.0, -9.0]])
    assert nearest_mode(x, means).tolist() == [0, 1, 2, 0]


def test_chains_stay_at_low_noise_and_forget_at_high_noise() -> None:
    means = triangle_means(8.0)
    low = cross_modes(means, 0.01, 4.0, 20, 300, generator(), "torch")
    assert low.share == 0
    assert (low.end.unsqueeze(-2) - means).norm(dim=-1).amin(-1).max() < 0.06
    # With three equally likely modes, an end independent of its start lies elsewhere in 2 of 3 cases.
    n = 1500
    high = cross_modes(means, 80.0, 12.0, 50, n, generator(), "torch")
    assert high.crossed.shape == (n,)
    assert abs(high.share - 2 / 3) < 5 * math.sqrt(2 / 9 / n)


@pytest.mark.parametrize("sigma", [0.1, 7.0])
@pytest.mark.parametrize("estimator", ["cross_chain", "single_chain"])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.5])
def test_loss_of_a_gaussian_decays_like_its_closed_form(sigma: float, estimator: str, tau: float) -> None:
    field, amplitude = linear(sigma)
    losses = loss_at(
        AtHorizon(field, ORIGIN, sigma, tau),
        estimator=estimator, batch=64, minibatches=100, generator=generator(1), backend="torch",
    )  # fmt: skip
    assert losses.shape == (100,)
    error = losses.std().item() / 10
    expected = amplitude * math.exp(-2 * tau)
    assert error < 0.1 * expected
    assert abs(losses.mean().item() - expected) < 4 * error


def test_autocorrelation_of_a_gaussian_equals_its_closed_form() -> None:
    field, amplitude = linear(2.0)
    taus = (0.0, 0.5, 1.5)
    values, errors = autocorrelation(field, ORIGIN, 2.0, taus, 20_000, generator(2), "torch")
    for tau, value, error in zip(taus, values, errors, strict=True):
        assert error < 0.05 * amplitude
        assert abs(value - amplitude * math.exp(-2 * tau)) < 4 * error


def test_loss_equals_the_autocorrelation_on_the_mixture() -> None:
    means, sigma, tau = triangle_means(8.0), 3.0, 0.5
    field = make_field("edm", sigma)
    values, errors = autocorrelation(field, means, sigma, (tau,), 20_000, generator(3), "torch")
    losses = loss_at(
        AtHorizon(field, means, sigma, tau),
        estimator="single_chain", batch=256, minibatches=100, generator=generator(4), backend="torch",
    )  # fmt: skip
    error = math.hypot(losses.std().item() / 10, errors[0])
    assert error < 0.1 * values[0]
    assert abs(losses.mean().item() - values[0]) < 4 * error


@pytest.mark.parametrize("tau", [0.5, 8.0])
def test_loss_of_the_score_is_zero(tau: float) -> None:
    means = triangle_means(8.0)
    losses = loss_at(
        AtHorizon(GaussianMixture(means, 9.0).score, means, 3.0, tau),
        estimator="cross_chain", batch=32, minibatches=3, generator=generator(), backend="torch",
    )  # fmt: skip
    assert losses.abs().max() < 1e-12


def test_residual_of_a_linear_field() -> None:
    x = torch.randn(20, 2, dtype=torch.float64, generator=generator())
    normal = GaussianMixture(ORIGIN, 4.0)
    field, _ = linear(2.0)
    expected = (MATRIX.trace() - (x @ MATRIX.T * x).sum(-1) / 4) / 4
    torch.testing.assert_close(residual(field, normal, x), expected)


def test_tilted_field_is_the_score_of_unequal_weights() -> None:
    x = (9 * torch.randn(20, 2, dtype=torch.float64, generator=generator())).requires_grad_()
    squares = (x.unsqueeze(-2) - triangle_means(8.0)).square().sum(-1)
    log_p = (torch.tensor([0.6, 0.2, 0.2]).double().log() - squares / 18).logsumexp(-1)
    (score,) = torch.autograd.grad(log_p.sum(), x)
    torch.testing.assert_close(make_field("tilted", 3.0)(x.detach()), score, rtol=1e-6, atol=1e-8)


def test_untrained_fields_by_hand() -> None:
    x = torch.tensor([[2.0, -4.0]])
    torch.testing.assert_close(make_field("edm", 3.0)(x), x / -(9 + 32))
    assert not make_field("zero", 3.0)(x).any()


def test_fit_finds_the_rate_and_drops_what_is_noise() -> None:
    tau = np.linspace(0, 8, 17)
    mean = 5 * np.exp(-1.3 * tau)
    mean[0], mean[6] = 100.0, -1.0  # outside the range, and not above zero
    fit = fit_exponential(tau, mean, np.full(17, 1e-6), 0.25, 4.0)
    assert fit.rate == pytest.approx(1.3)
    assert fit.r_squared == pytest.approx(1)
    # Against x = 0, 1, 2 the logarithms 0, 2, 1 have the line 1/2 + x/2: 3/2 of a sum of squares of 2 is left over.
    bent = fit_exponential(np.arange(3.0), np.exp([0.0, 2.0, 1.0]), np.zeros(3), 0.0, 4.0)
    assert bent.rate == pytest.approx(-0.5)
    assert bent.r_squared == pytest.approx(0.25)
    assert math.isnan(fit_exponential(tau, mean, np.full(17, 10.0), 0.25, 4.0).rate)


def test_share_and_band_by_hand() -> None:
    tau = np.array([0.0, 2.0, 4.0, 8.0])
    mean = np.array([4.0, 2.0, 1.0, 0.0])
    assert share_beyond(tau, mean, 4.0) == pytest.approx(2 / 11)
    assert relative_band(tau, mean, np.array([1.0, 1.0, 1.0, 99.0]), 4.0) == pytest.approx(4 / 9)


def test_horizons_contain_the_cut_and_end_at_twice_it() -> None:
    taus = Config().taus
    assert taus[:2] == (0.0, 0.25)
    assert taus[-2:] == (7.5, 8.0)
    assert taus.count(4.0) == 1
    assert list(taus) == sorted(taus)


@pytest.mark.parametrize(
    ("change", "name"),
    [({"sigmas": (1.0,)}, "sigmas"), ({"sigmas": (0.01, 3.0, 80.0, 0.0)}, "sigmas"), ({"spacing": 0.3}, "spacing"),
     ({"minibatches": 1}, "minibatches")],
)  # fmt: skip
def test_config_names_the_field_it_refuses(change: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Config(**change)  # type: ignore[arg-type]


def make_run(out: Path, **overrides: object) -> Run:
    experiment = horizon.EXPERIMENT
    config = dataclasses.replace(experiment.presets["smoke"], **overrides)
    return Run(experiment, "smoke", config, "torch", torch.device("cpu"), 0, out, progress=False)


def test_smoke_run_writes_rows_figures_and_summary(finished: Run) -> None:
    taus = len(finished.config.taus)
    assert len(finished.rows("loss")) == (2 * 2 * 3 + 1) * taus
    assert len(finished.rows("autocorrelation")) == 4 * taus
    assert [row["sigma"] for row in finished.rows("crossing")] == [0.01, 3.0, 80.0]
    for name in ("figure16", "decay", "variance", "tail"):
        assert (finished.out / "figures" / f"{name}.png").stat().st_size > 10_000
    assert finished.results[0].passed


@pytest.mark.usefixtures("unpainted")
def test_nothing_is_measured_twice(finished: Run) -> None:
    first = (finished.out / "metrics.jsonl").read_bytes()
    (finished.out / "summary.json").unlink()
    horizon.main(make_run(finished.out))
    assert (finished.out / "metrics.jsonl").read_bytes() == first
    assert (finished.out / "summary.json").exists()


def test_interrupted_curves_continue_with_the_same_numbers(tmp_path: Path) -> None:
    sizes = {"batch": 8, "minibatches": 2, "spacing": 0.5}
    measure_curves(make_run(tmp_path, **sizes))
    file = tmp_path / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(b"".join(whole.splitlines(keepends=True)[:30]))
    measure_curves(make_run(tmp_path, **sizes))
    assert file.read_bytes() == whole


def test_minibatches_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    # In blocks or all at once: one number per minibatch, and no two of them equal.
    monkeypatch.setattr("experiments.horizon.estimates.GROUP", 4)
    field, _ = linear(1.0)
    losses: Tensor = loss_at(
        AtHorizon(field, ORIGIN, 1.0, 0.5),
        estimator="cross_chain", batch=8, minibatches=10, generator=generator(), backend="torch",
    )  # fmt: skip
    assert len(losses.unique()) == 10
