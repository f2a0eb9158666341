"""A mixture in the plane and Gaussian trajectories of springs: samples, fields, exact gradients and distances."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Protocol

import torch
from scipy.linalg import solve_continuous_lyapunov
from torch import Tensor, nn

from experiments.common.distances import bures_wasserstein2, wasserstein2
from experiments.common.mixture import GaussianMixture, triangle_means
from experiments.common.networks import FixedLevelField
from experiments.critic.projection import GridProjection
from experiments.critic.stationary import energy_distance, stationary_law
from experiments.springs.simulator import trajectories
from fluxmatching import quadratic_flux_loss, unadjusted_langevin
from fluxmatching.fields import Field

MIXTURE, SPRINGS = NAMES = ("mixture", "springs")
RADIUS, VARIANCE, LEVEL = 1.8, 0.05, 0.7  # of the mixture of `fast_mixing`: means, a component, σ
SPRINGS_LEVEL = 3.0  # below it the density estimate has hardly more than one center
POINTS, EVERY = 50, 5  # of a trajectory: every fifth point is kept
TRAJECTORIES = 20_000  # whose covariance the Gaussian has
QUADRATURE = 50_000  # samples for means over the Gaussian that have no closed form


class Problem(Protocol):
    """Distribution p_σ = p * N(0, σ²), and what is known about it. Losses are in units of 1/σ².

    Attributes:
        dim: D.
        sigma: σ.
        spread: root mean square of a coordinate of x.
        refs: reference points with which the density estimate is exact, or None if there are none.
    """

    dim: int
    sigma: float
    spread: float
    refs: Tensor | None

    def clean(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw x from p, `[n, D]`."""

    def make_field(self) -> nn.Module:
        """Make a field with weights from torch's generator."""

    def exact_loss(self, field: Field) -> tuple[Tensor, float]:
        """Return a number whose gradient in the field's parameters is that of σ² J, and σ² J itself."""

    def paired(self, field: Field, values: Field) -> Tensor:
        """Return 2 σ² E[f·v], differentiable in the parameters of f."""

    def distance(self, field: Field) -> float:
        """Return the distance between p_σ and the distribution that dx = f dt + √2 dW keeps; infinite if none."""

    def sampled_distance(self, field: Field, generator: torch.Generator) -> float | None:
        """Return W2 between p_σ and the ends of Langevin chains that start from it; None where `distance` is W2."""


def noised(problem: Problem, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw samples of p_σ and the noise in them, in units of σ: `[n, D]` each."""
    noise = torch.randn(n, problem.dim, generator=generator)
    return problem.clean(n, generator) + problem.sigma * noise, noise


class MixtureProblem:
    """Three modes in the plane. The means are the clean data, so σ² is the variance of a component of p_σ.

    Args:
        cells: along each side of the grid for the exact gradient.
        chains, chain_steps: Langevin chains of the sampled distance, with steps of σ²/10.
    """

    dim = 2

    def __init__(self, cells: int, chains: int, chain_steps: int) -> None:
        means = triangle_means(RADIUS).float()
        self.refs: Tensor | None = means
        self.mixture = GaussianMixture(means, VARIANCE + LEVEL**2)
        self.sigma = math.sqrt(self.mixture.variance)
        self.spread = math.sqrt(RADIUS**2 / 2 + self.mixture.variance)
        self.cells, self.chains, self.chain_steps = cells, chains, chain_steps

    @cached_property
    def grid(self) -> GridProjection:
        """Grid in a square that reaches 5.5σ beyond the means."""
        exact = GaussianMixture(triangle_means(RADIUS), self.mixture.variance)
        return GridProjection(exact.log_density, RADIUS + 5.5 * self.sigma, self.cells)

    def clean(self, n: int, generator: torch.Generator) -> Tensor:
        return self.mixture.sample_means((n,), generator)

    def make_field(self) -> nn.Module:
        return FixedLevelField(2, 64, self.sigma, RADIUS / math.sqrt(2))

    def exact_loss(self, field: Field) -> tuple[Tensor, float]:
        across = self.grid.along_faces(field)
        with torch.no_grad():
            part = self.grid.gradient_part(across - self.grid.along_faces(self.mixture.score))
            value = self.grid.mean_product(part, part).item()
        return 2 * self.sigma**2 * self.grid.mean_product(across, part), self.sigma**2 * value

    def paired(self, field: Field, values: Field) -> Tensor:
        across = self.grid.along_faces(field)
        return 2 * self.sigma**2 * self.grid.mean_product(across, self.grid.along_faces(values).detach())

    def distance(self, field: Field) -> float:
        """Return the energy distance, from the law on a grid: without samples and without steps of a chain."""
        half_width = RADIUS + 5.5 * self.sigma
        found, centers = stationary_law(field, half_width, self.cells)
        exact = self.mixture.log_density(centers).exp().double().reshape(found.shape)
        return energy_distance(found, exact / exact.sum(), 2 * half_width / self.cells)

    def sampled_distance(self, field: Field, generator: torch.Generator) -> float | None:
        start, exact = (self.mixture.sample(self.chains, generator) for _ in range(2))
        end = unadjusted_langevin(
            field, start, step_size=self.sigma**2 / 10, num_steps=self.chain_steps, generator=generator
        )
        return wasserstein2(end, exact) if end.isfinite().all() else math.inf


class CausalLinearField(nn.Module):
    """f(x) = -A x with A block lower triangular, one block per time point; it starts as the score of N(0, spread² I).

    Args:
        dim: D.
        block: numbers per time point.
        spread: unit of x.
    """

    def __init__(self, dim: int, block: int, spread: float) -> None:
        super().__init__()
        time = torch.arange(dim) // block
        self.register_buffer("mask", (time[:, None] >= time).float())
        self.weight = nn.Parameter(torch.eye(dim))
        self.spread = spread

    @property
    def matrix(self) -> Tensor:
        """A, `[D, D]`."""
        assert isinstance(self.mask, Tensor)
        return self.weight * self.mask / self.spread**2

    def forward(self, x: Tensor) -> Tensor:
        return -x @ self.matrix.T.to(x)


class SpringsProblem:
    """Gaussian with the covariance of trajectories of two masses on springs: ten points of four numbers each."""

    def __init__(self) -> None:
        self.sigma = SPRINGS_LEVEL
        self.refs: Tensor | None = None
        states = trajectories(TRAJECTORIES, torch.Generator().manual_seed(0), POINTS)[:, ::EVERY]
        self.block = states.shape[-1]
        data = states.flatten(1).double().T.cov()
        self.dim = len(data)
        identity = torch.eye(self.dim, dtype=torch.float64)
        self.covariance = data + self.sigma**2 * identity
        self.spread = math.sqrt(self.covariance.trace().item() / self.dim)
        values, vectors = torch.linalg.eigh(data)
        self.root = (vectors * values.clamp_min(0).sqrt()).float()
        lower = torch.linalg.cholesky(self.covariance)
        corners = math.sqrt(self.dim) * lower.T
        # Points whose mean is 0 and whose covariance is Σ: means of quadratic functions over them are exact.
        self.corners = torch.cat([corners, -corners])

    def clean(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, self.dim, generator=generator) @ self.root.T

    def make_field(self) -> nn.Module:
        return CausalLinearField(self.dim, self.block, self.spread)

    def exact_loss(self, field: Field) -> tuple[Tensor, float]:
        loss = self.sigma**2 * quadratic_flux_loss(field, self.corners)[0]
        return loss, loss.item()

    def paired(self, field: Field, values: Field) -> Tensor:
        x, _ = noised(self, QUADRATURE, torch.Generator().manual_seed(1))
        return 2 * self.sigma**2 * (field(x) * values(x).detach()).sum(1).mean()

    def distance(self, field: Field) -> float:
        """Return W2, in closed form."""
        matrix = field(torch.eye(self.dim, dtype=torch.float64)).detach().T
        if torch.linalg.eigvals(matrix).real.max() >= 0:
            return math.inf
        found = solve_continuous_lyapunov(matrix.numpy(), -2 * torch.eye(self.dim).double().numpy())
        return bures_wasserstein2(torch.from_numpy(found), self.covariance)

    def sampled_distance(self, field: Field, generator: torch.Generator) -> float | None:
        return None


def make_problem(name: str, *, cells: int, chains: int, chain_steps: int) -> Problem:
    """Make one of `NAMES`; the sizes are those of `MixtureProblem`."""
    return MixtureProblem(cells, chains, chain_steps) if name == MIXTURE else SpringsProblem()
