"""Likelihoods by the probability flow against densities known in closed form."""

import math
import sys

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from experiments.common.mixture import GaussianMixture, triangle_means
from fluxmatching import ODESolver, bits_per_dim, log_likelihood

F64 = torch.float64
MIXTURE = GaussianMixture(triangle_means(1.8), 0.225)


def noised(sigma: Tensor | float) -> GaussianMixture:
    return GaussianMixture(MIXTURE.means, MIXTURE.variance + float(sigma) ** 2)


def score(z: Tensor, sigma: Tensor) -> Tensor:
    return noised(sigma).score(z)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_anisotropic_gaussian(divergence: str) -> None:
    """With axes of its own the Jacobian is diagonal, and a probe of signs has no variance either."""
    variances = torch.tensor([0.01, 1.0, 4.0], dtype=F64)
    x = variances.sqrt() * torch.randn(30, 3, dtype=F64)
    found = log_likelihood(
        lambda z, sigma: -z / (variances + sigma**2),
        x,
        divergence=divergence,
        sigma_max=300.0,
        solver=ODESolver("dopri5", rtol=1e-7, atol=1e-7),
    )
    spread = variances + 0.002**2
    exact = (-x.square() / (2 * spread) - (2 * math.pi * spread).log() / 2).sum(1)
    torch.testing.assert_close(found, exact, rtol=0, atol=5e-4)  # the prior's own error is Σ v/(2 σ_max²) = 3e-5


def test_mixture() -> None:
    x = MIXTURE.sample(200, torch.Generator().manual_seed(0))
    found = log_likelihood(score, x, divergence="exact", sigma_max=300.0, solver=ODESolver("dopri5"))
    torch.testing.assert_close(found, noised(0.002).log_density(x), rtol=0, atol=1e-3)


def test_a_rotation_does_not_change_the_density() -> None:
    """A circular flux along a Gaussian's level sets has no divergence: the density of the ODE's samples stays."""
    x = torch.randn(20, 2, dtype=F64)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
    found = log_likelihood(
        lambda z, s: -z / (1 + s**2) + 0.5 * z @ turn / (1 + s**2),
        x,
        divergence="exact",
        sigma_max=200.0,
        solver=ODESolver(rtol=1e-6),
    )
    exact = -x.square().sum(1) / 2 - math.log(2 * math.pi)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-3)


def test_hutchinson_is_right_on_average() -> None:
    x = MIXTURE.sample(1, torch.Generator().manual_seed(3))
    options = {"sigma_max": 300.0, "solver": ODESolver(rtol=1e-4, atol=1e-4)}
    exact = log_likelihood(score, x, divergence="exact", **options)
    draws = log_likelihood(score, x.expand(2000, 2), generator=torch.Generator().manual_seed(1), **options)
    assert draws.std() > 0.01  # else this test would say nothing
    assert abs(draws.mean() - exact[0]).item() < 4 * (draws.std() / len(draws) ** 0.5).item() + 1e-3


def test_images_in_single_precision_and_a_network_left_alone() -> None:
    weight = torch.nn.Parameter(torch.ones(()))
    x = 0.5 * torch.randn(4, 3, 2, 2)
    found = log_likelihood(lambda z, s: -weight * z / (0.25 + s**2), x)
    variance = 0.25 + 0.002**2
    exact = (-x.square() / (2 * variance) - math.log(2 * math.pi * variance) / 2).flatten(1).sum(1)
    torch.testing.assert_close(found, exact, rtol=0, atol=2e-2)
    assert weight.requires_grad
    assert weight.grad is None
    assert not found.requires_grad


def test_bits_of_uniform_bytes_are_eight() -> None:
    """256 levels 2/255 apart, equally likely: density (255/512)^D."""
    uniform = torch.full((2,), 3072 * math.log(255 / 512), dtype=F64)
    torch.testing.assert_close(bits_per_dim(uniform, 3072), torch.full((2,), 8.0, dtype=F64))
    torch.testing.assert_close(bits_per_dim(uniform - 3072 * math.log(2), 3072), torch.full((2,), 9.0, dtype=F64))


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 2)
    with pytest.raises(ValueError, match="divergence must be one of 'hutchinson', 'exact', got 'trace'"):
        log_likelihood(score, x, divergence="trace")
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max must hold"):
        log_likelihood(score, x, sigma_min=0.0)
    with pytest.raises(ValueError, match="x must be finite"):
        log_likelihood(score, x * torch.nan)
    with pytest.raises(ValueError, match="dimensions must be a positive integer, got 0"):
        bits_per_dim(torch.ones(1), 0)
    with pytest.raises(ValueError, match=r"method must be one of 'adaptive_heun', .*, got 'leapfrog'"):
        ODESolver("leapfrog")
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match="log_likelihood needs torchdiffeq"):
        log_likelihood(score, x)


def test_fields_without_derivatives_are_refused() -> None:
    """Their divergence would count as zero, and the result be wrong by several nats."""
    x = torch.ones(2, 2)

    @torch.no_grad()
    def quiet(z: Tensor, sigma: Tensor) -> Tensor:
        return score(z, sigma)

    with pytest.raises(RuntimeError, match=r"does not depend on x differentiably; does it use torch.no_grad"):
        log_likelihood(quiet, x)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"does not depend on x differentiably"):
        log_likelihood(lambda z, s: -z / (1 + s**2), x)


def test_a_network_of_fabric_is_called_in_its_precision() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(2, 2)

        def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
            return self.last(z) / sigma

    net, x, found = Network(), torch.randn(4, 2), []
    wrapped = Fabric(accelerator="cpu", precision="bf16-mixed").setup_module(net)
    for field in (wrapped, net):
        torch.manual_seed(0)
        found.append(log_likelihood(field, x, sigma_min=0.5, sigma_max=3.0))
    torch.testing.assert_close(*found, rtol=0, atol=0.03)
    assert not torch.equal(*found)
