"""The exact Gaussian mixture against torch.distributions, autograd and the moments of its samples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from experiments.common.mixture import GaussianMixture, triangle_means


@pytest.fixture(params=[(3, 2), (1, 1), (5, 7)], ids=lambda shape: f"K{shape[0]}-D{shape[1]}")
def mixture(request: pytest.FixtureRequest) -> GaussianMixture:
    means = torch.randn(request.param, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return GaussianMixture(2 * means, 0.3)


def points(mixture: GaussianMixture, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, mixture.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_log_density_equals_that_of_torch_distributions(mixture: GaussianMixture) -> None:
    components = Independent(Normal(mixture.means, math.sqrt(mixture.variance)), 1)
    reference = MixtureSameFamily(Categorical(torch.ones(len(mixture.means))), components)
    x = points(mixture, 4, 6)
    torch.testing.assert_close(mixture.log_density(x), reference.log_prob(x), rtol=1e-7, atol=0)


def test_score_is_the_gradient_of_the_log_density(mixture: GaussianMixture) -> None:
    x = points(mixture, 4, 6).requires_grad_(True)
    (gradient,) = torch.autograd.grad(mixture.log_density(x).sum(), x)
    torch.testing.assert_close(mixture.score(x), gradient, rtol=1e-10, atol=1e-12)


def test_jet_starts_with_the_log_density_and_the_score(mixture: GaussianMixture) -> None:
    x = points(mixture, 6)
    jet = mixture.log_jet(x.T)
    torch.testing.assert_close(jet.value[0], mixture.log_density(x), rtol=1e-13, atol=0)
    torch.testing.assert_close(jet.gradient[:, 0].T, mixture.score(x), rtol=1e-12, atol=1e-13)


def test_far_out_only_the_nearest_component_counts() -> None:
    mixture = GaussianMixture(triangle_means(2.3), 0.625)
    x = torch.tensor([0.0, 100.0], dtype=torch.float64)
    expected = torch.tensor([0.0, (2.3 - 100) / 0.625], dtype=torch.float64)
    torch.testing.assert_close(mixture.score(x), expected, rtol=1e-12, atol=1e-12)
    assert mixture.log_density(x).isfinite()


def test_samples_have_the_moments_of_the_mixture() -> None:
    mixture = GaussianMixture(triangle_means(2.3) + 1, 0.625)
    n = 200_000
    x = mixture.sample(n, torch.Generator().manual_seed(3))
    # For an equilateral triangle the means' covariance is radius²/2 I.
    variance = 0.625 + 2.3**2 / 2
    assert (x.mean(0) - 1).abs().max() < 5 * math.sqrt(variance / n)
    assert (x.T.cov() - variance * torch.eye(2)).abs().max() < 5 * variance * math.sqrt(2 / n)


def test_a_generator_fixes_the_samples() -> None:
    mixture = GaussianMixture(triangle_means(1.0), 0.1)
    one, two, other = (mixture.sample(5, torch.Generator().manual_seed(seed)) for seed in (4, 4, 5))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_sample_means_picks_every_component_equally_often() -> None:
    mixture = GaussianMixture(triangle_means(2.0), 0.1)
    picked = mixture.sample_means((300, 100), torch.Generator().manual_seed(6))
    counts = (picked.unsqueeze(-2) == mixture.means).all(-1).sum((0, 1))
    assert picked.shape == (300, 100, 2)
    assert counts.sum() == 30_000
    assert (counts - 10_000).abs().max() < 5 * math.sqrt(30_000 * 2 / 9)


def test_triangle_is_equilateral_and_counterclockwise_from_the_top() -> None:
    v = triangle_means(2.3)
    torch.testing.assert_close(v[0], torch.tensor([0.0, 2.3], dtype=torch.float64))
    torch.testing.assert_close((v - v.roll(1, 0)).norm(dim=-1), torch.full((3,), 2.3 * 3**0.5, dtype=torch.float64))
    a, b = v[1] - v[0], v[2] - v[0]
    assert a[0] * b[1] - a[1] * b[0] > 0


@pytest.mark.parametrize(
    ("means", "variance", "name"),
    [(torch.zeros(3), 1.0, "means"), (torch.zeros(0, 2), 1.0, "means"), (torch.zeros(1, 2), 0.0, "variance")],
)
def test_bad_arguments_are_named(means: Tensor, variance: float, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        GaussianMixture(means, variance)
