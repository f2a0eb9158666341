"""Tests of the best linear fields under a causal mask against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from experiments.common.distances import bures_wasserstein2
from experiments.springs import linear
from experiments.springs.sampling import euler_flow
from fluxmatching import exponential_schedule, reverse_ve

BLOCK = 2


@pytest.fixture
def covariance() -> torch.Tensor:
    root = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return root @ root.T + 0.1 * torch.eye(8, dtype=torch.float64)


def later(matrix: torch.Tensor) -> torch.Tensor:
    """The entries that the mask forbids: those by which a time point sees a later one."""
    blocks = torch.arange(len(matrix)) // BLOCK
    return matrix[blocks[:, None] < blocks]


def test_flux_preserves_the_gaussian_and_sees_only_the_past(covariance: torch.Tensor) -> None:
    matrix = linear.flux_matrix(covariance, BLOCK)
    torch.testing.assert_close(
        matrix @ covariance + covariance @ matrix.T, 2 * torch.eye(8, dtype=torch.float64), atol=1e-10, rtol=0
    )
    assert later(matrix).abs().max() < 1e-10


def test_score_matching_takes_the_projection(covariance: torch.Tensor) -> None:
    """Normal equations of least squares on the past, row by row: E (f - s)(x) x_pastᵀ = 0."""
    matrix = linear.dsm_matrix(covariance, BLOCK)
    assert later(matrix).abs().max() == 0
    correlation = (matrix - linear.score_matrix(covariance, BLOCK)) @ covariance
    blocks = torch.arange(8) // BLOCK
    assert correlation[blocks[:, None] >= blocks].abs().max() < 1e-10
    assert (matrix @ covariance + covariance @ matrix.T - 2 * torch.eye(8)).abs().max() > 0.1


def test_sampler_by_simulation(covariance: torch.Tensor) -> None:
    sigmas = exponential_schedule(12, 0.1, 10.0)
    exact = linear.generated(linear.flux_matrix, covariance, BLOCK, sigmas)
    generator = torch.Generator().manual_seed(1)
    start = sigmas[0] * torch.randn(200_000, 8, generator=generator, dtype=torch.float64)

    def field(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return -x @ linear.flux_matrix(linear.noised(covariance, float(sigma)), BLOCK).T

    x = reverse_ve(field, start, sigmas, generator=generator)
    torch.testing.assert_close(x.T.cov(), exact, rtol=0.03, atol=0.03 * float(exact.diag().max()))


def test_eulers_probability_flow_by_its_linear_map(covariance: torch.Tensor) -> None:
    sigmas = exponential_schedule(12, 0.1, 10.0)
    exact = linear.generated(linear.flux_matrix, covariance, BLOCK, sigmas, "ode")

    def field(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return -x @ linear.flux_matrix(linear.noised(covariance, float(sigma)), BLOCK).T

    images = euler_flow(field, torch.eye(8, dtype=torch.float64), sigmas)  # of the unit vectors, as rows
    torch.testing.assert_close(100 * images.T @ images, exact)


def test_eulers_steps_are_those_of_the_flow_in_log_sigma() -> None:
    """dx/d(log σ) = -σ² f with f = -x/σ²: x_K = x_0 (1 - log(σ_0/σ_K)/K)^K."""
    sigmas = exponential_schedule(50, 0.5, 8.0)
    found = euler_flow(lambda x, sigma: -x / sigma**2, torch.ones(1, 3, dtype=torch.float64), sigmas)
    assert found[0].tolist() == pytest.approx([(1 - math.log(16) / 50) ** 50] * 3)
    assert found[0, 0] == pytest.approx(1 / 16, rel=0.1)  # the flow itself


def test_many_steps_make_the_data_unless_score_matching_is_masked(covariance: torch.Tensor) -> None:
    sigmas = exponential_schedule(4000, 1e-3, 100.0)
    distances = {
        name: bures_wasserstein2(linear.generated(field, covariance, BLOCK, sigmas), covariance)
        for name, field in linear.FIELDS.items()
    }
    assert distances[linear.SCORE] < 0.02
    assert distances[linear.FLUX] < 0.02
    assert distances[linear.DSM] > 0.3


def test_size_of_an_isotropic_score_is_one() -> None:
    covariance = 4 * torch.eye(6, dtype=torch.float64)
    assert linear.size(linear.score_matrix(covariance, 2), covariance, 2.0) == pytest.approx(1)
